// Gradients that are sums over rows: of the adapters, of a trained weight and of a bias.
#pragma once

#include "launch.cuh"
#include "lora_linear_shrink.cuh"
#include "lora_rows.cuh"
#include "row_product.cuh"

namespace pykernels::cuda {

// One tile of [a.width, b.width] of one adapter, over split_rows rows. Tiles are down x across x adapters.
template <class Tile>
__device__ __forceinline__ void sums_tile(const LoraSums& p, int64_t down, int64_t across, int64_t tile, int64_t split,
                                          RowWindow<Tile>& window, char* shared) {
  using T = typename Tile::Element;
  constexpr int64_t kSize = sizeof(T);
  const int64_t row0 = tile % down * Tile::kRows, column0 = tile / down % across * Tile::kColumns;
  const int64_t adapter = tile / down / across;
  const int64_t begin = split * p.split_rows, end = begin + p.split_rows < p.call.rows ? begin + p.split_rows : p.call.rows;
  const T* const a = static_cast<const T*>(p.a.data) + row0;
  const T* const b = static_cast<const T*>(p.b.data) + column0;

  const auto a_row = [&](int64_t row) { return reinterpret_cast<const char*>(a + row * p.a.row); };
  const auto b_row = [&](int64_t row) -> const char* {
    return adapter_of(p.call, row) == adapter ? reinterpret_cast<const char*>(b + row * p.b.row) : nullptr;
  };
  const auto run = [&](RowSums<Tile>& sums, auto arrived) {
    run_row_product(sums, begin, end, (p.a.width - row0) * kSize, (p.b.width - column0) * kSize, a_row, b_row,
                    static_cast<const char*>(p.a.data), window, shared, arrived);
  };
  RowSums<Tile> sums;
  if (p.drop) {
    run(sums, [&](uint32_t at, int64_t row, int chunk) { drop_chunk<T>(p.call, at, row, row0 + chunk * (16 / kSize)); });
  } else {
    run(sums, Unchanged());
  }
  const int64_t adapters = p.call.index ? p.call.adapters : 1;
  float* const to = p.partials + (split * adapters + adapter) * p.a.width * p.b.width;
  sums.visit([&](int r, int c, float low, float high) {
    const int64_t row = row0 + r, column = column0 + c;
    if (row < p.a.width && column < p.b.width) *reinterpret_cast<float2*>(to + row * p.b.width + column) = make_float2(low, high);
  });
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) lora_sums_kernel(const __grid_constant__ LoraSums p, int64_t down, int64_t across) {
  extern __shared__ char shared_memory[];
  __shared__ RowWindow<Tile> window;
  sums_tile<Tile>(p, down, across, blockIdx.x, blockIdx.y, window, aligned_shared<Tile>(shared_memory));
}

// A shrink of rows and sums over the same rows. Blocks that read the same ones run at about the same time, so that memory is read once.
template <class Shrink, class Sums>
__global__ void __launch_bounds__(Sums::kThreads)
    lora_shrink_and_sums_kernel(const __grid_constant__ LoraShrink low, const __grid_constant__ LoraSums p,
                                const __grid_constant__ LoraTerms terms, int column_tiles, int64_t shrinks, int64_t down, int64_t across,
                                int64_t tiles) {
  static_assert(Shrink::kThreads == Sums::kThreads && Shrink::kAlignment == Sums::kAlignment);
  extern __shared__ char shared_memory[];
  char* const shared = aligned_shared<Sums>(shared_memory);
  __shared__ LoraParts<Shrink> parts;
  __shared__ RowWindow<Sums> window;
  const int64_t group = blockIdx.x / (shrinks + tiles), in = blockIdx.x % (shrinks + tiles);
  if (in < shrinks) {
    const int64_t row_tile = group * (p.split_rows / Shrink::kRows) + in / low.splits / column_tiles;
    if (row_tile * Shrink::kRows >= p.call.rows) return;
    shrink_tile<false, Shrink>(low, terms, row_tile, in / low.splits % column_tiles, in % low.splits, parts, shared);
  } else {
    sums_tile<Sums>(p, down, across, in - shrinks, group, window, shared);
  }
}

// The partials in their order. T: of the call; R: of the result.
template <class T, class R>
__global__ void __launch_bounds__(256) lora_sums_result_kernel(const __grid_constant__ LoraSums p, int64_t adapters, int64_t elements) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= elements) return;
  const int64_t b = index % p.b_columns, a = index / p.b_columns % p.a_columns, e = index / p.b_columns / p.a_columns;
  const int64_t of_adapter = p.a.width * p.b.width;
  float v = 0.f, unlift = 1.f;
  for (int64_t term = 0; term < p.b_terms; term++) {
    float sum = 0.f;
    const float* from = p.partials + e * of_adapter + a * p.b.width + term * p.b_columns + b;
    for (int64_t split = 0; split < p.splits; split++) sum += from[split * adapters * of_adapter];
    v += unlift * sum;
    unlift *= 1.f / kLift<T>;
  }
  static_cast<R*>(p.to)[e * p.a_columns * p.b_columns + a * p.a_stride + b * p.b_stride] = from_float<R>(v);
}

inline int64_t tiles_of(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }
inline int64_t adapters_of(const LoraSums& p) { return p.call.index ? p.call.adapters : 1; }

template <class T>
cudaError_t launch_sums_result(const LoraSums& p, cudaStream_t stream) {
  const int64_t elements = adapters_of(p) * p.a_columns * p.b_columns;
  const auto result = p.float_result ? lora_sums_result_kernel<T, float> : lora_sums_result_kernel<T, T>;
  return launch(result, dim3(blocks_of(elements, 256)), dim3(256), 0, stream, p, adapters_of(p), elements);
}

template <class Tile>
cudaError_t launch_sums(const LoraSums& p, cudaStream_t stream) {
  const int64_t down = tiles_of(p.a.width, Tile::kRows), across = tiles_of(p.b.width, Tile::kColumns);
  const dim3 grid(unsigned(down * across * adapters_of(p)), unsigned(p.splits));
  const cudaError_t error = launch(lora_sums_kernel<Tile>, grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, p, down, across);
  return error == cudaSuccess ? launch_sums_result<typename Tile::Element>(p, stream) : error;
}

template <class Shrink, class Sums>
cudaError_t launch_shrink_and_sums(const LoraShrink& low, const LoraSums& p, cudaStream_t stream) {
  using T = typename Sums::Element;
  const LoraTerms terms = terms_of(low.call);
  const int64_t column_tiles = tiles_of(terms.summed * low.call.rank, Shrink::kColumns);
  const int64_t down = tiles_of(p.a.width, Sums::kRows), across = tiles_of(p.b.width, Sums::kColumns);
  const int64_t shrinks = p.split_rows / Shrink::kRows * column_tiles * low.splits, tiles = down * across * adapters_of(p);
  constexpr int kShared = Shrink::kSharedBytes > Sums::kSharedBytes ? Shrink::kSharedBytes : Sums::kSharedBytes;
  cudaError_t error = launch(lora_shrink_and_sums_kernel<Shrink, Sums>, dim3(unsigned((shrinks + tiles) * p.splits)), dim3(Sums::kThreads),
                             kShared, stream, low, p, terms, int(column_tiles), shrinks, down, across, tiles);
  if (error == cudaSuccess) error = launch_spread<T>(low, terms, stream);
  return error == cudaSuccess ? launch_sums_result<T>(p, stream) : error;
}

}  // namespace pykernels::cuda
