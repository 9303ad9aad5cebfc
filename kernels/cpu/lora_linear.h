// lora_linear on the CPU: what csrc/lora_linear*.cpp call. One table of functions for each tier and dtype.
//
//   y[m] = W x[m] + bias + B (A drop(x[m]))        B carries the scale; each row may have its own adapter (A, B), or none
//
// The base product takes rows by column blocks of packed weights, and its epilogue adds the low-rank term in the arithmetic type while the
// accumulators are at hand. Few rows are multiplied with the weights as they lie, so that one row costs one reading of them.
#pragma once

#include "../lora_linear_form.h"
#include "blocks.h"
#include "tiers.h"

namespace pykernels {

// Tensors of the arithmetic type (double for double, else float) are marked C, the others have the type of x.
struct LoraLinearArgs : LoraLinearForm {
  const void* x;  // [rows, in], columns adjacent
  int64_t x_row;
  const void* weight;  // [out, in], or [in, out] with weight_transposed
  bool weight_transposed;
  const void* bias;  // [out] or null
  void* y;           // [rows, out]

  const int64_t* adapter_of;  // of each row, -1 for none; null where all rows have adapter 0
  const void* a;              // C [adapters, rank, a_row], zeros behind in
  const void* b;              // C [adapters, rank, b_row]: B transposed, times the scale; zeros behind out
  int64_t a_row, b_row;       // multiples of two vectors
  void* s;                    // C [rows, rank]: A drop(x)

  // The bits of dropout: keep_row bytes a row, and one byte behind the last.
  uint8_t* keep;  // null without dropout
  int64_t keep_row;

  // Backward only.
  const void* dy;  // [rows, out], columns adjacent
  int64_t dy_row;
  void* ds;  // C [rows, rank]: B^T dy
  void* dx;  // [rows, in] or null
  bool add_to_dx;
};

// A and B as they come: contiguous [adapters, rank, in] and [adapters, out, rank], of x's type or float, with a scale for each.
struct LoraAdapters {
  const void *a, *b;
  bool is_float;
  const double* scales;
};

// Rows [first, first + count) are what a unit of work has. Sizes are in bytes and counts in elements.
struct LoraLinearKernels {
  int64_t row_tile;    // rows of a register tile
  int64_t panel_size;  // bytes of a panel element
  int64_t sum_size;    // bytes of C
  int64_t few_rows;    // up to so many are multiplied without packing

  // A and B of some adapters as the kernels read them, and back: the sums of `count` partial gradients, da [adapters, rank, in] before
  // db [adapters, rank, out] before dbias [out] in each. Results may be null.
  void (*arrange)(const LoraLinearArgs&, const LoraAdapters&, void* a, void* b);
  int64_t (*partial_elements)(const LoraLinearArgs&);
  void (*reduce_adapters)(const LoraLinearArgs&, const LoraAdapters&, void* partials, int64_t count, void* da, void* db, void* dbias);

  void (*keep_bits)(const LoraLinearArgs&, int64_t first, int64_t count);
  // s of some rows, from x and keep.
  void (*shrink)(const LoraLinearArgs&, int64_t first, int64_t count);

  // y = base product and epilogue. Column blocks hold two vectors of outputs.
  int64_t (*column_blocks)(int64_t columns);
  int64_t (*packed_bytes)(int64_t depth);  // of one of them
  void (*pack)(const LoraLinearArgs&, void* packed, int64_t begin, int64_t end);
  // Rows of x, or of dy, as products take them, whichever the columns: of [total, columns] at distance row_stride.
  int64_t (*prepared_bytes)(int64_t rows, int64_t columns);
  void (*prepare)(const void* data, int64_t row_stride, int64_t columns, int64_t total, int64_t first, int64_t count, void* prepared);
  void (*forward)(const LoraLinearArgs&, const void* packed, int64_t first, int64_t count, int64_t begin, int64_t end,
                  const void* prepared);
  // The same for all rows and outputs [begin, end), a multiple of 32 but for the last: few rows, and weights as they lie.
  int64_t (*few_scratch)(int64_t rows, int64_t depth, int64_t outputs);
  void (*forward_few)(const LoraLinearArgs&, int64_t begin, int64_t end, void* scratch);

  // Backward, in this order: ds, then what rows add to the gradients of the adapters and of the bias.
  void (*backward_shrink)(const LoraLinearArgs&, int64_t first, int64_t count);
  void (*backward_adapters)(const LoraLinearArgs&, int64_t first, int64_t count, void* partial, bool want_a, bool want_b, bool want_bias);
  void (*pack_transposed)(const LoraLinearArgs&, void* packed, int64_t begin, int64_t end);
  void (*backward_input)(const LoraLinearArgs&, const void* packed, int64_t first, int64_t count, int64_t begin, int64_t end,
                         const void* prepared);
  void (*backward_input_few)(const LoraLinearArgs&, int64_t begin, int64_t end, void* scratch);
  // Partial weight gradients [out, in] over column blocks [begin, end) of x, and their sum for rows [begin, end) of dweight.
  int64_t (*weight_partial_elements)(const LoraLinearArgs&);
  int64_t (*backward_weight_scratch)(const LoraLinearArgs&, int64_t rows);
  void (*backward_weight)(const LoraLinearArgs&, int64_t first, int64_t count, void* partial, bool add, int64_t begin, int64_t end,
                          void* scratch);
  void (*reduce_weight)(const LoraLinearArgs&, const void* partials, int64_t count, void* dweight, int64_t begin, int64_t end);
};

// The tier's kernels for a dtype, null for one that it does not serve. bf16_products: float32 may be multiplied in bf16.
PYKERNELS_IN_EVERY_TIER(const LoraLinearKernels* lora_linear_kernels(Dtype, bool bf16_products);)

}  // namespace pykernels
