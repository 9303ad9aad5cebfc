// The arguments of one call of lora_linear, checked, whatever the device.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "arguments.h"
#include "lora_linear_form.h"

namespace pykernels {

// The arguments that forward and backward have in common, in the order of their schemas.
struct LoraLinearInputs {
  const at::Tensor &x, &weight, &lora_a, &lora_b;
  const OptionalTensor &bias, &scales, &adapter_index, &seed;
  double scale, dropout;
};

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Those of several projections of one x.
struct StackedInputs {
  const at::Tensor& x;
  at::TensorList weights, lora_a, lora_b;
  const OptionalTensors& biases;
  const OptionalTensor& seed;
  at::ArrayRef<double> scales;
  double dropout;
};

class LoraLinearArguments {
 public:
  // dy, and what forward returned for backward: s, and `keep_bytes` of keep.
  void check_incoming(const at::Tensor& dy, const at::Tensor& s, const at::Tensor& keep, int64_t keep_bytes) const;

  Dtype dtype{};
  at::ScalarType sum_type{};
  std::vector<int64_t> out_shape;

 protected:
  LoraLinearArguments() = default;

  // Fill in `form`. They throw TypeError / ValueError with the argument's name, what was wanted and what came.
  void check(const LoraLinearInputs& in, LoraLinearForm& form);
  static void set_dropout(const LoraLinearInputs& in, LoraLinearForm& form);

  std::vector<at::Tensor> keep_;  // what the kernels' arguments point into

 private:
  int64_t rank_ = 0;
  at::ScalarType x_type_{};
};

// The projections of a stacked call: as many of each.
size_t check_stacked(const StackedInputs& in);
// What the backward of a stacked call is given for each projection: dy, s and keep, and for dx and each parameter whether it is needed.
void check_stacked_incoming(size_t count, size_t dys, size_t saved, size_t needs);

// A tensor's rows [rows, columns] with adjacent columns: a view where there is one.
at::Tensor rows_of(const at::Tensor& t, int64_t columns);

// An empty tensor like `like`, or like x of no elements where the gradient is not needed.
at::Tensor gradient_like(bool needed, const OptionalTensor& like, const at::Tensor& x);

}  // namespace pykernels
