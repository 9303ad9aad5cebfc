#include "lora_linear_dtype.cuh"

namespace pykernels::cuda {

using Hopper = WarpgroupTile<Float16Math, 128, 3>;
using Large = ProductTile<Float16Math, 128, 128, 2, 2, 4>;
using Small = ProductTile<Float16Math, 64, 64, 4, 1, 4>;
using Narrow = ProductTile<Float16Math, 64, 32, 4, 1, 4>;
using Wide = Small;
using HopperSums = WarpgroupRowTile<Float16Math, 3>;
using Sums = RowProductTile<Float16Math, 128, 64, 2, 2, 4>;

const LoraLinearLaunchers lora_linear_float16 = launchers<Hopper, Large, Small, Narrow, Wide, HopperSums, Sums>();

}  // namespace pykernels::cuda
