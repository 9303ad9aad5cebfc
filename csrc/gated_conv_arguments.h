// The arguments of one call of gated_conv1d, checked, whatever the device.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <vector>

#include "arguments.h"
#include "gated_conv_form.h"

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

class GatedConvArguments {
 public:
  bool packed_rows() const { return x.dim() == 2; }
  bool value_first() const { return value_first_; }
  // [B, L', 2C] halves of cond and its gradient, [2C] halves of bias: where the value's and the gate's columns begin.
  int64_t value_column() const { return value_first_ ? 0 : c_out_; }
  int64_t gate_column() const { return value_first_ ? c_out_ : 0; }

  at::Tensor x;
  Dtype dtype{};
  std::vector<int64_t> out_shape;
  int64_t out_rows = 0, in_rows = 0;
  const void *value_weight = nullptr, *gate_weight = nullptr;

 protected:
  GatedConvArguments() = default;

  // Fill in `form`. They throw TypeError / ValueError with the argument's name, what was wanted and what came.
  void check(const GatedConvInputs& in, GatedConvForm& form);
  static void set_random(const GatedConvInputs& in, GatedConvForm& form);

  // Points form at a tensor [2, output rows, C_out]: the activated value, then the gate.
  void set_saved(void* saved, GatedConvForm& form) const;

  std::vector<at::Tensor> keep_;  // contiguous copies that the form points into

 private:
  void check_shapes(const GatedConvInputs& in, GatedConvForm& form);
  void find_weights(const GatedConvInputs& in, GatedConvForm& form);
  void find_cond(const GatedConvInputs& in, GatedConvForm& form);
  const char* contiguous(const OptionalTensor& t);

  bool value_first_ = true;
  int64_t c_out_ = 0;
};

}  // namespace pykernels
