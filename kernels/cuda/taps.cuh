// The operands of a convolution along rows as a tile product: its inner dimension is taps by columns, and each tap reads the rows shifted,
// with zeros where a row does not exist.
#pragma once

#include "batch.cuh"
#include "product.cuh"

namespace pykernels::cuda {

// A row of the product's result, in shared memory.
struct TapRow {
  const char* sequence;  // row 0 of the sequence that the taps read
  const uint8_t* mask;
  int t;      // tap k reads row t + offset + k * step
  int live;   // rows that exist; 0: the result's row does not
  int index;  // of the sequence
};

template <class Tile>
class TapSource {
 public:
  // rows [Tile::kRows]; weights: row `column` of the tile's operand, `columns` of them exist.
  __device__ __forceinline__ TapSource(const TapRow* rows, int64_t row_bytes, int64_t offset, int64_t step, int64_t taps,
                                       const char* weights, int64_t columns, int64_t width_bytes)
      : rows_(rows), row_bytes_(row_bytes), shift_(offset), step_(step), width_(width_bytes), weight_row_(taps * width_bytes) {
    const int row = threadIdx.x / Tile::kRowThreads;
    fallback_ = weights;
    weights_ = weights + row * weight_row_;
    columns_ = int(columns < Tile::kColumns ? columns : Tile::kColumns) - row;
    to_ = Tile::swizzled(row, threadIdx.x % Tile::kRowThreads);
    column_ = 0;
    tap_offset_ = 0;
    find_rows();
  }

  __device__ __forceinline__ static int64_t steps(int64_t taps, int64_t width_bytes) {
    return taps * ((width_bytes + Tile::kStepBytes - 1) / Tile::kStepBytes);
  }

  __device__ __forceinline__ void copy(uint32_t a, uint32_t b) {
    const int64_t column = column_ + threadIdx.x % Tile::kRowThreads * 16;
    const bool inside = column < width_;
#pragma unroll
    for (int i = 0; i < Tile::kARows; i++) {
      const bool valid = inside && from_[i];
      copy_async(a + to_ + i * Tile::kPassRows * Tile::kStepBytes, valid ? from_[i] + column : fallback_, valid);
    }
    const char* weights = weights_ + tap_offset_ + column;
#pragma unroll
    for (int i = 0; i < Tile::kBRows; i++) {
      const bool valid = inside && i * Tile::kPassRows < columns_;
      copy_async(b + to_ + i * Tile::kPassRows * Tile::kStepBytes, valid ? weights + i * Tile::kPassRows * weight_row_ : fallback_, valid);
    }
    column_ += Tile::kStepBytes;
    if (column_ >= width_) {
      column_ = 0;
      tap_offset_ += width_;
      shift_ += step_;
      find_rows();
    }
  }

 private:
  __device__ __forceinline__ void find_rows() {
#pragma unroll
    for (int i = 0; i < Tile::kARows; i++) {
      const TapRow& row = rows_[threadIdx.x / Tile::kRowThreads + i * Tile::kPassRows];
      const int64_t t = row.t + shift_;
      from_[i] = exists({0, row.live, row.mask}, t) ? row.sequence + t * row_bytes_ : nullptr;
    }
  }

  const TapRow* rows_;
  int64_t row_bytes_, shift_, step_, width_, weight_row_, column_, tap_offset_;
  const char *weights_, *fallback_;
  const char* from_[Tile::kARows];
  int columns_;
  uint32_t to_;
};

}  // namespace pykernels::cuda
