// The steps of the ChildTuning optimizers for PyTorch on the CPU. The arithmetic is in kernels/cpu.
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include "child_update_call.h"

namespace pykernels {
namespace {

void child_adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs, at::TensorList steps,
                  const OptionalTensors& masks, const OptionalTensors& runs, at::IntArrayRef streams, const OptionalTensor& grad_scale,
                  const OptionalTensor& found_inf, const OptionalTensor& square_sum, const at::Tensor& lr, const at::Tensor& weight_decay,
                  double beta1, double beta2, double eps, std::optional<double> reserve_p, double max_grad_norm, int64_t seed,
                  std::string_view where, std::string_view decay, std::string_view order, bool correct_bias, bool maximize,
                  bool stochastic_rounding) {
  ChildCall call({params, grads, steps, masks, runs, streams, grad_scale, found_inf, square_sum, lr, weight_decay, reserve_p, max_grad_norm,
                  seed, where, decay, maximize, stochastic_rounding});
  call.set_moments("exp_avgs", exp_avgs, 0);
  call.set_moments("exp_avg_sqs", exp_avg_sqs, 1);
  call.set_adamw({beta1, beta2, eps, order, correct_bias});
  if (call.skips()) return;
  std::vector<at::Tensor> moments(exp_avgs.begin(), exp_avgs.end());
  moments.insert(moments.end(), exp_avg_sqs.begin(), exp_avg_sqs.end());
  call.run(call.kernels->adamw, moments);
}

void child_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList steps,
                const OptionalTensors& masks, const OptionalTensors& runs, at::IntArrayRef streams, const OptionalTensor& grad_scale,
                const OptionalTensor& found_inf, const OptionalTensor& square_sum, const at::Tensor& lr, const at::Tensor& weight_decay,
                double momentum, double dampening, bool nesterov, std::optional<double> reserve_p, double max_grad_norm, int64_t seed,
                std::string_view where, std::string_view decay, bool maximize, bool stochastic_rounding) {
  ChildCall call({params, grads, steps, masks, runs, streams, grad_scale, found_inf, square_sum, lr, weight_decay, reserve_p, max_grad_norm,
                  seed, where, decay, maximize, stochastic_rounding});
  if (momentum != 0) call.set_moments("momentum_buffers", momentum_buffers, 0);
  call.set_sgd({momentum, dampening, nesterov});
  if (call.skips()) return;
  call.run(call.kernels->sgd, momentum != 0 ? momentum_buffers : at::TensorList());
}

at::Tensor square_sum(at::TensorList grads) { return at::scalar_tensor(child_square_sum(grads), at::kDouble); }

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("_child_adamw_", &child_adamw_);
  m.impl("_child_sgd_", &child_sgd_);
  m.impl("_child_square_sum", &square_sum);
}

}  // namespace pykernels
