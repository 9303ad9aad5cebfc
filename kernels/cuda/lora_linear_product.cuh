// The product with the frozen weight: y = x W^T + bias + S B^T, and dx = dy W + drop(dS A).
#pragma once

#include "column_product.cuh"
#include "launch.cuh"
#include "lora_rows.cuh"

namespace pykernels::cuda {

// Lane i of four has words[t], t = 0 ... 3, and gets word i of lane t as words[t].
__device__ __forceinline__ void transpose_words(uint32_t (&words)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const bool odd = lane & bit;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i | bit], bit);
      (odd ? words[i] : words[i | bit]) = got;
    }
  }
}

// Zeros the sums of inputs that dropout did not keep. A lane draws the bits of one of the four eights that it shares with its neighbours.
template <class Tile>
__device__ __forceinline__ void drop_sums(Accumulators<Tile>& sums, const LoraCall& call, int64_t row0, int64_t column0) {
  change_sums(sums, [&](int row, int column, float (&v)[8]) {
    Draws draws = draws_of(call, row0 + row, column0 + column / 32 * 32 + column % 8 * 4);
    transpose_words(draws.words);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint32_t draw = i % 2 ? draws.words[i / 2] >> 16 : draws.words[i / 2] & 0xffffu;
      if (draw >= call.keep_threshold) v[i] = 0.f;
    }
  });
}

// Which tile of down x across a block makes. Eight rows of tiles go together, so that blocks that run at the same time share operands.
__device__ __forceinline__ void tile_of_block(int64_t down, int64_t across, int64_t& row, int64_t& column) {
  constexpr int64_t kTogether = 8;
  const int64_t group = blockIdx.x / (kTogether * across), in = blockIdx.x % (kTogether * across);
  const int64_t first = group * kTogether, rows = down - first < kTogether ? down - first : kTogether;
  row = first + in % rows;
  column = in / rows;
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) lora_product_kernel(const __grid_constant__ LoraProduct p, int64_t down, int64_t across) {
  using T = typename Tile::Element;
  extern __shared__ char shared_memory[];
  char* const shared = aligned_shared<Tile>(shared_memory);
  __shared__ LoraParts<Tile> parts;
  constexpr int64_t kSize = sizeof(T);
  int64_t row0, column0;
  tile_of_block(down, across, row0, column0);
  row0 *= Tile::kRows, column0 *= Tile::kColumns;

  if (threadIdx.x == 0) {
    const int64_t width = p.expand_width;
    const auto at = [&](const void* from, int64_t elements) { return static_cast<const char*>(from) + elements * kSize; };
    parts.low = {at(p.expanded, row0 * width),
                 at(p.factor, column0 * width),
                 width * kSize,
                 width * kSize,
                 p.columns * width * kSize,
                 0,
                 width * kSize};
    parts.weight = {at(p.rows.data, row0 * p.rows.row),
                    at(p.weight.data, column0 * (Tile::kColumnsAdjacent ? 1 : p.weight.row)),
                    p.rows.row * kSize,
                    p.weight.row * kSize,
                    0,
                    0,
                    p.rows.width * kSize};
    parts.fallback = static_cast<const char*>(p.rows.data);
    parts.columns_end = (p.weight.width - column0) * kSize;
    parts.depth = p.depth;
    parts.row0 = row0;
    parts.column0 = column0;
  }
  if (p.expanded) {
    parts.adapters.find(p.call, row0);
  } else {
    parts.adapters.none();
  }
  LoraSource<Tile> source(parts, count_left<Tile::kRows>(p.call.rows - row0), count_left<Tile::kColumns>(p.columns - column0));

  Accumulators<Tile> sums;
  Accumulators<typename Tile::Base>& base = sums;
  const auto unchanged = [](uint32_t) {};
  sums.clear();
  if constexpr (Tile::kColumnsAdjacent) {
    continue_product(base, source, source.low_steps(), shared, unchanged);
    if (p.drop) drop_sums(base, p.call, parts.row0, parts.column0);
    continue_product(sums, source, source.weight_steps(), shared, unchanged);
  } else {
    int steps = source.low_steps() + (p.drop ? 0 : source.weight_steps());
#pragma unroll 1
    for (int part = 0; part < (p.drop ? 2 : 1); part++) {  // one copy of the code
      continue_product(base, source, steps, shared, unchanged);
      if (p.drop && part == 0) drop_sums(base, p.call, parts.row0, parts.column0);
      steps = source.weight_steps();
    }
  }

  exchange_sums(base, shared, [&](int r, int c, const float (&sum)[8]) {
    const int64_t row = parts.row0 + r, column = parts.column0 + c;
    if (row >= p.call.rows || column >= p.columns) return;
    const int n = int(p.columns - column < 8 ? p.columns - column : 8);
    T* const to = static_cast<T*>(p.out) + row * p.columns + column;
    float v[8], other[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = sum[i];
    const auto add = [&](const T* from) {
      load_eight(other, from, n, p.wide);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] += other[i];
    };
    if (p.bias) add(static_cast<const T*>(p.bias) + column);
    if (p.add) add(to);
    store_eight(to, v, n, p.wide);
  });
}

template <class Tile>
cudaError_t launch_product(const LoraProduct& p, cudaStream_t stream) {
  const int64_t down = (p.call.rows + Tile::kRows - 1) / Tile::kRows, across = (p.columns + Tile::kColumns - 1) / Tile::kColumns;
  return launch(lora_product_kernel<Tile>, dim3(unsigned(down * across)), dim3(Tile::kThreads), Tile::kSharedBytes, stream, p, down,
                across);
}

}  // namespace pykernels::cuda
