#include "attention_pool_dtype.cuh"

namespace pykernels::cuda {

using Large = ProductTile<Bfloat16Math, 128, 128, 4, 2, 3>;
using Small = ProductTile<Bfloat16Math, 64, 128, 2, 2, 4>;
using HopperInput = WarpgroupTile<Bfloat16Math, 128, 3>;
using LargeInput = ProductTile<Bfloat16Math, 128, 128, 2, 2, 4>;
using SmallInput = ProductTile<Bfloat16Math, 64, 64, 4, 1, 4>;
using HopperWeight = WarpgroupRowTile<Bfloat16Math, 3>;
using Weight = RowProductTile<Bfloat16Math, 128, 64, 2, 2, 4>;

const AttentionPoolLaunchers attention_pool_bfloat16 =
    pool_launchers<Large, Small, HopperInput, LargeInput, SmallInput, HopperWeight, Weight>();

}  // namespace pykernels::cuda
