// Products of rows of x with all hidden units, one tile of columns after the other: what forward and backward begin with.
//
// Columns are hidden units; with a gate they are groups of 64, 32 units and their 32 gates. A warp has 32 rows and 64 columns, so
// that what a warp sums does not depend on the tile.
#pragma once

#include "attention_pool_activation.cuh"
#include "batch.cuh"
#include "launch.cuh"
#include "product.cuh"

namespace pykernels::cuda {

template <class T>
__device__ __forceinline__ const char* row_of_x(const AttentionPool& p, int64_t sequence, int64_t first, int64_t t) {
  const T* x = static_cast<const T*>(p.x) + (p.batch.packed ? (first + t) * p.x_row : sequence * p.x_sequence + t * p.x_row);
  return reinterpret_cast<const char*>(x);
}

// Where a score of row `row` of x lies, which is row t of its sequence.
__device__ __forceinline__ int64_t score_index(const AttentionPool& p, int64_t row, int64_t t, int64_t head) {
  return p.batch.packed ? head * p.score_head + row : (row - t) * p.score_row + head * p.score_head + t;
}

// a of a row with this score. The logarithm of the sum would be one number instead of two, but its rounding is one of the exponent.
__device__ __forceinline__ float weight_of(const AttentionPool& p, int64_t sequence, int64_t head, float score) {
  const float* max_sum = static_cast<const float*>(p.max_sum) + 2 * (sequence * p.heads + head);
  return expf(score - max_sum[0]) / max_sum[1];
}

// A row of a tile, in shared memory.
struct PoolRow {
  const char* x;  // null: not there, or masked
  int row;        // among all rows of x; negative: not there
};

template <class Tile>
class ScoreProduct {
 public:
  static constexpr int64_t kSize = sizeof(typename Tile::Element);
  static constexpr int kABytes = Tile::kRows * Tile::kStepBytes, kBBytes = Tile::kColumns * Tile::kStepBytes;
  static_assert(Tile::kColumns == kPoolColumns && Tile::kWarpRows == kSumRows && Tile::kWarpColumns == 64);
  static_assert(Tile::kPassRows == 32 || Tile::kPassRows == 64);

  // Shared memory: all of the rows where they are to stay, else as many stages of them as of the weights.
  __host__ __device__ static int64_t depth(const AttentionPool& p) {
    return (p.in_width * kSize + Tile::kStepBytes - 1) / Tile::kStepBytes;
  }
  __host__ __device__ static int64_t shared_bytes(const AttentionPool& p, bool resident) {
    return (resident ? depth(p) : Tile::kStages) * kABytes + Tile::kStages * kBBytes;
  }

  // multiply: else the sums stay zero.
  __device__ __forceinline__ ScoreProduct(const AttentionPool& p, const PoolRow* rows, bool resident, char* shared, bool multiply = true)
      : p_(p),
        depth_(multiply ? int(depth(p)) : 0),
        left_(int(p.column_tiles) * depth_),
        resident_(resident),
        a_(shared_address(shared)),
        b_(a_ + (resident ? depth_ : Tile::kStages) * kABytes) {
    const int row = threadIdx.x / Tile::kRowThreads, in = row % 32;
    unit_ = in % 8 / 2 * 8 + in / 8 * 2 + in % 2;  // permuted_column brings it to `in`
    to_ = Tile::swizzled(row, threadIdx.x % Tile::kRowThreads);
#pragma unroll
    for (int i = 0; i < Tile::kARows; i++) from_[i] = rows[row + i * Tile::kPassRows].x;
  }

  // Calls finish(tile of columns, sums) where wanted(tile) says so; both are asked by whole warps.
  template <class Wanted, class Finish>
  __device__ __forceinline__ void run(int column_tiles, Wanted wanted, Finish finish) {
#pragma unroll
    for (int s = 0; s < Tile::kStages - 1; s++) copy_next();
    int read = 0;
    Accumulators<Tile> sums;
    for (int tile = 0; tile < column_tiles; tile++) {
      sums.clear();
      const bool use = wanted(tile);
      for (int step = 0; step < depth_; step++) {
        wait_copies<Tile::kStages - 2>();
        __syncthreads();  // what all threads copied is there, and the stage to be overwritten has been read
        copy_next();
        if (use) sums.multiply(a_ + (resident_ ? step : read) * kABytes, b_ + read * kBBytes);
        read = read + 1 == Tile::kStages ? 0 : read + 1;
      }
      if (use) finish(tile, sums);
    }
    wait_copies<0>();
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void copy_next() {
    if (left_ > 0) {
      const int64_t column = column_ + threadIdx.x % Tile::kRowThreads * 16, width = p_.in_width * kSize;
      const char* const weight = static_cast<const char*>(p_.weight);
      const char* const gate_weight = p_.gated ? static_cast<const char*>(p_.gate_weight) : weight;
      const bool inside = column < width;
      const auto copy = [&](uint32_t to, const char* from, bool valid) {
        valid &= inside;
        copy_async(to + to_, valid ? from + column : weight, valid);
      };
      if (!resident_ || first_tile_) {
        const uint32_t a = a_ + (resident_ ? int(column_ / Tile::kStepBytes) : write_) * kABytes;
#pragma unroll
        for (int i = 0; i < Tile::kARows; i++) copy(a + i * Tile::kPassRows * Tile::kStepBytes, from_[i], from_[i]);
      }
#pragma unroll
      for (int i = 0; i < Tile::kBRows; i++) {
        // Which 32 columns of the tile.
        const int group = (Tile::kPassRows == 32 ? 0 : threadIdx.x / Tile::kRowThreads / 32) + i * (Tile::kPassRows / 32);
        const int unit = unit_ + 32 * (p_.gated ? group / 2 : group);
        copy(b_ + write_ * kBBytes + i * Tile::kPassRows * Tile::kStepBytes, (group % 2 ? gate_weight : weight) + unit * width,
             unit < p_.hidden);
      }
      column_ += Tile::kStepBytes;
      if (column_ >= width) {
        column_ = 0;
        first_tile_ = false;
        unit_ += p_.gated ? Tile::kColumns / 2 : Tile::kColumns;
      }
      write_ = write_ + 1 == Tile::kStages ? 0 : write_ + 1;
      left_--;
    }
    commit_copies();
  }

  const AttentionPool& p_;  // constant memory, read anew at each step: the sums leave few registers
  int64_t column_ = 0;
  int depth_, left_;  // steps of a tile of columns, and of all that are to be copied
  bool resident_, first_tile_ = true;
  uint32_t a_, b_, to_;
  int write_ = 0;
  int unit_;  // the first hidden unit that this thread copies for the next tile of columns
  const char* from_[Tile::kARows];
};

// Where a thread's columns are in one tile of columns: eight hidden units from `unit` on, in c[.][0]; in c[.][1] their gates, or the eight
// units 32 further on.
struct PoolColumns {
  int64_t unit;
  int block;  // of 64 columns, in the tile
};

template <class Tile>
__device__ __forceinline__ PoolColumns columns_of(const AttentionPool& p, int tile) {
  const int block = threadIdx.x / 32 % Tile::kAcross, units = p.gated ? 32 : 64;
  return {int64_t(tile) * (kPoolColumns / 64 * units) + block * units + threadIdx.x % 4 * 8, block};
}

// Whether any hidden unit is in this warp's columns.
template <class Tile>
__device__ __forceinline__ bool has_units(const AttentionPool& p, int tile) {
  return columns_of<Tile>(p, tile).unit - int(threadIdx.x % 4 * 8) < p.hidden;
}

// The row of the tile that a thread's slot i is.
template <class Tile>
__device__ __forceinline__ int row_of_slot(int i) {
  return threadIdx.x / 32 / Tile::kAcross * Tile::kWarpRows + i * 8 + threadIdx.x % 32 / 4;
}

__device__ __forceinline__ int units_left(int64_t limit, int64_t unit) { return int(clamp(limit - unit, 0, 8)); }

// The largest shared memory that a block may ask for.
inline int64_t most_shared_bytes() {
  int device = 0, bytes = 48 << 10;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

}  // namespace pykernels::cuda
