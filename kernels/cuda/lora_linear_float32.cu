#include "lora_linear_dtype.cuh"

namespace pykernels::cuda {

using Large = ProductTile<Float32Math, 128, 64, 4, 1, 3>;
using Small = ProductTile<Float32Math, 32, 64, 2, 1, 4>;
using Narrow = ProductTile<Float32Math, 64, 32, 4, 1, 4>;
using Wide = ProductTile<Float32Math, 64, 64, 4, 1, 4>;
using Sums = RowProductTile<Float32Math, 64, 64, 2, 2, 4>;

const LoraLinearLaunchers lora_linear_float32 = launchers<void, Large, Small, Narrow, Wide, void, Sums>();

}  // namespace pykernels::cuda
