// The arguments of one call of attention_pool, checked, whatever the device.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <vector>

#include "arguments.h"
#include "attention_pool_form.h"

namespace pykernels {

// The arguments that forward and backward have in common, in the order of their schemas.
struct AttentionPoolInputs {
  const at::Tensor &x, &weight, &query;
  const OptionalTensor &bias, &gate_weight, &gate_bias, &mask, &lengths, &cu_seqlens;
  std::string_view activation, return_scores;
};

// What backward is given besides: incoming gradients, and what forward returned for it.
struct AttentionPoolSaved {
  const OptionalTensor &dout, &dscores;
  const at::Tensor &scores, &max_sum, &pooled;
  const OptionalTensor& kept;
};

class AttentionPoolArguments {
 public:
  enum class Returned : uint8_t { none, raw, softmax };

  bool packed_rows() const { return x.dim() == 2; }
  int64_t batch() const { return out_shape.front(); }

  at::Tensor x;
  Dtype dtype{};
  Returned returned{};
  at::ScalarType sum_type{};  // of scores and sums
  std::vector<int64_t> out_shape, score_shape, kept_shape;
  const void *weight = nullptr, *gate_weight = nullptr;

 protected:
  AttentionPoolArguments() = default;

  // Fill in `form`. They throw TypeError / ValueError with the argument's name, what was wanted and what came.
  void check(const AttentionPoolInputs& in, AttentionPoolForm& form);
  void check_saved(const AttentionPoolSaved& saved, AttentionPoolForm& form);

  std::vector<at::Tensor> keep_;  // contiguous copies that the form points into

 private:
  void check_shapes(const AttentionPoolInputs& in, AttentionPoolForm& form);
  void find_shapes(const AttentionPoolInputs& in, AttentionPoolForm& form);
  const void* contiguous(const OptionalTensor& t);
};

}  // namespace pykernels
