// attention_pool on the CPU: what csrc/attention_pool*.cpp call. One table of functions for each tier and dtype.
//
//   u[l] = act(W x[l] + bias) * sigmoid(V x[l] + gate_bias)        s[j, l] = query[j] . u[l]
//   a[j] = softmax of s[j] over the live rows of a sequence         out[j] = sum over l of a[j, l] x[l]
//
// Rows are cut into chunks of one sequence, from its first live row on. A chunk is pooled by itself, against its own largest score, and the
// chunks of a sequence are put together in their order: what a sequence gives depends neither on who runs which chunk, nor on padding, nor
// on the rest of the batch. Masked rows are never read: the live rows of a chunk are listed, and only these are multiplied.
#pragma once

#include "../attention_pool_form.h"
#include "blocks.h"
#include "tiers.h"

namespace pykernels {

// Tensors of the arithmetic type (double for double, else float) are marked C, the others have the type of x.
struct AttentionPoolArgs : AttentionPoolForm {
  const Sequence* sequences;
  int64_t x_row, x_column;  // strides of x in elements

  const Block* chunks;   // all of them, in order; a chunk's place is where its partial result lies
  void* parts;           // C [chunks, heads, width + 2]: sum of e^(s - m) x, sum of e^(s - m), m
  const uint8_t* alone;  // per sequence: it has one chunk, which finishes it

  // Backward only: dh has rows of `halves` (1, or 2 with a gate) times dh_half panel elements: d(Wx), zeros, d(Vx), zeros.
  int64_t dh_half, dh_row;
};

// In all functions `packed` is where column block `begin` lies. Sizes are in bytes and counts in elements.
struct AttentionPoolKernels {
  int64_t row_tile;    // rows of a register tile
  int64_t row_pad;     // rows of dh are read in groups of this many
  int64_t panel_size;  // bytes of a panel element
  int64_t sum_size;    // bytes of C
  int64_t depth_unit;  // inner dimensions are padded to multiples of this

  // Forward. Column blocks hold the outputs of weight [hidden, width] that share a register tile: two vectors, or one of each weight.
  int64_t (*column_blocks)(const AttentionPoolArgs&);
  int64_t (*packed_bytes)(const AttentionPoolArgs&);  // of one of them
  void (*pack)(const AttentionPoolArgs&, void* packed, const void* weight, const void* gate_weight, int64_t begin, int64_t end);
  int64_t (*forward_scratch)(const AttentionPoolArgs&, int64_t rows, int64_t chunks);
  void (*forward)(const AttentionPoolArgs&, const void* packed, const Blocks& chunks, void* scratch);
  // Puts `count` chunks of a sequence together, which begin at chunk `first`.
  void (*combine)(const AttentionPoolArgs&, int64_t sequence, int64_t first, int64_t count);
  // a from s and max_sum, for one sequence.
  void (*normalize)(const AttentionPoolArgs&, int64_t sequence);

  // Backward, in this order.
  void (*backward_delta)(const AttentionPoolArgs&, int64_t sequence);
  int64_t (*input_column_blocks)(const AttentionPoolArgs&);
  int64_t (*packed_transposed_bytes)(const AttentionPoolArgs&);  // of one of them
  void (*pack_transposed)(const AttentionPoolArgs&, void* packed, const void* weight, const void* gate_weight, int64_t begin, int64_t end);
  // dh, dx where it is wanted, and the sums over the chunks' rows: sums [sum_elements] = dbias, dgate_bias, dquery.
  int64_t (*sum_elements)(const AttentionPoolArgs&);
  int64_t (*backward_scratch)(const AttentionPoolArgs&, int64_t rows, int64_t chunks);
  void (*backward_rows)(const AttentionPoolArgs&, const void* packed, const void* packed_transposed, const Blocks& chunks, void* dh,
                        void* sums, void* scratch);
  // Sums over units of work, in their order. Any of the results may be null.
  void (*reduce_sums)(const AttentionPoolArgs&, const void* sums, int64_t count, void* dbias, void* dgate_bias, void* dquery);
  // Partial weight gradients over column blocks [begin, end) of x, from what backward_rows left in dh.
  int64_t (*partial_elements)(const AttentionPoolArgs&);
  int64_t (*backward_weight_scratch)(const AttentionPoolArgs&, int64_t rows, int64_t chunks);
  void (*backward_weight)(const AttentionPoolArgs&, const Blocks& chunks, const void* dh, void* partial, bool add, int64_t begin,
                          int64_t end, void* scratch);
  // Rows [begin, end) of dweight, then of dgate_weight = the sum of `partials` in their order.
  void (*reduce_weight)(const AttentionPoolArgs&, const void* partials, int64_t count, void* dweight, void* dgate_weight, int64_t begin,
                        int64_t end);
};

// The tier's kernels for a dtype, null for one that it does not serve. bf16_products: float32 may be multiplied in bf16.
PYKERNELS_IN_EVERY_TIER(const AttentionPoolKernels* attention_pool_kernels(Dtype, bool bf16_products);)

}  // namespace pykernels
