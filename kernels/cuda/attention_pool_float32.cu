#include "attention_pool_dtype.cuh"

namespace pykernels::cuda {

using Small = ProductTile<Float32Math, 64, 128, 2, 2, 4>;
using LargeInput = ProductTile<Float32Math, 128, 64, 4, 1, 3>;
using SmallInput = ProductTile<Float32Math, 32, 64, 1, 1, 4>;
using Weight = RowProductTile<Float32Math, 64, 64, 2, 2, 4>;

const AttentionPoolLaunchers attention_pool_float32 = pool_launchers<void, Small, void, LargeInput, SmallInput, void, Weight>();

}  // namespace pykernels::cuda
