// The kernels of lora_linear for one dtype, and which tiles they use.
#pragma once

#include <type_traits>

#include "lora_linear_few.cuh"
#include "lora_linear_product.cuh"
#include "lora_linear_shrink.cuh"
#include "lora_linear_sums.cuh"

namespace pykernels::cuda {

// What each file lora_linear_<dtype>.cu makes and lora_linear.cu chooses from.
struct LoraLinearLaunchers {
  cudaError_t (*arrange)(const LoraArrange&, cudaStream_t);
  cudaError_t (*shrink)(const LoraShrink&, cudaStream_t);
  cudaError_t (*spread)(const LoraShrink&, cudaStream_t);
  cudaError_t (*product)(const LoraProduct&, cudaStream_t);
  cudaError_t (*sums)(const LoraSums&, cudaStream_t);
  cudaError_t (*shrink_and_sums)(const LoraShrink&, const LoraSums&, cudaStream_t);
  cudaError_t (*few)(const LoraFew&, cudaStream_t);
};
extern const LoraLinearLaunchers lora_linear_bfloat16, lora_linear_float16, lora_linear_float32, lora_linear_tf32;

template <class T>
cudaError_t arrange(const LoraArrange& p, cudaStream_t stream) {
  const int64_t terms = p.expand ? expand_terms(p.call) : shrink_terms(p.call);
  const int64_t elements = p.call.adapters * (p.expand ? p.factor.outer : terms * p.call.rank) * p.width;
  if (elements == 0) return cudaSuccess;
  const auto kernel = p.call.float_adapters ? lora_arrange_kernel<T, float> : lora_arrange_kernel<T, T>;
  return launch(kernel, dim3(blocks_of(elements, 256)), dim3(256), 0, stream, p, int(terms), elements);
}

// Narrow is wide enough for most ranks.
template <class Narrow, class Wide>
cudaError_t shrink(const LoraShrink& p, cudaStream_t stream) {
  const bool narrow = shrink_terms(p.call) * p.call.rank <= Narrow::kColumns;
  return narrow ? launch_shrink<RowsTile<Narrow>>(p, stream) : launch_shrink<RowsTile<Wide>>(p, stream);
}

template <class T>
cudaError_t spread(const LoraShrink& p, cudaStream_t stream) {
  LoraTerms terms = terms_of(p.call);
  terms.summed = 1;  // v has been summed
  return launch_spread<T>(p, terms, stream);
}

template <class Tile>
cudaError_t product_of(const LoraProduct& p, cudaStream_t stream) {
  return p.columns_adjacent ? launch_product<ColumnsTile<Tile>>(p, stream) : launch_product<RowsTile<Tile>>(p, stream);
}

// Large for many rows, Small where the large ones would leave multiprocessors idle. Hopper is for its own processors, or void.
template <class Hopper, class Large, class Small>
cudaError_t product(const LoraProduct& p, cudaStream_t stream) {
  if (!fills_device(p.call.rows, p.columns, Large::kRows, Large::kColumns)) return product_of<Small>(p, stream);
#if defined(PYKERNELS_SM90A)
  if constexpr (!std::is_void_v<Hopper>) {
    if (is_hopper()) return product_of<Hopper>(p, stream);
  }
#endif
  return product_of<Large>(p, stream);
}

template <class HopperSums, class Sums>
cudaError_t sums(const LoraSums& p, cudaStream_t stream) {
#if defined(PYKERNELS_SM90A)
  if constexpr (!std::is_void_v<HopperSums>) {
    if (is_hopper() && p.b.width > Sums::kColumns) return launch_sums<HopperSums>(p, stream);
  }
#endif
  return launch_sums<Sums>(p, stream);
}

template <class Narrow, class Wide, class Sums>
cudaError_t shrink_and_sums(const LoraShrink& low, const LoraSums& p, cudaStream_t stream) {
  const bool narrow = shrink_terms(low.call) * low.call.rank <= Narrow::kColumns;
  return narrow ? launch_shrink_and_sums<RowsTile<Narrow>, Sums>(low, p, stream)
                : launch_shrink_and_sums<RowsTile<Wide>, Sums>(low, p, stream);
}

template <class Hopper, class Large, class Small, class Narrow, class Wide, class HopperSums, class Sums>
constexpr LoraLinearLaunchers launchers() {
  using T = typename Large::Element;
  // Few rows are multiplied in float32: tf32 would make float32's kernels again.
  constexpr bool kOwnFew = !std::is_same_v<typename Large::Math, Tf32Math>;
  cudaError_t (*few)(const LoraFew&, cudaStream_t) = nullptr;
  if constexpr (kOwnFew) few = launch_few<T>;
  return {arrange<T>,
          shrink<Narrow, Wide>,
          spread<T>,
          product<Hopper, Large, Small>,
          sums<HopperSums, Sums>,
          shrink_and_sums<Narrow, Wide, Sums>,
          few};
}

}  // namespace pykernels::cuda
