// gated_conv1d on CUDA devices: what csrc/cuda/gated_conv.cpp calls. kernels/cpu/gated_conv.h has the formula, gated_conv_bwd.cpp there the
// derivatives; the sums over rows and taps are made by tile products (product.cuh, row_product.cuh).
//
// Forward is one kernel after the packing of the weights: value and gate columns of the same outputs lie in one tile, and the gate is
// applied to its sums. Every function puts kernels on the stream and returns the first error.
#pragma once

#include "../gated_conv_form.h"
#include "batch.h"

namespace pykernels::cuda {

struct GatedConv : GatedConvForm {
  Dtype dtype;
  bool tf32;  // float32 may be multiplied in tf32
  Batch batch;
  int64_t out_length, out_rows;  // output rows of a sequence of a padded batch, and of all
  // x, the packed weights and dh are read 16 bytes at a time: strides and widths are multiples of that.
  const void* x;
  int64_t x_sequence, x_row;               // strides in elements
  int64_t in_width;                        // c_in rounded up: what follows c_in in a row of x or the weights is zeros
  int64_t out_width;                       // c_out rounded up
  const void *value_weight, *gate_weight;  // [c_out, c_in, taps]
  void* packed;                            // packed_bytes
  bool wide;  // c_out is a multiple of 8 and all that is read and written by rows of c_out is aligned to 16 bytes

  // Backward only.
  const void* dy;                  // [out_rows, c_out]
  void* dh;                        // [out_rows, 2, out_width]
  void *value_dcond, *gate_dcond;  // one row of c_out per output row or sequence at distance 2 c_out, or null
  float* sums;                     // [sum_blocks, 2, out_width]: dh over blocks of rows
  int64_t sum_rows, sum_blocks;
  void *value_dbias, *gate_dbias;  // [c_out] or null
  void* packed_transposed;         // packed_transposed_bytes
  void* dx;                        // [x rows, c_in]
  float* partials;                 // [splits, taps, 2 * out_width, in_width]: dweight over split_rows rows each
  int64_t splits, split_rows;
  void *value_dweight, *gate_dweight;  // [c_out, c_in, taps]
};

inline int64_t packed_bytes(int64_t c_out, int64_t c_in, int64_t taps, Dtype dtype) {
  return round_up(c_out, 32) * 2 * taps * width_of(c_in, dtype) * element_size(dtype);
}
inline int64_t packed_transposed_bytes(int64_t c_out, int64_t c_in, int64_t taps, Dtype dtype) {
  return round_up(c_in, 32) * taps * 2 * width_of(c_out, dtype) * element_size(dtype);
}

extern "C" {

cudaError_t pykernels_cuda_gated_conv_pack(const GatedConv*, cudaStream_t);
cudaError_t pykernels_cuda_gated_conv_forward(const GatedConv*, cudaStream_t);

// dh, dcond, dbias.
cudaError_t pykernels_cuda_gated_conv_backward_gate(const GatedConv*, cudaStream_t);
// Packs the weights into packed_transposed and makes dx.
cudaError_t pykernels_cuda_gated_conv_backward_input(const GatedConv*, cudaStream_t);
cudaError_t pykernels_cuda_gated_conv_backward_weight(const GatedConv*, cudaStream_t);

}  // extern "C"

}  // namespace pykernels::cuda
