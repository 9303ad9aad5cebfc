// Which rows of a batch exist, as the kernels ask it.
#pragma once

#include "batch.h"

namespace pykernels::cuda {

__device__ __forceinline__ int64_t bound(const Batch& batch, int64_t i) {
  return batch.wide_bounds ? static_cast<const int64_t*>(batch.bounds)[i] : static_cast<const int32_t*>(batch.bounds)[i];
}

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// One sequence: its first row among all x rows, and how many of its rows are no padding.
struct SequenceRows {
  int64_t first;
  int live;
  const uint8_t* mask;
};

__device__ __forceinline__ SequenceRows sequence_rows(const Batch& batch, int64_t b) {
  if (batch.packed) {
    const int64_t first = clamp(bound(batch, b), 0, batch.rows);
    return {first, int(clamp(bound(batch, b + 1), first, batch.rows) - first), nullptr};
  }
  const int64_t live = batch.bounds ? clamp(bound(batch, b), 0, batch.length) : batch.length;
  return {b * batch.length, int(live), batch.mask ? batch.mask + b * batch.length : nullptr};
}

// Row `row` of tensors whose sequences have `length` rows (x rows, or output rows where those are fewer).
struct Place {
  int sequence;
  int t;  // row within the sequence
};

__device__ __forceinline__ Place place_of(const Batch& batch, int64_t row, int64_t length) {
  if (batch.packed) {
    const int b = batch.sequence_of_row[row];
    return {b, int(row - clamp(bound(batch, b), 0, batch.rows))};
  }
  // Rows number less than 2^31, which csrc checks.
  const uint32_t b = uint32_t(row) / uint32_t(length);
  return {int(b), int(uint32_t(row) - b * uint32_t(length))};
}

// Whether x row t of a sequence is there and not masked. Negative t too.
__device__ __forceinline__ bool exists(const SequenceRows& rows, int64_t t) {
  return t >= 0 && t < rows.live && (!rows.mask || rows.mask[t]);
}

}  // namespace pykernels::cuda
