// One call of gated_conv1d: its arguments checked, and seen as the CPU kernels see them. Shared by forward and backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <vector>

#include "arguments.h"
#include "gated_conv.h"

namespace pykernels {

// The arguments that forward and backward have in common, in the order of their schemas.
struct GatedConvInputs {
  const at::Tensor& x;
  const at::Tensor& weight;
  const OptionalTensor &bias, &gate_weight, &gate_bias, &cond, &mask, &lengths, &cu_seqlens, &seed;
  int64_t dilation;
  std::string_view padding, residual, value_act, split;
  double gate_dropout, gate_noise;
};

class GatedConvCall {
 public:
  // Throws TypeError / ValueError with the argument's name, what was wanted and what came.
  explicit GatedConvCall(const GatedConvInputs& inputs);

  bool packed_rows() const { return x.dim() == 2; }
  bool value_first() const { return value_first_; }
  // [B, L', 2C] halves of cond and its gradient, [2C] halves of bias: where the value's and the gate's columns begin.
  int64_t value_column() const { return value_first_ ? 0 : args.c_out; }
  int64_t gate_column() const { return value_first_ ? args.c_out : 0; }

  // Points args at a tensor [2, output rows, C_out]: the activated value, then the gate.
  void set_saved(void* saved);

  // Rows of a block such that its panel of `channels` stays in L2 and all threads find work. Never changes a result.
  int64_t block_rows(int64_t total_rows, int64_t channels) const;

  at::Tensor x;
  Dtype dtype;
  const GatedConvKernels* kernels;
  GatedConvArgs args{};
  std::vector<Sequence> sequences;
  std::vector<int64_t> out_shape;
  int64_t out_rows = 0, in_rows = 0;
  const void *value_weight = nullptr, *gate_weight = nullptr;

 private:
  void check_shapes(const GatedConvInputs& in);
  void lay_out_sequences(const GatedConvInputs& in);
  void set_random(const GatedConvInputs& in);

  bool value_first_ = true;
  std::vector<at::Tensor> keep_;  // contiguous copies that args points into
};

// The whole forward pass into call.args.y and saved_*. Without prepacked weights they are packed inside.
void gated_conv_forward(const GatedConvCall& call, const void* prepacked);

}  // namespace pykernels
