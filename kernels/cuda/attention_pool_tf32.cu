#include "attention_pool_dtype.cuh"

namespace pykernels::cuda {

using Large = ProductTile<Tf32Math, 128, 128, 4, 2, 3>;
using Small = ProductTile<Tf32Math, 64, 128, 2, 2, 4>;
using LargeInput = ProductTile<Tf32Math, 128, 128, 2, 2, 4>;
using SmallInput = ProductTile<Tf32Math, 64, 64, 4, 1, 4>;
using Weight = RowProductTile<Tf32Math, 64, 64, 2, 2, 4>;

const AttentionPoolLaunchers attention_pool_tf32 = pool_launchers<Large, Small, void, LargeInput, SmallInput, void, Weight>();

}  // namespace pykernels::cuda
