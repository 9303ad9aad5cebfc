// The kernels of attention_pool for one dtype, and which tiles they use.
#pragma once

#include <type_traits>

#include "attention_pool_backward.cuh"
#include "attention_pool_forward.cuh"

namespace pykernels::cuda {

// What each file attention_pool_<dtype>.cu makes and attention_pool.cu chooses from.
struct AttentionPoolLaunchers {
  cudaError_t (*forward)(const AttentionPool&, cudaStream_t);
  cudaError_t (*backward_hidden)(const AttentionPool&, cudaStream_t);
  cudaError_t (*backward_input)(const AttentionPool&, cudaStream_t);
  cudaError_t (*backward_weight)(const AttentionPool&, cudaStream_t);
};
extern const AttentionPoolLaunchers attention_pool_bfloat16, attention_pool_float16, attention_pool_float32, attention_pool_tf32;

// Large for many rows, Small where the large ones would leave multiprocessors idle. What is not there is void; Hopper is for its own
// processors.
template <class Large, class Small>
cudaError_t pool_forward(const AttentionPool& p, cudaStream_t stream) {
  if constexpr (!std::is_void_v<Large>) {
    if (fills_device(p.chunks * p.chunk_rows, Large::kColumns, Large::kRows, Large::kColumns)) return launch_pool_forward<Large>(p, stream);
  }
  return launch_pool_forward<Small>(p, stream);
}

template <class Hopper, class Large, class Small>
cudaError_t pool_input(const AttentionPool& p, cudaStream_t stream) {
  if (p.width <= Small::kColumns || !fills_device(p.wave_end - p.wave_begin, p.width, Large::kRows, Large::kColumns)) {
    return launch_pool_input<Small>(p, stream);
  }
  if constexpr (!std::is_void_v<Hopper>) {
    if (is_hopper()) return launch_pool_input<Hopper>(p, stream);
  }
  return launch_pool_input<Large>(p, stream);
}

template <class HopperWeight, class Weight>
cudaError_t pool_weight(const AttentionPool& p, cudaStream_t stream) {
  if constexpr (!std::is_void_v<HopperWeight>) {
    if (is_hopper() && p.in_width > Weight::kColumns) return launch_pool_weight<HopperWeight>(p, stream);
  }
  return launch_pool_weight<Weight>(p, stream);
}

template <class Large, class Small, class HopperInput, class LargeInput, class SmallInput, class HopperWeight, class Weight>
constexpr AttentionPoolLaunchers pool_launchers() {
  return {pool_forward<Large, Small>, launch_pool_hidden<Small>, pool_input<HopperInput, LargeInput, SmallInput>,
          pool_weight<HopperWeight, Weight>};
}

}  // namespace pykernels::cuda
