// One step of a ChildTuning optimizer: its arguments checked, and seen as the CPU kernels see them.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "arguments.h"
#include "child_update.h"

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

class ChildCall {
 public:
  // Throws TypeError / ValueError with the argument's name, what was wanted and what came. Nothing is written before run.
  explicit ChildCall(const ChildInputs& inputs);

  // Moments number `which` of each tensor, 0 or 1: contiguous, for all its elements or for the selected ones.
  void set_moments(const char* name, at::TensorList moments, int which);
  // Whether there is nothing to do, since some gradient was not finite.
  bool skips() const { return skips_; }
  // Number of tensor i's step, from 1.
  int64_t step_of(size_t i) const { return tensors[i].step; }
  void run(ChildKernels::Update update, at::TensorList changed);

  const ChildKernels* kernels;
  ChildArgs args{};
  std::vector<ChildTensor> tensors;
  double lr, weight_decay;

 private:
  struct Unit {
    size_t tensor;
    int64_t first, count, selected;
  };

  void add_tensor(const ChildInputs& in, size_t i);
  void set_mask(ChildTensor& t, const at::Tensor& mask, int64_t numel);
  void set_runs(ChildTensor& t, const at::Tensor& runs, int64_t numel);
  void set_factors(const ChildInputs& in);
  void count_selected();

  const ChildInputs in_;
  at::ScalarType moment_type_;
  bool skips_ = false;
  std::vector<Unit> units_;
  std::vector<int64_t> selected_;                          // of each tensor with a mask
  std::vector<at::Tensor> keep_;                           // what the tensors point into
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // parameters that are not contiguous, and what stands for them
};

// Sum of squares of all elements, summed in the same order whatever the number of threads.
double child_square_sum(at::TensorList grads);

}  // namespace pykernels
