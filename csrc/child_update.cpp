// The steps of the ChildTuning optimizers for PyTorch on the CPU. The arithmetic is in kernels/cpu.
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>

#include "child_update_call.h"

namespace pykernels {
namespace {

void check_fraction(const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0 && value < 1, name, ": expected 0 <= ", name, " < 1, got ", value);
}

void child_adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs, at::TensorList steps,
                  const OptionalTensors& masks, const OptionalTensors& runs, at::IntArrayRef streams, const OptionalTensor& grad_scale,
                  const OptionalTensor& found_inf, const OptionalTensor& square_sum, const at::Tensor& lr, const at::Tensor& weight_decay,
                  double beta1, double beta2, double eps, std::optional<double> reserve_p, double max_grad_norm, int64_t seed,
                  std::string_view where, std::string_view decay, std::string_view order, bool correct_bias, bool maximize,
                  bool stochastic_rounding) {
  ChildCall call({params, grads, steps, masks, runs, streams, grad_scale, found_inf, square_sum, lr, weight_decay, reserve_p, max_grad_norm,
                  seed, where, decay, maximize, stochastic_rounding});
  check_fraction("beta1", beta1);
  check_fraction("beta2", beta2);
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, "eps: expected a finite number >= 0, got ", eps);
  const bool hf = choose<bool>("order", order, {{"torch", false}, {"hf", true}});
  call.set_moments("exp_avgs", exp_avgs, 0);
  call.set_moments("exp_avg_sqs", exp_avg_sqs, 1);
  if (call.skips()) return;

  call.args.beta1 = beta1;
  call.args.beta2 = beta2;
  call.args.eps = eps;
  call.args.before = hf ? 1 : 1 - call.lr * call.weight_decay;
  call.args.after = hf ? call.lr * call.weight_decay : 0;
  for (ChildTensor& t : call.tensors) {
    const double step = t.step;
    const double correction1 = correct_bias ? 1 - std::pow(beta1, step) : 1;
    const double root2 = correct_bias ? std::sqrt(1 - std::pow(beta2, step)) : 1;
    t.step_size = call.lr / correction1 * (hf ? root2 : 1);
    t.root_scale = hf ? 1 : 1 / root2;
  }
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
  TORCH_CHECK_VALUE(std::isfinite(momentum) && momentum >= 0, "momentum: expected a finite number >= 0, got ", momentum);
  TORCH_CHECK_VALUE(std::isfinite(dampening), "dampening: expected a finite number, got ", dampening);
  TORCH_CHECK_VALUE(!nesterov || (momentum > 0 && dampening == 0),
                    "nesterov: expected a momentum and no dampening, got momentum = ", momentum, " and dampening = ", dampening);
  if (momentum != 0) call.set_moments("momentum_buffers", momentum_buffers, 0);
  for (size_t i = 0; i < call.tensors.size(); i++) {
    TORCH_CHECK_VALUE(!call.tensors[i].compact || call.weight_decay == 0 || call.args.reserved_decay, "momentum_buffers[", i,
                      "]: expected one for each element where all of them decay, got those that the mask selects");
    call.tensors[i].first = call.tensors[i].step == 1;
  }
  if (call.skips()) return;

  // Decay is a part of SGD's update: masks of gradients leave it to all elements.
  if (!reserve_p) call.args.mask_update = where == "update";
  call.args.lr = call.lr;
  call.args.weight_decay = call.weight_decay;
  call.args.momentum = momentum;
  call.args.gain = 1 - dampening;
  call.args.nesterov = nesterov;
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
