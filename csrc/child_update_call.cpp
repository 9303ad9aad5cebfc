#include "child_update_call.h"

#include <algorithm>

#include "parallel.h"

namespace pykernels {
namespace {

// Calls unit(first, count) for each unit of work of a tensor.
template <class Use>
void in_units(int64_t numel, Use use) {
  for (int64_t first = 0; first < numel; first += kChildUnit) use(first, std::min(kChildUnit, numel - first));
}

}  // namespace

ChildCall::ChildCall(const ChildInputs& in) : ChildArguments(in, false) {
  kernels = PYKERNELS_OF_TIER(tier_for(dtype), child_kernels)(dtype);
  for (size_t i = 0; i < tensors.size(); i++) {
    in_units(in.params[i].numel(), [&](int64_t first, int64_t count) { units_.push_back({i, first, count, 0}); });
  }
  count_selected();
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
  check_moments(name, moments);
  for (size_t i = 0; i < tensors.size(); i++) {
    ChildTensor& t = tensors[i];
    const at::Tensor& m = moments[i];
    const int64_t numel = in_.params[i].numel();
    const bool dense = m.numel() == numel && (which == 0 || !t.compact || selected_[i] == numel);
    const bool compact = t.mask && m.numel() == selected_[i] && (which == 0 || t.compact || selected_[i] == numel);
    TORCH_CHECK_VALUE(dense || compact, name, "[", i, "]: expected ", numel, " elements like the parameter",
                      t.mask ? ", or one for each that the mask selects, " + std::to_string(selected_[i]) : std::string(), ", got ",
                      m.numel());
    t.compact = compact && !dense;
    (which == 0 ? t.m : t.v) = elements_of(m);
  }
}

void ChildCall::run(ChildKernels::Update update, at::TensorList changed) {
  parallel_items(static_cast<int64_t>(units_.size()), kernels->scratch, [&](int64_t item, void* scratch) {
    const Unit& unit = units_[item];
    update(args, tensors[unit.tensor], unit.first, unit.count, unit.selected, scratch);
  });
  finish(changed);
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
