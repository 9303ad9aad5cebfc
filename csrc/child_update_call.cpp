#include "child_update_call.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <cmath>

#include "parallel.h"

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

void check_dense(const std::string& name, const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, name, ": expected a dense tensor, got ", t.layout());
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, ": expected ", like.scalar_type(), " like params[0], got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": expected a tensor on cpu, got ", t.device());
}

// Calls unit(first, count) for each unit of work of a tensor.
template <class Use>
void in_units(int64_t numel, Use use) {
  for (int64_t first = 0; first < numel; first += kChildUnit) use(first, std::min(kChildUnit, numel - first));
}

}  // namespace

ChildCall::ChildCall(const ChildInputs& in) : in_(in) {
  const Dtype dtype = dtype_of_params(in.params);
  const size_t count = in.params.size();
  moment_type_ = dtype == Dtype::float64 ? at::kDouble : at::kFloat;
  kernels = PYKERNELS_OF_TIER(tier_for(dtype), child_kernels)(dtype);
  TORCH_CHECK_VALUE(in.grads.size() == count && in.steps.size() == count && in.masks.size() == count && in.runs.size() == count &&
                        in.streams.size() == count,
                    "params, grads, steps, masks, runs, streams: expected as many of each, got ", count, ", ", in.grads.size(), ", ",
                    in.steps.size(), ", ", in.masks.size(), ", ", in.runs.size(), " and ", in.streams.size());
  TORCH_CHECK_TYPE(!in.stochastic_rounding || dtype == Dtype::bfloat16, "stochastic_rounding: expected bfloat16 parameters, got ",
                   in.params[0].scalar_type());
  skips_ = in.found_inf && number("found_inf", *in.found_inf) != 0;
  lr = rate("lr", in.lr);
  weight_decay = rate("weight_decay", in.weight_decay);
  set_factors(in);
  tensors.reserve(count);
  for (size_t i = 0; i < count; i++) add_tensor(in, i);
  count_selected();
}

void ChildCall::set_factors(const ChildInputs& in) {
  enum class Where { grad, update };
  const Where where = choose<Where>("where", in.where, {{"grad", Where::grad}, {"update", Where::update}});
  args.reserved_decay = choose<bool>("decay", in.decay, {{"all", false}, {"reserved", true}});
  args.seed = static_cast<uint64_t>(in.seed);
  args.stochastic = in.stochastic_rounding;
  double factor = in.maximize ? -1 : 1;
  if (in.grad_scale) {
    const double scale = number("grad_scale", *in.grad_scale);
    TORCH_CHECK_VALUE(skips_ || (std::isfinite(scale) && scale > 0), "grad_scale: expected a finite number > 0, got ", scale);
    factor /= scale;
  }
  if (in.square_sum) {
    TORCH_CHECK_VALUE(in.max_grad_norm > 0, "max_grad_norm: expected more than 0, got ", in.max_grad_norm);
    const double norm = std::sqrt(number("square_sum", *in.square_sum)) * std::abs(factor);
    const double clip = in.max_grad_norm / (norm + 1e-6);
    factor *= clip < 1 || std::isnan(clip) ? clip : 1;  // as torch.nn.utils.clip_grad_norm_ does
  }
  args.mask_grad = args.mask_update = true;
  args.update_factor = 1;
  if (in.reserve_p) {
    const double p = *in.reserve_p;
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

void ChildCall::add_tensor(const ChildInputs& in, size_t i) {
  const at::Tensor &p = in.params[i], &g = in.grads[i], &step = in.steps[i];
  check_dense(indexed("params", i), p, in.params[0]);
  check_dense(indexed("grads", i), g, in.params[0]);
  TORCH_CHECK_VALUE(g.sizes() == p.sizes(), "grads[", i, "]: expected shape ", p.sizes(), " like the parameter, got ", g.sizes());
  TORCH_CHECK_TYPE(step.scalar_type() == at::kFloat, "steps[", i, "]: expected Float, got ", step.scalar_type());
  TORCH_CHECK_VALUE(step.numel() == 1 && step.device().is_cpu(), "steps[", i, "]: expected one number on cpu, got shape ", step.sizes(),
                    " on ", step.device());
  const double done = *step.const_data_ptr<float>();
  TORCH_CHECK_VALUE(done >= 0 && done < kMostSteps && done == std::floor(done), "steps[", i,
                    "]: expected a whole number from 0 to 2^24 - 1, got ", done);
  TORCH_CHECK_VALUE(in.streams[i] >= 0 && in.streams[i] < (int64_t(1) << 31), "streams[", i, "]: expected 0 to 2^31 - 1, got ",
                    in.streams[i]);
  ChildTensor t{};
  t.stream = static_cast<uint32_t>(in.streams[i]);
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
  const OptionalTensor mask = in.masks.get(i), runs = in.runs.get(i);
  if (mask) {
    TORCH_CHECK_VALUE(!in.reserve_p, "masks[", i, "]: expected None with reserve_p, got a tensor");
    set_mask(t, *mask, numel);
  }
  if (runs) set_runs(t, *runs, numel);
  in_units(numel, [&](int64_t first, int64_t count) { units_.push_back({i, first, count, 0}); });
  tensors.push_back(t);
}

void ChildCall::set_mask(ChildTensor& t, const at::Tensor& mask, int64_t numel) {
  const std::string name = indexed("masks", tensors.size());
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kByte, name, ": expected uint8, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.device().is_cpu() && mask.dim() == 1 && mask.size(0) == (numel + 7) / 8, name, ": expected [", (numel + 7) / 8,
                    "] on cpu, a bit for each of ", numel, " elements, got shape ", mask.sizes(), " on ", mask.device());
  static const uint8_t nothing = 0;
  keep_.push_back(mask.contiguous());
  t.mask = numel ? keep_.back().const_data_ptr<uint8_t>() : &nothing;
}

void ChildCall::set_runs(ChildTensor& t, const at::Tensor& runs, int64_t numel) {
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

// How many elements the masks select, in all and before each unit: what compact moments must have room for.
void ChildCall::count_selected() {
  selected_.assign(tensors.size(), 0);
  const bool any = std::any_of(tensors.begin(), tensors.end(), [](const ChildTensor& t) { return t.mask; });
  if (!any) return;
  parallel_items(static_cast<int64_t>(units_.size()), 0, [&](int64_t item, void*) {
    Unit& unit = units_[item];
    const uint8_t* mask = tensors[unit.tensor].mask;
    if (mask) unit.selected = kernels->set_bits(mask + unit.first / 8, unit.count);
  });
  for (Unit& unit : units_) {
    const int64_t own = unit.selected;
    unit.selected = selected_[unit.tensor];
    selected_[unit.tensor] += own;
  }
}

void ChildCall::set_moments(const char* name, at::TensorList moments, int which) {
  TORCH_CHECK_VALUE(moments.size() == tensors.size(), name, ": expected ", tensors.size(), " tensors like params, got ", moments.size());
  for (size_t i = 0; i < tensors.size(); i++) {
    ChildTensor& t = tensors[i];
    const at::Tensor& m = moments[i];
    const int64_t numel = in_.params[i].numel();
    TORCH_CHECK_TYPE(m.scalar_type() == moment_type_, name, "[", i, "]: expected ", moment_type_, ", got ", m.scalar_type());
    TORCH_CHECK_VALUE(m.device().is_cpu() && m.is_contiguous(), name, "[", i, "]: expected a contiguous tensor on cpu, got strides ",
                      m.strides(), " on ", m.device());
    const bool dense = m.numel() == numel && (which == 0 || !t.compact || selected_[i] == numel);
    const bool compact = t.mask && m.numel() == selected_[i] && (which == 0 || t.compact || selected_[i] == numel);
    TORCH_CHECK_VALUE(dense || compact, name, "[", i, "]: expected ", numel, " elements like the parameter",
                      t.mask ? ", or one for each that the mask selects, " + std::to_string(selected_[i]) : std::string(), ", got ",
                      m.numel());
    t.compact = compact && !dense;
    static char nothing;
    void* data = m.numel() ? m.mutable_data_ptr() : &nothing;
    (which == 0 ? t.m : t.v) = data;
  }
}

void ChildCall::run(ChildKernels::Update update, at::TensorList changed) {
  parallel_items(static_cast<int64_t>(units_.size()), kernels->scratch, [&](int64_t item, void* scratch) {
    const Unit& unit = units_[item];
    update(args, tensors[unit.tensor], unit.first, unit.count, unit.selected, scratch);
  });
  for (const auto& [p, elements] : copies_) p.copy_(elements);
  for (const at::Tensor& step : in_.steps) *step.mutable_data_ptr<float>() += 1;
  for (const at::TensorList list : {in_.params, in_.steps, changed}) {
    for (const at::Tensor& t : list) {
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    }
  }
}

double child_square_sum(at::TensorList grads) {
  double total = 0;
  for (size_t i = 0; i < grads.size(); i++) {
    const at::Tensor& g = grads[i];
    TORCH_CHECK_TYPE(g.layout() == at::kStrided, "grads[", i, "]: expected a dense tensor, got ", g.layout());
    const Dtype dtype = dtype_of_params(g);
    const at::Tensor elements = g.contiguous();
    const auto* data = static_cast<const char*>(elements.numel() ? elements.const_data_ptr() : nullptr);
    const ChildKernels& k = *PYKERNELS_OF_TIER(tier_for(dtype), child_kernels)(dtype);
    std::vector<double> sums((g.numel() + kChildUnit - 1) / kChildUnit);
    parallel_items(static_cast<int64_t>(sums.size()), 0, [&](int64_t item, void*) {
      sums[item] = k.square_sum(data + item * kChildUnit * g.element_size(), std::min(kChildUnit, g.numel() - item * kChildUnit));
    });
    for (double sum : sums) total += sum;
  }
  return total;
}

}  // namespace pykernels
