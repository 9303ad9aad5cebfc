// attention_pool on CUDA devices: what csrc/cuda/attention_pool.cpp calls. kernels/cpu/attention_pool.h has the formula,
// attention_pool_bwd.cpp there the derivatives.
//
// Forward cuts each sequence into chunks of rows. A block scores some chunks by tile products whose epilogue finishes the scores, so that u
// never exists in memory, and sums their rows with the weights while these are in shared memory, against the chunk's own largest score. The
// chunks of a sequence are put together in their order. What a sequence gives depends neither on its neighbours, nor on padding behind it,
// nor on which tile was chosen.
//
// Backward goes through the rows in waves: the gradient of what the activations are taken of, dh, exists for one wave at a time.
#pragma once

#include "../attention_pool_form.h"
#include "batch.h"

namespace pykernels::cuda {

// Rows of a chunk, unless all sequences are shorter; and hidden units (gates count as such) that one tile has.
constexpr int64_t kChunkRows = 64, kPoolColumns = 128;
// Rows that one partial sum of dbias and dquery is of.
constexpr int64_t kSumRows = 32;

struct AttentionPool : AttentionPoolForm {
  Dtype dtype;
  bool tf32;  // float32 may be multiplied in tf32
  Batch batch;
  // x, the weights and dh are read 16 bytes at a time: strides and widths are multiples of that.
  const void* x;
  int64_t x_sequence, x_row;         // strides in elements
  int64_t in_width, hidden_width;    // width and hidden rounded up: what follows in a row of x or the weights is zeros
  int64_t halves;                    // 2 with a gate, else 1
  const void *weight, *gate_weight;  // [hidden, in_width]
  float* parameters;                 // bias, gate_bias, then query: [2 + heads, padded_hidden], zeros behind the units that exist
  int64_t column_tiles, padded_hidden;
  bool wide, wide_kept;  // rows of width, and of hidden, begin at multiples of 16 bytes

  // Forward only. Chunks are numbered over the sequences, chunks of a padded batch's sequences by their length; of packed rows sequence b
  // has those from (its first row) / chunk_rows + b on, so that nobody need count them.
  int64_t chunk_rows, sequence_chunks, chunks;
  float* parts;  // [chunks, heads, width]: sum of e^(s - largest) x
  float2* ends;  // [chunks, heads]: sum of e^(s - largest), negative where no row exists, and the largest

  // Backward only.
  float *row_weights, *row_gradients;  // a and ds, [heads, x rows]
  int64_t wave_begin, wave_end;        // rows
  void* dh;                            // [wave's rows, halves, hidden_width]
  float* sums;                         // [x rows / kSumRows, 2 + heads, padded_hidden]: of dc, dz and ds u
  int64_t sum_blocks;
  void* packed_transposed;  // packed_transposed_bytes
  float* partials;          // [splits, halves * hidden_width, in_width]: dweight over split_rows rows of each wave
  int64_t splits, split_rows;
  void *dweight, *dgate_weight, *dquery, *dbias, *dgate_bias;  // or null
};

inline int64_t packed_transposed_bytes(const AttentionPool& p) {
  return round_up(p.width, 32) * p.halves * p.hidden_width * element_size(p.dtype);
}

extern "C" {

cudaError_t pykernels_cuda_attention_pool_parameters(const AttentionPool*, cudaStream_t);
// out, pooled, max_sum, scores, kept; then weights.
cudaError_t pykernels_cuda_attention_pool_forward(const AttentionPool*, cudaStream_t);

// delta, row_weights and row_gradients.
cudaError_t pykernels_cuda_attention_pool_backward_scores(const AttentionPool*, cudaStream_t);
// Packs the weights for dx.
cudaError_t pykernels_cuda_attention_pool_pack_transposed(const AttentionPool*, cudaStream_t);
// One wave: dh and its sums, and from it dx and the partial dweight.
cudaError_t pykernels_cuda_attention_pool_backward_hidden(const AttentionPool*, cudaStream_t);
cudaError_t pykernels_cuda_attention_pool_backward_input(const AttentionPool*, cudaStream_t);
cudaError_t pykernels_cuda_attention_pool_backward_weight(const AttentionPool*, cudaStream_t);
// dweight, dgate_weight; dbias, dgate_bias, dquery.
cudaError_t pykernels_cuda_attention_pool_reduce(const AttentionPool*, cudaStream_t);

}  // extern "C"

}  // namespace pykernels::cuda
