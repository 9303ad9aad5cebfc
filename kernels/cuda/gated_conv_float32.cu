#include "gated_conv_dtype.cuh"

namespace pykernels::cuda {

using Large = ProductTile<Float32Math, 128, 64, 4, 1, 3>;
using Small = ProductTile<Float32Math, 32, 64, 1, 1, 4>;
using Weight = RowProductTile<Float32Math, 64, 64, 2, 2, 4>;

const GatedConvLaunchers gated_conv_float32 = launchers<void, Large, Small, void, Weight>();

}  // namespace pykernels::cuda
