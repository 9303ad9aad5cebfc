// The kernels of gated_conv1d for one dtype, and which tiles they use.
#pragma once

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

// Large for many rows, Small where the large ones would leave multiprocessors idle.
template <class Large, class Small>
cudaError_t forward(const GatedConv& p, cudaStream_t stream) {
  return fills_device(p.out_rows, (p.c_out + 31) / 32 * 64, Large::kRows, Large::kColumns) ? launch_forward<Large>(p, stream)
                                                                                           : launch_forward<Small>(p, stream);
}
template <class Large, class Small>
cudaError_t backward_input(const GatedConv& p, cudaStream_t stream) {
  return p.c_in > Small::kColumns && fills_device(p.batch.rows, p.c_in, Large::kRows, Large::kColumns)
             ? launch_backward_input<Large>(p, stream)
             : launch_backward_input<Small>(p, stream);
}

template <class Large, class Small, class Weight>
constexpr GatedConvLaunchers launchers() {
  return {forward<Large, Small>, launch_backward_gate<typename Large::Element>, backward_input<Large, Small>,
          launch_backward_weight<Weight>};
}

}  // namespace pykernels::cuda
