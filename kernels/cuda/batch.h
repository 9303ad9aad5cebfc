// What the CUDA kernels of all operators on sequences are told about the batch. Lengths and boundaries stay on the device, so that no call
// waits for it; what lies outside of the tensors there is cut off.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../dtype.h"

namespace pykernels::cuda {

struct Batch {
  int64_t sequences;
  int64_t length;      // x rows of each sequence of a padded batch; 0 for packed rows
  int64_t rows;        // x rows in all
  const void* bounds;  // lengths [sequences]; cu_seqlens [sequences + 1] of packed rows; or null
  bool wide_bounds;    // they are int64, else int32
  bool packed;
  const uint8_t* mask;             // [sequences, length] or null
  const int32_t* sequence_of_row;  // packed rows only
};

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t width_of(int64_t columns, Dtype dtype) { return round_up(columns, 16 / element_size(dtype)); }

extern "C" {

// Rows of x of any strides to contiguous ones of `width`, with zeros behind the columns. rows = sequences * length.
cudaError_t pykernels_cuda_stage_rows(Dtype, const void* x, int64_t sequence_stride, int64_t row_stride, int64_t column_stride,
                                      int64_t rows, int64_t length, int64_t columns, int64_t width, void* to, cudaStream_t);
// For packed rows: the sequence that each row belongs to.
cudaError_t pykernels_cuda_sequence_of_row(const Batch*, int32_t* to, cudaStream_t);

}  // extern "C"

}  // namespace pykernels::cuda
