// The kernels of gated_conv1d for one dtype, and which tiles they use.
#pragma once

#include <type_traits>

#include "gated_conv_backward.cuh"

namespace pykernels::cuda {

// What each file gated_conv_<dtype>.cu makes and gated_conv.cu chooses from.
struct GatedConvLaunchers {
  cudaError_t (*forward)(const GatedConv&, cudaStream_t);
  cudaError_t (*backward_gate)(const GatedConv&, cudaStream_t);
  cudaError_t (*backward_input)(const GatedConv&, cudaStream_t);
  cudaError_t (*backward_weight)(const GatedConv&, cudaStream_t);
};
extern const GatedConvLaunchers gated_conv_bfloat16, gated_conv_float16, gated_conv_float32, gated_conv_tf32;

// Large for many rows, Small where the large ones would leave multiprocessors idle. Hopper is for its own processors, or void.
template <class Hopper, class Large, class Small>
cudaError_t forward(const GatedConv& p, cudaStream_t stream) {
  const int64_t columns = (p.c_out + 31) / 32 * 64;
  if (!fills_device(p.out_rows, columns, Large::kRows, Large::kColumns)) return launch_forward<Small>(p, stream);
  if constexpr (!std::is_void_v<Hopper>) {
    if (is_hopper()) return launch_forward<Hopper>(p, stream);
  }
  return launch_forward<Large>(p, stream);
}
template <class Hopper, class Large, class Small>
cudaError_t backward_input(const GatedConv& p, cudaStream_t stream) {
  if (p.c_in <= Small::kColumns || !fills_device(p.batch.rows, p.c_in, Large::kRows, Large::kColumns)) {
    return launch_backward_input<Small>(p, stream);
  }
  if constexpr (!std::is_void_v<Hopper>) {
    if (is_hopper()) return launch_backward_input<Hopper>(p, stream);
  }
  return launch_backward_input<Large>(p, stream);
}

template <class HopperWeight, class Weight>
cudaError_t backward_weight(const GatedConv& p, cudaStream_t stream) {
  if constexpr (!std::is_void_v<HopperWeight>) {
    if (is_hopper() && p.in_width > Weight::kColumns) return launch_backward_weight<HopperWeight>(p, stream);
  }
  return launch_backward_weight<Weight>(p, stream);
}

template <class Hopper, class Large, class Small, class HopperWeight, class Weight>
constexpr GatedConvLaunchers launchers() {
  return {forward<Hopper, Large, Small>, launch_backward_gate<typename Large::Element>, backward_input<Hopper, Large, Small>,
          backward_weight<HopperWeight, Weight>};
}

}  // namespace pykernels::cuda
