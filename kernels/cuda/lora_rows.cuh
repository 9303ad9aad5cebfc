// What the kernels of lora_linear know of rows: their adapters, what dropout keeps of them, and how they come into a tile's shared memory.
#pragma once

#include "lora_linear.h"
#include "philox.cuh"
#include "product.cuh"

namespace pykernels::cuda {

// Of a row; -1: none.
__device__ __forceinline__ int adapter_of(const LoraCall& call, int64_t row) {
  if (!call.index) return 0;
  const int64_t at = row / call.rows_per_index;
  const int64_t e = call.wide_index ? static_cast<const int64_t*>(call.index)[at] : static_cast<const int32_t*>(call.index)[at];
  return e >= 0 && e < call.adapters ? int(e) : -1;
}

__device__ __forceinline__ float scale_of(const LoraCall& call, int adapter) {
  return adapter < 0 ? 0.f : call.scales ? call.scales[adapter] : call.scale;
}

// The draws of elements column ... column + 7 of x, column a multiple of 8.
__device__ __forceinline__ Draws draws_of(const LoraCall& call, int64_t row, int64_t column) {
  return philox(call.seed, uint64_t(row) * uint64_t((call.in + 7) / 8) + uint64_t(column / 8), call.stream, 0);
}

// Zeros what dropout does not keep of 16 bytes of x in shared memory, from `column` on.
template <class T>
__device__ __forceinline__ void drop_chunk(const LoraCall& call, uint32_t address, int64_t row, int64_t column) {
  const Draws draws = draws_of(call, row, column);
  uint32_t v[4];
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t low = (draws.words[i] & 0xffffu) < call.keep_threshold ? 0xffffu : 0u;
      const uint32_t high = draws.words[i] >> 16 < call.keep_threshold ? 0xffff0000u : 0u;
      v[i] &= low | high;
    } else {
      const uint32_t word = column % 8 ? draws.words[2 + i / 2] : draws.words[i / 2];
      if ((i % 2 ? word >> 16 : word & 0xffffu) >= call.keep_threshold) v[i] = 0;
    }
  }
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// The adapters of a tile's rows, and which there are in the order of their first rows.
template <int kRows>
struct TileAdapters {
  int of[kRows], list[kRows], count;
  uint8_t first[kRows];

  __device__ __forceinline__ void none() {
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
  }

  // By all threads of the block, who may read it afterwards.
  __device__ __forceinline__ void find(const LoraCall& call, int64_t row0) {
    for (int r = threadIdx.x; r < kRows; r += blockDim.x) of[r] = row0 + r < call.rows ? adapter_of(call, row0 + r) : -1;
    if (!call.index) {
      if (threadIdx.x == 0) list[0] = 0, count = 1;
      __syncthreads();
      return;
    }
    __syncthreads();
    for (int r = threadIdx.x; r < kRows; r += blockDim.x) {
      bool is_first = of[r] >= 0;
      for (int before = 0; before < r; before++) is_first &= of[before] != of[r];
      first[r] = is_first;
    }
    __syncthreads();
    for (int r = threadIdx.x; r < kRows; r += blockDim.x) {
      int place = 0;
      for (int before = 0; before < r; before++) place += first[before];
      if (first[r]) list[place] = of[r];
      if (r == kRows - 1) count = place + first[r];
    }
    __syncthreads();
  }
};

template <int kMost>
__device__ __forceinline__ int count_left(int64_t n) {
  return int(n < kMost ? n : kMost);
}

// One part of a tile product's inner dimension: bytes [begin, end) of rows of a from the tile's first row on, and the rows of b from its
// first column on; those of an adapter lie b_adapter bytes behind those of the one before.
struct LoraPart {
  const char *a, *b;
  int64_t a_row, b_row, b_adapter, begin, end;
};

// What the copies of a block's tile go by, in shared memory. The inner dimension is, for each adapter of the tile's rows, those rows, with
// zeros for others, and that adapter's factor; then, in a product, all rows and the weight.
template <class Tile>
struct LoraParts {
  TileAdapters<Tile::kRows> adapters;
  LoraPart low, weight;
  const char* fallback;   // some memory, for copies of zeros
  int64_t columns_end;    // bytes of a row of a weight that has the columns side by side
  int64_t depth;          // its rows
  int64_t row0, column0;  // of the tile, for what comes after the sums, which leave no registers to keep them in
};

template <class Tile>
class LoraSource {
  using T = typename Tile::Element;
  static constexpr int kSize = int(sizeof(T));

 public:
  // parts is filled. rows, columns: how many the tile has.
  __device__ __forceinline__ LoraSource(const LoraParts<Tile>& parts, int rows, int columns)
      : parts_(parts), part_(0), existing_(rows), columns_(columns) {
    begin_part();
  }

  __device__ __forceinline__ int low_steps() const { return parts_.adapters.count * steps_of(parts_.low.end - parts_.low.begin); }
  __device__ __forceinline__ int weight_steps() const { return steps_of(parts_.weight.end); }

  __device__ __forceinline__ void copy(uint32_t a, uint32_t b) {
    const bool inside = threadIdx.x % Tile::kRowThreads * 16 < left_;
    const uint32_t to = Tile::swizzled(row(), threadIdx.x % Tile::kRowThreads);
    // Read anew at each step: the sums leave few registers.
    const LoraPart& part = part_ < parts_.adapters.count ? parts_.low : parts_.weight;
    const int64_t a_pass = Tile::kPassRows * part.a_row;
    const char* from = a_;
#pragma unroll
    for (int i = 0; i < Tile::kARows; i++, from += a_pass) {
      const bool valid = inside && (rows_ >> i & 1);
      copy_async(a + to + i * Tile::kPassRows * Tile::kStepBytes, valid ? from : parts_.fallback, valid);
    }
    a_ += Tile::kStepBytes;
    if (Tile::kColumnsAdjacent && part_ == parts_.adapters.count) {
      copy_columns(b, part.b_row);
    } else {
      const int64_t b_pass = Tile::kPassRows * part.b_row;
      from = b_;
#pragma unroll
      for (int i = 0; i < Tile::kBRows; i++, from += b_pass) {
        const bool valid = inside && row() + i * Tile::kPassRows < columns_;
        copy_async(b + to + i * Tile::kPassRows * Tile::kStepBytes, valid ? from : parts_.fallback, valid);
      }
      b_ += Tile::kStepBytes;
    }
    left_ -= Tile::kStepBytes;
    if (left_ <= 0 && part_ < parts_.adapters.count) {
      part_++;
      begin_part();
    }
  }

 private:
  __device__ __forceinline__ static int row() { return threadIdx.x / Tile::kRowThreads; }
  __device__ __forceinline__ static int steps_of(int64_t bytes) { return int((bytes + Tile::kStepBytes - 1) / Tile::kStepBytes); }

  __device__ __forceinline__ void begin_part() {
    const bool low = part_ < parts_.adapters.count;
    const LoraPart& part = low ? parts_.low : parts_.weight;
    const int adapter = low ? parts_.adapters.list[part_] : 0;
    const int64_t column = part.begin + threadIdx.x % Tile::kRowThreads * 16;
    a_ = part.a + row() * part.a_row + column;
    b_ = part.b + adapter * part.b_adapter;
    if (!Tile::kColumnsAdjacent || low) b_ += row() * part.b_row + column;
    left_ = part.end - part.begin;
    inner_ = 0;
    rows_ = 0;
#pragma unroll
    for (int i = 0; i < Tile::kARows; i++) {
      const int r = row() + i * Tile::kPassRows;
      rows_ |= uint32_t(low ? parts_.adapters.of[r] == adapter : r < existing_) << i;
    }
  }

  // Rows of the inner dimension, each with the tile's columns.
  __device__ __forceinline__ void copy_columns([[maybe_unused]] uint32_t b, [[maybe_unused]] int64_t row_bytes) {
    if constexpr (Tile::kColumnsAdjacent) {
      constexpr int kChunks = Tile::kColumns * kSize / 16;
#pragma unroll
      for (int i = 0; i < Tile::kBRows; i++) {
        const int index = threadIdx.x + i * Tile::kThreads, inner = index / kChunks, chunk = index % kChunks;
        const bool valid = inner_ + inner < parts_.depth && chunk * 16 < parts_.columns_end;
        copy_async(b + Tile::column_address(inner, chunk), valid ? b_ + inner * row_bytes + chunk * 16 : parts_.fallback, valid);
      }
      b_ += Tile::kDepth * row_bytes;
      inner_ += Tile::kDepth;
    }
  }

  const LoraParts<Tile>& parts_;
  int part_, existing_, columns_;
  const char *a_, *b_;  // of this thread's first row, or for columns side by side of the step
  int64_t left_, inner_;
  uint32_t rows_;
};

// Zeros what dropout does not keep of the rows that a thread has copied, step by step; the inner dimension is [begin, end) of x's columns
// for each adapter.
template <class Tile>
class RowDropout {
  static constexpr int kSize = int(sizeof(typename Tile::Element));

 public:
  __device__ __forceinline__ RowDropout(const LoraCall& call, int64_t row0, int64_t begin, int64_t end)
      : call_(call), row0_(row0), begin_(begin), end_(end), column_(begin) {}

  __device__ __forceinline__ void operator()(uint32_t a) {
    const int row = threadIdx.x / Tile::kRowThreads, chunk = threadIdx.x % Tile::kRowThreads;
#pragma unroll
    for (int i = 0; i < Tile::kARows; i++) {
      drop_chunk<typename Tile::Element>(call_, a + Tile::swizzled(row, chunk) + i * Tile::kPassRows * Tile::kStepBytes,
                                         row0_ + row + i * Tile::kPassRows, column_ + chunk * (16 / kSize));
    }
    column_ += Tile::kStepBytes / kSize;
    if (column_ >= end_) column_ = begin_;
  }

 private:
  const LoraCall& call_;
  const int64_t row0_, begin_, end_;
  int64_t column_;
};

}  // namespace pykernels::cuda
