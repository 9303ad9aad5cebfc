#include "lora_linear_dtype.cuh"

namespace pykernels::cuda {

using Large = ProductTile<Tf32Math, 128, 128, 2, 2, 4>;
using Small = ProductTile<Tf32Math, 64, 64, 4, 1, 4>;
using Narrow = ProductTile<Tf32Math, 64, 32, 4, 1, 4>;
using Wide = Small;
using Sums = RowProductTile<Tf32Math, 64, 64, 2, 2, 4>;

const LoraLinearLaunchers lora_linear_tf32 = launchers<void, Large, Small, Narrow, Wide, void, Sums>();

}  // namespace pykernels::cuda
