#include "child_update_arguments.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <cmath>

namespace pykernels {
namespace {

constexpr double kMostSteps = 1 << 24;  // float32 counts no further

std::string indexed(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

double number(const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.is_floating_point(), name, ": expected a floating dtype, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.numel() == 1, name, ": expected one number, got shape ", t.sizes());
  return t.item<double>();
}

double rate(const char* name, const at::Tensor& t) {
  const double value = number(name, t);
  TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0, name, ": expected a finite number >= 0, got ", value);
  return value;
}

void check_dense(const std::string& name, const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, name, ": expected a dense tensor, got ", t.layout());
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, ": expected ", like.scalar_type(), " like params[0], got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected a tensor on ", like.device(), " like params[0], got ", t.device());
}

void check_fraction(const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0 && value < 1, name, ": expected 0 <= ", name, " < 1, got ", value);
}

}  // namespace

Dtype dtype_of_params(at::TensorList params) {
  TORCH_CHECK_VALUE(!params.empty(), "params: expected at least one tensor, got none");
  switch (params[0].scalar_type()) {
    case at::kFloat: return Dtype::float32;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    case at::kDouble: return Dtype::float64;
    default: TORCH_CHECK_TYPE(false, "params: expected float32, bfloat16, float16 or float64, got ", params[0].scalar_type());
  }
}

ChildArguments::ChildArguments(const ChildInputs& in, bool device_norm) : dtype(dtype_of_params(in.params)), in_(in) {
  const size_t count = in.params.size();
  TORCH_CHECK_VALUE(in.grads.size() == count && in.steps.size() == count && in.masks.size() == count && in.runs.size() == count &&
                        in.streams.size() == count,
                    "params, grads, steps, masks, runs, streams: expected as many of each, got ", count, ", ", in.grads.size(), ", ",
                    in.steps.size(), ", ", in.masks.size(), ", ", in.runs.size(), " and ", in.streams.size());
  TORCH_CHECK_TYPE(!in.stochastic_rounding || dtype == Dtype::bfloat16, "stochastic_rounding: expected bfloat16 parameters, got ",
                   in.params[0].scalar_type());
  skips_ = in.found_inf && number("found_inf", *in.found_inf) != 0;
  lr_ = rate("lr", in.lr);
  weight_decay_ = rate("weight_decay", in.weight_decay);
  set_factors(device_norm);
  tensors.reserve(count);
  for (size_t i = 0; i < count; i++) add_tensor(i);
}

void ChildArguments::set_factors(bool device_norm) {
  enum class Where { grad, update };
  const Where where = choose<Where>("where", in_.where, {{"grad", Where::grad}, {"update", Where::update}});
  args.reserved_decay = choose<bool>("decay", in_.decay, {{"all", false}, {"reserved", true}});
  args.seed = static_cast<uint64_t>(in_.seed);
  args.stochastic = in_.stochastic_rounding;
  double factor = in_.maximize ? -1 : 1;
  if (in_.grad_scale) {
    const double scale = number("grad_scale", *in_.grad_scale);
    TORCH_CHECK_VALUE(skips_ || (std::isfinite(scale) && scale > 0), "grad_scale: expected a finite number > 0, got ", scale);
    factor /= scale;
  }
  TORCH_CHECK_VALUE(!in_.square_sum || in_.max_grad_norm > 0, "max_grad_norm: expected more than 0, got ", in_.max_grad_norm);
  if (in_.square_sum && !device_norm) {
    const double norm = std::sqrt(number("square_sum", *in_.square_sum)) * std::abs(factor);
    const double clip = in_.max_grad_norm / (norm + 1e-6);
    factor *= clip < 1 || std::isnan(clip) ? clip : 1;  // as torch.nn.utils.clip_grad_norm_ does
  }
  args.mask_grad = args.mask_update = true;
  args.update_factor = 1;
  if (in_.reserve_p) {
    const double p = *in_.reserve_p;
    TORCH_CHECK_VALUE(p > 0 && p <= 1, "reserve_p: expected 0 < reserve_p <= 1, got ", p);
    args.threshold = static_cast<uint32_t>(std::floor(p * 65536 + 0.5));
    TORCH_CHECK_VALUE(args.threshold > 0, "reserve_p: ", p, " keeps fewer than one element in 65536");
    const double scale = static_cast<float>(65536.0 / args.threshold);
    args.mask_grad = where == Where::grad;
    args.mask_update = where == Where::update;
    (args.mask_grad ? factor : args.update_factor) *= scale;
  }
  args.grad_factor = factor;
}

void ChildArguments::add_tensor(size_t i) {
  const at::Tensor &p = in_.params[i], &g = in_.grads[i], &step = in_.steps[i];
  check_dense(indexed("params", i), p, in_.params[0]);
  check_dense(indexed("grads", i), g, in_.params[0]);
  TORCH_CHECK_VALUE(g.sizes() == p.sizes(), "grads[", i, "]: expected shape ", p.sizes(), " like the parameter, got ", g.sizes());
  TORCH_CHECK_TYPE(step.scalar_type() == at::kFloat, "steps[", i, "]: expected Float, got ", step.scalar_type());
  TORCH_CHECK_VALUE(step.numel() == 1 && step.device().is_cpu(), "steps[", i, "]: expected one number on cpu, got shape ", step.sizes(),
                    " on ", step.device());
  const double done = *step.const_data_ptr<float>();
  TORCH_CHECK_VALUE(done >= 0 && done < kMostSteps && done == std::floor(done), "steps[", i,
                    "]: expected a whole number from 0 to 2^24 - 1, got ", done);
  TORCH_CHECK_VALUE(in_.streams[i] >= 0 && in_.streams[i] < (int64_t(1) << 31), "streams[", i, "]: expected 0 to 2^31 - 1, got ",
                    in_.streams[i]);
  ChildTensor t{};
  t.stream = static_cast<uint32_t>(in_.streams[i]);
  t.step = static_cast<uint32_t>(done) + 1;
  at::Tensor elements = p;
  if (!p.is_contiguous()) {
    TORCH_CHECK_VALUE(at::has_internal_overlap(p) != at::MemOverlap::Yes, "params[", i,
                      "]: expected elements that do not share memory, got strides ", p.strides());
    elements = p.contiguous();
    copies_.emplace_back(p, elements);
  }
  t.p = elements.numel() ? elements.mutable_data_ptr() : nullptr;
  keep_.push_back(g.contiguous());
  t.g = keep_.back().numel() ? keep_.back().const_data_ptr() : nullptr;
  const int64_t numel = p.numel();
  const OptionalTensor mask = in_.masks.get(i), runs = in_.runs.get(i);
  if (mask) {
    TORCH_CHECK_VALUE(!in_.reserve_p, "masks[", i, "]: expected None with reserve_p, got a tensor");
    set_mask(t, *mask, numel);
  }
  if (runs) set_runs(t, *runs, numel);
  tensors.push_back(t);
}

void ChildArguments::set_mask(ChildTensor& t, const at::Tensor& mask, int64_t numel) {
  const std::string name = indexed("masks", tensors.size());
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kByte, name, ": expected uint8, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.device() == in_.params[0].device() && mask.dim() == 1 && mask.size(0) == (numel + 7) / 8, name, ": expected [",
                    (numel + 7) / 8, "] on ", in_.params[0].device(), ", a bit for each of ", numel, " elements, got shape ", mask.sizes(),
                    " on ", mask.device());
  static const uint8_t nothing = 0;
  keep_.push_back(mask.contiguous());
  t.mask = numel ? keep_.back().const_data_ptr<uint8_t>() : &nothing;
}

void ChildArguments::set_runs(ChildTensor& t, const at::Tensor& runs, int64_t numel) {
  const std::string name = indexed("runs", tensors.size());
  TORCH_CHECK_TYPE(runs.scalar_type() == at::kLong, name, ": expected int64, got ", runs.scalar_type());
  TORCH_CHECK_VALUE(runs.device().is_cpu() && runs.dim() == 2 && runs.size(1) == 3, name,
                    ": expected rows (start, length, stride) on cpu, got shape ", runs.sizes(), " on ", runs.device());
  if (numel == 0) return;
  const int64_t rows = runs.size(0);
  TORCH_CHECK_VALUE(rows > 0 && numel % rows == 0, name, ": expected rows that share ", numel, " elements equally, got ", rows);
  keep_.push_back(runs.contiguous());
  t.runs = reinterpret_cast<const ElementRun*>(keep_.back().const_data_ptr<int64_t>());
  t.run_elements = numel / rows;
  for (int64_t r = 0; r < rows; r++) {
    const ElementRun& run = t.runs[r];
    TORCH_CHECK_VALUE(run.start >= 0 && run.length > 0 && run.stride >= 0, name, ": expected start >= 0, length > 0, stride >= 0, got ",
                      run.start, ", ", run.length, ", ", run.stride);
  }
}

void ChildArguments::set_adamw(const AdamWInputs& rule) {
  check_fraction("beta1", rule.beta1);
  check_fraction("beta2", rule.beta2);
  TORCH_CHECK_VALUE(std::isfinite(rule.eps) && rule.eps >= 0, "eps: expected a finite number >= 0, got ", rule.eps);
  const bool hf = choose<bool>("order", rule.order, {{"torch", false}, {"hf", true}});
  args.beta1 = rule.beta1;
  args.beta2 = rule.beta2;
  args.eps = rule.eps;
  args.before = hf ? 1 : 1 - lr_ * weight_decay_;
  args.after = hf ? lr_ * weight_decay_ : 0;
  for (ChildTensor& t : tensors) {
    const double step = t.step;
    const double correction1 = rule.correct_bias ? 1 - std::pow(rule.beta1, step) : 1;
    const double root2 = rule.correct_bias ? std::sqrt(1 - std::pow(rule.beta2, step)) : 1;
    t.step_size = lr_ / correction1 * (hf ? root2 : 1);
    t.root_scale = hf ? 1 : 1 / root2;
  }
}

void ChildArguments::set_sgd(const SgdInputs& rule) {
  TORCH_CHECK_VALUE(std::isfinite(rule.momentum) && rule.momentum >= 0, "momentum: expected a finite number >= 0, got ", rule.momentum);
  TORCH_CHECK_VALUE(std::isfinite(rule.dampening), "dampening: expected a finite number, got ", rule.dampening);
  TORCH_CHECK_VALUE(!rule.nesterov || (rule.momentum > 0 && rule.dampening == 0),
                    "nesterov: expected a momentum and no dampening, got momentum = ", rule.momentum, " and dampening = ", rule.dampening);
  for (size_t i = 0; i < tensors.size(); i++) {
    TORCH_CHECK_VALUE(!tensors[i].compact || weight_decay_ == 0 || args.reserved_decay, "momentum_buffers[", i,
                      "]: expected one for each element where all of them decay, got those that the mask selects");
    tensors[i].first = tensors[i].step == 1;
  }
  // Decay is a part of SGD's update: masks of gradients leave it to all elements.
  if (!in_.reserve_p) args.mask_update = in_.where == "update";
  args.lr = lr_;
  args.weight_decay = weight_decay_;
  args.momentum = rule.momentum;
  args.gain = 1 - rule.dampening;
  args.nesterov = rule.nesterov;
}

void ChildArguments::check_moments(const char* name, at::TensorList moments) const {
  const at::ScalarType wanted = dtype == Dtype::float64 ? at::kDouble : at::kFloat;
  const at::Device device = in_.params[0].device();
  TORCH_CHECK_VALUE(moments.size() == tensors.size(), name, ": expected ", tensors.size(), " tensors like params, got ", moments.size());
  for (size_t i = 0; i < moments.size(); i++) {
    const at::Tensor& m = moments[i];
    TORCH_CHECK_TYPE(m.scalar_type() == wanted, name, "[", i, "]: expected ", wanted, ", got ", m.scalar_type());
    TORCH_CHECK_VALUE(m.device() == device && m.is_contiguous(), name, "[", i, "]: expected a contiguous tensor on ", device,
                      ", got strides ", m.strides(), " on ", m.device());
  }
}

void* ChildArguments::elements_of(const at::Tensor& moment) {
  static char nothing;
  return moment.numel() ? moment.mutable_data_ptr() : &nothing;
}

void ChildArguments::finish(at::TensorList changed) {
  for (const auto& [p, elements] : copies_) p.copy_(elements);
  for (const at::Tensor& step : in_.steps) *step.mutable_data_ptr<float>() += 1;
  for (const at::TensorList list : {in_.params, in_.steps, changed}) {
    for (const at::Tensor& t : list) {
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    }
  }
}

}  // namespace pykernels
