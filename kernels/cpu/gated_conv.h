// gated_conv1d on the CPU: what csrc/gated_conv*.cpp call. One table of functions for each tier and dtype.
//
//   h[t] = bias + cond[t] + sum over k of W[:, :, k] x[t + k * dilation - left]        c, z = value and gate half of h
//   g = sigmoid(random(z))     v = act(c)     y[t] = blend(x[t + shift], v, g)
//
// Work is cut into blocks of rows of one sequence. Every element of an output is summed by one block in one fixed order, and partial sums
// over blocks are added in the order of the blocks, so that no result depends on who runs which block. A unit of work is one block, or
// several whole sequences that are shorter than a register tile is high, so that their rows follow each other in the flattened tensors.
// (For backward_weight any blocks.)
#pragma once

#include "../gated_conv_form.h"
#include "blocks.h"
#include "tiers.h"

namespace pykernels {

struct GatedConvArgs : GatedConvForm {
  const Sequence* sequences;
  int64_t x_row, x_column;  // strides of x in elements

  // Backward only.
  const void* dy;                  // [out rows, c_out]
  void* dh;                        // rows of 2 * dh_half panel elements: d(value), zeros, d(gate logit), zeros
  int64_t dh_half;                 // c_out rounded up to depth_unit
  int64_t dh_row;                  // elements from row to row of dh
  void *value_dcond, *gate_dcond;  // one row of c_out per output row at distance dcond_row, or null
  int64_t dcond_row;
  void* dx;  // [in rows, c_in]
};

// In all functions `packed` is where column block `begin` lies. Sizes are in bytes and counts in elements; `blocks` are column blocks of
// `columns` outputs each (2 * columns for backward_input).
struct GatedConvKernels {
  int64_t row_tile;    // rows of a register tile
  int64_t columns;     // lanes of a vector
  int64_t panel_size;  // bytes of a panel element
  int64_t sum_size;    // bytes of an accumulator
  int64_t depth_unit;  // inner dimensions are padded to multiples of this

  // Forward. Packs the weights [c_out, c_in, taps] of value and gate, column blocks [begin, end), the first of them at `packed`.
  int64_t (*packed_bytes)(int64_t c_out, int64_t c_in, int64_t taps);
  void (*pack)(void* packed, const void* value_weight, const void* gate_weight, int64_t c_out, int64_t c_in, int64_t taps, int64_t begin,
               int64_t end);
  // What all columns need of the rows of some blocks is prepared once; forward multiplies it with column blocks [begin, end).
  int64_t (*forward_rows_bytes)(const GatedConvArgs&, int64_t rows);
  void (*prepare_forward)(const GatedConvArgs&, const Blocks&, void* prepared);
  void (*forward)(const GatedConvArgs&, const void* packed, const Blocks&, int64_t begin, int64_t end, const void* prepared);

  // Backward, in this order. gate: dh, dcond and the sums of dh over the block's rows, sums [2 * c_out].
  int64_t (*backward_gate_scratch)(const GatedConvArgs&, int64_t rows);
  void (*backward_gate)(const GatedConvArgs&, const Block&, void* sums, void* scratch);
  // One row of sums over blocks, in their order: sums [count, 2 * c_out] to a row of the value's and a row of the gate's columns.
  void (*reduce_sums)(const GatedConvArgs&, const void* sums, int64_t count, void* value_to, void* gate_to);
  // dx from dh and the weights packed with their roles exchanged.
  int64_t (*packed_transposed_bytes)(int64_t c_out, int64_t c_in, int64_t taps);
  void (*pack_transposed)(void* packed, const void* value_weight, const void* gate_weight, int64_t c_out, int64_t c_in, int64_t taps,
                          int64_t begin, int64_t end);
  int64_t (*backward_input_bytes)(const GatedConvArgs&, int64_t rows);
  void (*prepare_backward_input)(const GatedConvArgs&, const Blocks&, void* prepared);
  void (*backward_input)(const GatedConvArgs&, const void* packed, const Blocks&, int64_t begin, int64_t end, const void* prepared);
  // Partial weight gradients: the rows of some blocks make, or with `add` are added to, column blocks [begin, end) of `partial`, counted
  // over blocks of c_in x taps.
  int64_t (*weight_column_blocks)(const GatedConvArgs&);
  int64_t (*partial_elements)(const GatedConvArgs&);
  int64_t (*backward_weight_scratch)(const GatedConvArgs&, int64_t rows);
  void (*backward_weight)(const GatedConvArgs&, const Blocks&, void* partial, bool add, int64_t begin, int64_t end, void* scratch);
  // Rows [begin, end) of the 2 * c_out of dweight = the sum of `partials` in their order.
  void (*reduce_weight)(const GatedConvArgs&, const void* partials, int64_t count, void* value_dweight, void* gate_dweight, int64_t begin,
                        int64_t end);
  // Both in one, where all rows are in these blocks: blocks [begin, end) of c_in, whose sums stay in a core's own cache.
  int64_t (*whole_weight_scratch)(const GatedConvArgs&, int64_t rows);
  void (*whole_weight)(const GatedConvArgs&, const Blocks&, void* value_dweight, void* gate_dweight, int64_t begin, int64_t end,
                       void* scratch);
};

// The tier's kernels for a dtype, null for one that it does not serve. bf16_products: float32 may be multiplied in bf16.
PYKERNELS_IN_EVERY_TIER(const GatedConvKernels* gated_conv_kernels(Dtype, bool bf16_products);)

}  // namespace pykernels
