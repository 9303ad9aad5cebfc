#include "gated_conv_dtype.cuh"

namespace pykernels::cuda {

using Hopper = WarpgroupTile<Float16Math, 128, 3>;
using Large = ProductTile<Float16Math, 128, 128, 2, 2, 4>;
using Small = ProductTile<Float16Math, 64, 64, 4, 1, 4>;
using HopperWeight = WarpgroupRowTile<Float16Math, 3>;
using Weight = RowProductTile<Float16Math, 128, 64, 2, 2, 4>;

const GatedConvLaunchers gated_conv_float16 = launchers<Hopper, Large, Small, HopperWeight, Weight>();

}  // namespace pykernels::cuda
