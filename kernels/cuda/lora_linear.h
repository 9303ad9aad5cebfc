// lora_linear on CUDA devices: what csrc/cuda/lora_linear.cpp calls. kernels/cpu/lora_linear.h has the formula, lora_linear_bwd.cpp there
// the derivatives.
//
// Both passes are a shrink, S = drop(x) A^T or dS = dy B, and a product with the frozen weight into whose sums the low-rank term is
// multiplied first, as more of the inner dimension: no tensor of the output's size exists besides the output. Factors of 16 bits are
// sums of terms of 16 bits, so that tensor cores multiply what float32 holds: two for S, three where the adapter itself is float32.
// Every function puts kernels on the stream and returns the first error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../lora_linear_form.h"
#include "batch.h"

namespace pykernels::cuda {

// Of one call, whatever is computed.
struct LoraCall : LoraLinearForm {
  Dtype dtype;
  bool float_adapters;  // else of dtype
  bool tf32;            // float32 may be multiplied in tf32
  // Row r has adapter number index[r / rows_per_index]; one outside of [0, adapters) is none. Null: all rows have adapter 0.
  const void* index;
  bool wide_index;  // int64, else int32
  int64_t rows_per_index;
  float scale;          // of all adapters, unless
  const float* scales;  // [adapters]
};

// Rows that are read 16 bytes at a time: address and distance are multiples of that, and `width` elements, zeros behind the tensor's own.
struct LoraRows {
  const void* data;
  int64_t row, width;
};

// An adapter's factor f[e][o][r] of an outer dimension, K or N, and the rank, at base + e outer rank + o outer_stride + r rank_stride.
struct LoraFactor {
  const void* data;
  int64_t outer, outer_stride, rank_stride;
};

// Terms of float32 values in 16 bits: of a factor that rows are shrunk with, of rows and factor in the product, of rows in sums over rows.
inline int64_t shrink_terms(const LoraCall& c) { return element_size(c.dtype) == 2 && c.float_adapters ? 3 : 1; }
inline int64_t expand_terms(const LoraCall& c) { return element_size(c.dtype) == 4 ? 1 : c.float_adapters ? 3 : 2; }
inline int64_t expand_width(const LoraCall& c) { return width_of(expand_terms(c) * c.rank, c.dtype); }

// [adapters, shrink_terms * rank, width] of a factor for the shrink, or [adapters, outer, expand_width] for the product.
struct LoraArrange {
  LoraCall call;
  LoraFactor factor;
  bool expand;
  int64_t width;
  void* to;
  // [adapters], zeros, or null. A tile multiplies the rows of other adapters by zero, which what is not finite would make NaN of: such
  // elements are kept as zeros and their adapter is marked here.
  int32_t* broken;
};

constexpr int64_t kMostWhole = 64;

// Rows times a factor, and what follows from it: v = multiplier * (rows, dropped out of if `drop`) factor^T.
struct LoraShrink {
  LoraCall call;
  LoraRows rows;
  bool drop;
  const void* factor;  // arranged
  // [splits, rows, shrink_terms * rank]: over split_width columns each. Null: one split, and at most kMostWhole such columns, whose results
  // are written at once, by pykernels_cuda_lora_linear_shrink.
  float* partials;
  int64_t splits, split_width;
  float multiplier;
  // What arranging marked of the factor here and of that in the product, or null: rows of these adapters are NaN.
  const int32_t *broken, *expand_broken;
  // Results, each null or [rows, ...]. The last two have the adapter's scale.
  float* v;        // [rank]
  void* expanded;  // [expand_width]: for the product
  void* summed;    // [expand_width]: for sums over rows
};

// out = bias + rows weight^T + drop(expanded factor^T), the drop only if `drop`; added to out if `add`.
struct LoraProduct {
  LoraCall call;
  LoraRows rows;
  LoraRows weight;  // [columns, depth], or [depth, columns] if columns_adjacent
  bool columns_adjacent;
  int64_t columns, depth;
  const void* expanded;  // [rows, expand_width], or null: no low-rank term
  const void* factor;    // [adapters, columns, expand_width]
  int64_t expand_width;
  bool drop, add;
  const void* bias;  // [columns] or null
  void* out;         // [rows, columns]
  bool wide;         // out and bias may be accessed 16 bytes at a time
};

// to[e][a][b] = sum over the rows of adapter e of a_rows[row][a] b_rows[row][b], or over all rows with adapters = 1 and no index.
struct LoraSums {
  LoraCall call;
  LoraRows a, b;  // drop: of a
  bool drop;
  int64_t a_columns, b_columns, b_terms;  // b has b_terms terms of b_columns values
  float* partials;                        // [splits, adapters, a.width, b.width], over split_rows rows each
  int64_t splits, split_rows;
  bool float_result;
  void* to;
  int64_t a_stride, b_stride;  // in elements; e has a_columns * b_columns
};

// Up to kFewRows rows against a weight [out, in], read once: y = x W^T + bias + scale S B^T.
constexpr int64_t kFewRows = 8;
struct LoraFew {
  LoraCall call;
  LoraRows x;
  const void *lora_a, *lora_b;  // [adapters, rank, in], [adapters, out, rank]
  bool wide_a;                  // lora_a may be read 16 bytes at a time
  const void* weight;           // [out, in]
  const void* bias;
  float* s;  // [rows, rank]
  void* y;
  bool wide;  // weight and x may be read 16 bytes at a time
};

extern "C" {

cudaError_t pykernels_cuda_lora_linear_arrange(const LoraArrange*, cudaStream_t);
cudaError_t pykernels_cuda_lora_linear_shrink(const LoraShrink*, cudaStream_t);
// The results of a shrink from v, which is in its place as the only partial.
cudaError_t pykernels_cuda_lora_linear_spread(const LoraShrink*, cudaStream_t);
cudaError_t pykernels_cuda_lora_linear_product(const LoraProduct*, cudaStream_t);
cudaError_t pykernels_cuda_lora_linear_sums(const LoraSums*, cudaStream_t);
// Both at once, where the shrink's rows are the sums' a and the sums' rows are cut at multiples of 64.
cudaError_t pykernels_cuda_lora_linear_shrink_and_sums(const LoraShrink*, const LoraSums*, cudaStream_t);
cudaError_t pykernels_cuda_lora_linear_few(const LoraFew*, cudaStream_t);

}  // extern "C"

}  // namespace pykernels::cuda
