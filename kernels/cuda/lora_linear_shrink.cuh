// Rows times an adapter's narrow factor, and the terms in which the result goes on.
#pragma once

#include "column_product.cuh"
#include "launch.cuh"
#include "lora_rows.cuh"

namespace pykernels::cuda {

// float16 loses what lies below 2^-24: terms after the first are kept 2^11 times as large, one after the other, where their products are
// summed apart.
template <class T>
constexpr float kLift = std::is_same_v<T, float16> ? 2048.f : 1.f;

// Term n of v: what T holds of it, then of the rest, then of the rest of that.
template <class T>
__device__ __forceinline__ T term_of(float v, int n, float lift) {
  for (; n > 0; n--) {
    const float held = to_float(from_float<T>(v));
    v = isfinite(held) ? (v - held) * lift : 0.f;
  }
  return from_float<T>(v);
}

// The operands of the product are, for terms s and b: s0 s1 with b b, or s0 s0 s1 with b0 b1 b0.
__device__ __forceinline__ int row_term(int position, int terms) { return terms == 3 ? position / 2 : position; }
__device__ __forceinline__ int factor_term(int position, int terms) { return terms == 3 ? position % 2 : 0; }

// T: of the call; F: of the adapter.
template <class T, class F>
__global__ void __launch_bounds__(256) lora_arrange_kernel(const __grid_constant__ LoraArrange p, int terms, int64_t elements) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x, rank = p.call.rank;
  if (index >= elements) return;
  const int64_t inner = index % p.width, row = index / p.width;
  const int64_t of_adapter = p.expand ? p.factor.outer : terms * rank, e = row / of_adapter;
  const int64_t outer = p.expand ? row % of_adapter : inner, slot = p.expand ? inner : row % of_adapter;
  T value = from_float<T>(0.f);
  if (outer < p.factor.outer && slot < terms * rank) {
    const int64_t at = (e * p.factor.outer * rank) + outer * p.factor.outer_stride + slot % rank * p.factor.rank_stride;
    const int position = int(slot / rank);
    value = term_of<T>(to_float(static_cast<const F*>(p.factor.data)[at]), p.expand ? factor_term(position, terms) : position,
                       p.expand ? 1.f : kLift<T>);
    if (p.broken && !isfinite(to_float(value))) {
      p.broken[e] = 1;  // all who write here write this
      value = from_float<T>(0.f);
    }
  }
  static_cast<T*>(p.to)[index] = value;
}

// Of the factor that rows are shrunk with, and of the results in the product.
struct LoraTerms {
  int summed, expanded;
  int64_t width;
};

inline LoraTerms terms_of(const LoraCall& c) { return {int(shrink_terms(c)), int(expand_terms(c)), expand_width(c)}; }

// The results of one slot of a row's expand_width. sum(term, r): of the products with that term of column r of the factor.
template <class T, class Sum>
__device__ __forceinline__ void spread(const LoraShrink& p, const LoraTerms& terms, int64_t row, int64_t slot, Sum sum) {
  const int64_t rank = p.call.rank;
  T expanded = from_float<T>(0.f), summed = expanded;
  if (slot < terms.expanded * rank) {
    float v = 0.f, unlift = 1.f;
    for (int term = 0; term < terms.summed; term++) {
      v += unlift * sum(term, slot % rank);
      unlift *= 1.f / kLift<T>;
    }
    v *= p.multiplier;
    const int adapter = adapter_of(p.call, row);
    if (p.broken && adapter >= 0 && p.broken[adapter]) v = NAN;
    if (p.v && slot < rank) p.v[row * rank + slot] = v;
    const int position = int(slot / rank);
    v *= scale_of(p.call, adapter);
    summed = term_of<T>(v, position, kLift<T>);
    if (p.expand_broken && adapter >= 0 && p.expand_broken[adapter]) v = NAN;
    expanded = term_of<T>(v, row_term(position, terms.expanded), 1.f);
  }
  if (p.expanded) static_cast<T*>(p.expanded)[row * terms.width + slot] = expanded;
  if (p.summed) static_cast<T*>(p.summed)[row * terms.width + slot] = summed;
}

// Adds the partials in their order, and writes the results.
template <class T>
__global__ void __launch_bounds__(256)
    lora_spread_kernel(const __grid_constant__ LoraShrink p, const __grid_constant__ LoraTerms terms, int64_t elements) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= elements) return;
  const int64_t row = index / terms.width, columns = terms.summed * p.call.rank;
  spread<T>(p, terms, row, index % terms.width, [&](int term, int64_t r) {
    float sum = 0.f;
    const float* from = p.partials + row * columns + term * p.call.rank + r;
    for (int64_t split = 0; split < p.splits; split++) sum += from[split * p.call.rows * columns];
    return sum;
  });
}

// One tile of the partial results of one split; where kAtOnce and there is no room for those, the results themselves, of
// one split and one column tile.
template <bool kAtOnce, class Tile>
__device__ __forceinline__ void shrink_tile(const LoraShrink& p, const LoraTerms& terms, int64_t row_tile, int64_t column_tile,
                                            int64_t split, LoraParts<Tile>& parts, char* shared) {
  using T = typename Tile::Element;
  constexpr int64_t kSize = sizeof(T);
  const int64_t columns = terms.summed * p.call.rank;
  const int64_t row0 = row_tile * Tile::kRows, column0 = column_tile * Tile::kColumns, begin = split * p.split_width;
  const int64_t end = begin + p.split_width < p.rows.width ? begin + p.split_width : p.rows.width;

  if (threadIdx.x == 0) {
    const auto* a = static_cast<const T*>(p.rows.data) + row0 * p.rows.row;
    const auto* b = static_cast<const T*>(p.factor) + column0 * p.rows.width;
    parts.low = {reinterpret_cast<const char*>(a),
                 reinterpret_cast<const char*>(b),
                 p.rows.row * kSize,
                 p.rows.width * kSize,
                 columns * p.rows.width * kSize,
                 begin * kSize,
                 end * kSize};
    parts.weight = {};
    parts.fallback = static_cast<const char*>(p.rows.data);
    parts.row0 = row0;
    parts.column0 = column0;
  }
  parts.adapters.find(p.call, row0);
  LoraSource<Tile> source(parts, count_left<Tile::kRows>(p.call.rows - row0), count_left<Tile::kColumns>(columns - column0));
  Accumulators<typename Tile::Base> sums;
  sums.clear();
  if (p.drop) {
    continue_product(sums, source, source.low_steps(), shared, RowDropout<Tile>(p.call, row0, begin, end));
  } else {
    continue_product(sums, source, source.low_steps(), shared, [](uint32_t) {});
  }
  if constexpr (kAtOnce) {
    if (!p.partials) {
      float* const whole = reinterpret_cast<float*>(shared);
      change_sums(sums, [&](int r, int c, const float (&v)[8]) {
#pragma unroll
        for (int t = 0; t < 4; t++)
          *reinterpret_cast<float2*>(whole + r * Tile::kColumns + c + t * 8) = make_float2(v[2 * t], v[2 * t + 1]);
      });
      __syncthreads();
      const int width = int(terms.width);
#pragma unroll 1
      for (int index = threadIdx.x; index < Tile::kRows * width; index += Tile::kThreads) {
        const int r = index / width;
        if (parts.row0 + r >= p.call.rows) break;
        spread<T>(p, terms, parts.row0 + r, index % width,
                  [&](int term, int64_t of) { return whole[r * Tile::kColumns + term * p.call.rank + of]; });
      }
      return;
    }
  }
  exchange_sums(sums, shared, [&](int r, int c, const float (&v)[8]) {
    const int n = count_left<8>(columns - parts.column0 - c);
    if (parts.row0 + r >= p.call.rows || n <= 0) return;
    store_eight(p.partials + (split * p.call.rows + parts.row0 + r) * columns + parts.column0 + c, v, n, columns % 8 == 0);
  });
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    lora_shrink_kernel(const __grid_constant__ LoraShrink p, const __grid_constant__ LoraTerms terms, int column_tiles) {
  extern __shared__ char shared_memory[];
  __shared__ LoraParts<Tile> parts;
  shrink_tile<true, Tile>(p, terms, blockIdx.x / column_tiles, blockIdx.x % column_tiles, blockIdx.y, parts,
                          aligned_shared<Tile>(shared_memory));
}

template <class T>
cudaError_t launch_spread(const LoraShrink& p, const LoraTerms& terms, cudaStream_t stream) {
  const int64_t elements = p.call.rows * terms.width;
  return launch(lora_spread_kernel<T>, dim3(blocks_of(elements, 256)), dim3(256), 0, stream, p, terms, elements);
}

template <class Tile>
cudaError_t launch_shrink(const LoraShrink& p, cudaStream_t stream) {
  const LoraTerms terms = terms_of(p.call);
  const int64_t across = (terms.summed * p.call.rank + Tile::kColumns - 1) / Tile::kColumns;
  const dim3 grid(unsigned((p.call.rows + Tile::kRows - 1) / Tile::kRows * across), unsigned(p.splits));
  const cudaError_t error = launch(lora_shrink_kernel<Tile>, grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, p, terms, int(across));
  return error == cudaSuccess && p.partials ? launch_spread<typename Tile::Element>(p, terms, stream) : error;
}

}  // namespace pykernels::cuda
