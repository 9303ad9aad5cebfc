#include "gated_conv_dtype.cuh"

namespace pykernels::cuda {

using Large = ProductTile<Tf32Math, 128, 128, 2, 2, 4>;
using Small = ProductTile<Tf32Math, 64, 64, 4, 1, 4>;
using Weight = RowProductTile<Tf32Math, 64, 64, 2, 2, 4>;

const GatedConvLaunchers gated_conv_tf32 = launchers<void, Large, Small, void, Weight>();

}  // namespace pykernels::cuda
