// One call of attention_pool as the kernels of every device see it.
#pragma once

#include <cstdint>

namespace pykernels {

enum class PoolAct : uint8_t { tanh, swish, relu, gelu };

// Tensors of the arithmetic type (double for double, else float) are marked C, the others have the type of x.
struct AttentionPoolForm {
  int64_t width, hidden, heads;
  PoolAct act;
  bool gated;

  const void *query, *bias, *gate_bias;  // [heads, hidden], [hidden] or null

  void* out;      // [sequences, heads, width]
  void* pooled;   // the same before it is rounded, C; null where out is C
  void* max_sum;  // the largest s, and the sum of e^(s - largest), C [sequences, heads, 2]
  void* scores;   // s, C, or null: a sequence's first row, head and row are score_row, score_head and one apart
  void* weights;  // a, likewise, or null
  int64_t score_row, score_head;
  void* kept;  // Wx + bias, then Vx + gate_bias: [x rows, hidden or 2 hidden], for backward; null: it computes them again

  // Backward only.
  const void* dout;       // [sequences, heads, width] or null
  const void* dscores;    // of the returned scores, C, laid out as scores, or null
  bool softmax_returned;  // dscores is the gradient of a, not of s
  void* delta;            // C [sequences, heads]: sum over l of a[l] da[l]
  void* dx;               // [x rows, width] or null
};

}  // namespace pykernels
