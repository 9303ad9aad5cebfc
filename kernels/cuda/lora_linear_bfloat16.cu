#include "lora_linear_dtype.cuh"

namespace pykernels::cuda {

using Hopper = WarpgroupTile<Bfloat16Math, 128, 3>;
using Large = ProductTile<Bfloat16Math, 128, 128, 2, 2, 4>;
using Small = ProductTile<Bfloat16Math, 64, 64, 4, 1, 4>;
using Narrow = ProductTile<Bfloat16Math, 64, 32, 4, 1, 4>;
using Wide = Small;
using HopperSums = WarpgroupRowTile<Bfloat16Math, 3>;
using Sums = RowProductTile<Bfloat16Math, 128, 64, 2, 2, 4>;

const LoraLinearLaunchers lora_linear_bfloat16 = launchers<Hopper, Large, Small, Narrow, Wide, HopperSums, Sums>();

}  // namespace pykernels::cuda
