// The arguments of one step of a ChildTuning optimizer, checked, whatever the device.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "arguments.h"
#include "child_update_form.h"

namespace pykernels {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// What both optimizers' steps have in common, in the order of their schemas.
struct ChildInputs {
  at::TensorList params, grads;
  at::TensorList steps;
  const OptionalTensors &masks, &runs;
  at::IntArrayRef streams;
  const OptionalTensor &grad_scale, &found_inf, &square_sum;
  const at::Tensor &lr, &weight_decay;
  std::optional<double> reserve_p;
  double max_grad_norm;
  int64_t seed;
  std::string_view where, decay;
  bool maximize, stochastic_rounding;
};

struct AdamWInputs {
  double beta1, beta2, eps;
  std::string_view order;
  bool correct_bias;
};

struct SgdInputs {
  double momentum, dampening;
  bool nesterov;
};

// float32, bfloat16, float16 or float64, of the first of the tensors; TypeError for others.
Dtype dtype_of_params(at::TensorList params);

class ChildArguments {
 public:
  // Whether there is nothing to do, since some gradient was not finite.
  bool skips() const { return skips_; }

  // The rest of args and tensors, once the moments are known.
  void set_adamw(const AdamWInputs& rule);
  void set_sgd(const SgdInputs& rule);

  Dtype dtype;
  ChildArgs args{};
  std::vector<ChildTensor> tensors;

 protected:
  // Throws TypeError / ValueError with the argument's name, what was wanted and what came. Nothing is written. device_norm: square_sum
  // stays where it is, and args.grad_factor is without the clipping that follows from it.
  ChildArguments(const ChildInputs& inputs, bool device_norm);

  // What all moments must be: dtype, device, contiguous.
  void check_moments(const char* name, at::TensorList moments) const;
  static void* elements_of(const at::Tensor& moment);
  // To be called when the parameters have been written.
  void finish(at::TensorList changed);

  const ChildInputs in_;
  std::vector<at::Tensor> keep_;  // what the tensors point into

 private:
  void add_tensor(size_t i);
  void set_mask(ChildTensor& t, const at::Tensor& mask, int64_t numel);
  void set_runs(ChildTensor& t, const at::Tensor& runs, int64_t numel);
  void set_factors(bool device_norm);

  double lr_, weight_decay_;
  bool skips_ = false;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // parameters that are not contiguous, and what stands for them
};

}  // namespace pykernels
