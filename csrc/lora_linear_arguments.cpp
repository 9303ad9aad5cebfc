#include "lora_linear_arguments.h"

#include <ATen/ops/empty.h>

#include <cmath>
#include <numeric>

namespace pykernels {

void LoraLinearArguments::check(const LoraLinearInputs& in, LoraLinearForm& form) {
  dtype = dtype_of(in.x);
  x_type_ = in.x.scalar_type();
  sum_type = dtype == Dtype::float64 ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(in.x.dim() >= 1, "x: expected [..., K], got a 0-d tensor");
  check_like("weight", in.weight, in.x);
  check_like("bias", in.bias, in.x);
  TORCH_CHECK_VALUE(in.weight.dim() == 2 && in.weight.size(1) == in.x.size(-1), "weight: expected [N, K] with K = ", in.x.size(-1),
                    " like x, got shape ", in.weight.sizes());
  form.in = in.weight.size(1);
  form.out = in.weight.size(0);
  check_shape("bias", in.bias, {form.out});
  for (const auto& [name, t] : {std::pair{"lora_a", &in.lora_a}, std::pair{"lora_b", &in.lora_b}}) {
    TORCH_CHECK_TYPE(t->scalar_type() == in.x.scalar_type() || (t->scalar_type() == at::kFloat && in.x.scalar_type() != at::kDouble), name,
                     ": expected ", in.x.scalar_type(), " like x", in.x.scalar_type() == at::kDouble ? "" : " or Float", ", got ",
                     t->scalar_type());
    TORCH_CHECK_VALUE(t->device() == in.x.device(), name, ": expected a tensor on ", in.x.device(), " like x, got ", t->device());
  }
  TORCH_CHECK_TYPE(in.lora_b.scalar_type() == in.lora_a.scalar_type(), "lora_b: expected ", in.lora_a.scalar_type(), " like lora_a, got ",
                   in.lora_b.scalar_type());
  const int64_t dims = in.adapter_index ? 3 : 2;
  TORCH_CHECK_VALUE(in.lora_a.dim() == dims && in.lora_a.size(-1) == form.in, "lora_a: expected ", dims == 3 ? "[E, R, K]" : "[R, K]",
                    " with K = ", form.in, " like x, got shape ", in.lora_a.sizes());
  form.rank = in.lora_a.size(-2);
  form.adapters = dims == 3 ? in.lora_a.size(0) : 1;
  const bool fits = in.lora_b.dim() == dims && in.lora_b.size(-1) == form.rank && in.lora_b.size(-2) == form.out &&
                    (dims == 2 || in.lora_b.size(0) == form.adapters);
  TORCH_CHECK_VALUE(fits, "lora_b: expected ", dims == 3 ? "[E, N, R]" : "[N, R]", " with N = ", form.out,
                    " like weight and R = ", form.rank, dims == 3 ? " (and E) like lora_a" : " like lora_a", ", got shape ",
                    in.lora_b.sizes());
  TORCH_CHECK_VALUE(std::isfinite(in.scale), "scale: expected a finite number, got ", in.scale);
  if (in.scales) {
    TORCH_CHECK_TYPE(in.scales->is_floating_point(), "scale: expected a floating dtype, got ", in.scales->scalar_type());
    check_shape("scale", in.scales, {form.adapters});
  }
  if (in.adapter_index) {
    const at::Tensor& index = *in.adapter_index;
    TORCH_CHECK_TYPE(index.scalar_type() == at::kInt || index.scalar_type() == at::kLong, "adapter_index: expected int32 or int64, got ",
                     index.scalar_type());
    const at::IntArrayRef leading = in.x.sizes().slice(0, in.x.dim() - 1);
    const bool fits = index.dim() <= static_cast<int64_t>(leading.size()) && index.sizes() == leading.slice(0, index.dim());
    TORCH_CHECK_VALUE(fits, "adapter_index: expected a leading part of x's leading shape ", leading, ", got shape ", index.sizes());
  }
  form.rows = c10::multiply_integers(in.x.sizes().slice(0, in.x.dim() - 1));
  rank_ = form.rank;
  out_shape = in.x.sizes().vec();
  out_shape.back() = form.out;
}

void LoraLinearArguments::set_dropout(const LoraLinearInputs& in, LoraLinearForm& form) {
  TORCH_CHECK_VALUE(in.dropout >= 0 && in.dropout < 1, "dropout: expected 0 <= dropout < 1, got ", in.dropout);
  if (in.dropout == 0) return;
  TORCH_CHECK_VALUE(in.seed.has_value(), "seed: expected a 0-d int64 tensor with dropout, got None");
  TORCH_CHECK_TYPE(in.seed->scalar_type() == at::kLong && in.seed->numel() == 1, "seed: expected a 0-d int64 tensor, got ",
                   in.seed->scalar_type(), " ", in.seed->sizes());
  form.seed = static_cast<uint64_t>(in.seed->item<int64_t>());
  form.keep_threshold = static_cast<uint32_t>(std::floor((1.0 - in.dropout) * 65536 + 0.5));
  TORCH_CHECK_VALUE(form.keep_threshold > 0, "dropout: ", in.dropout, " keeps fewer than one element in 65536");
  form.keep_scale = static_cast<float>(65536.0 / form.keep_threshold);
}

void LoraLinearArguments::check_incoming(const at::Tensor& dy, const at::Tensor& s, const at::Tensor& keep, int64_t keep_bytes) const {
  check_shape("dy", dy, out_shape);
  TORCH_CHECK_TYPE(dy.scalar_type() == x_type_, "dy: expected ", x_type_, " like x, got ", dy.scalar_type());
  const int64_t rows = c10::multiply_integers(at::IntArrayRef(out_shape).slice(0, out_shape.size() - 1));
  TORCH_CHECK_VALUE(s.sizes() == at::IntArrayRef({rows, rank_}) && s.scalar_type() == sum_type && s.is_contiguous(),
                    "s: expected what _lora_linear_fwd returned, got ", s.scalar_type(), " ", s.sizes());
  TORCH_CHECK_VALUE(keep.numel() == keep_bytes && keep.scalar_type() == at::kByte && keep.is_contiguous(),
                    "keep: expected what _lora_linear_fwd returned, got ", keep.scalar_type(), " ", keep.sizes());
}

size_t check_stacked(const StackedInputs& in) {
  const size_t count = in.weights.size();
  TORCH_CHECK_VALUE(in.lora_a.size() == count && in.lora_b.size() == count && in.biases.size() == count && in.scales.size() == count,
                    "weights, lora_a, lora_b, bias, scale: expected as many of each, got ", count, ", ", in.lora_a.size(), ", ",
                    in.lora_b.size(), ", ", in.biases.size(), " and ", in.scales.size());
  return count;
}

void check_stacked_incoming(size_t count, size_t dys, size_t saved, size_t needs) {
  TORCH_CHECK_VALUE(dys == count && saved == 2 * count && needs == 1 + 4 * count, "dys, saved, needs: expected ", count, ", ", 2 * count,
                    " and ", 1 + 4 * count, " of them");
}

at::Tensor rows_of(const at::Tensor& t, int64_t columns) {
  const auto sizes = t.sizes().slice(0, t.dim() - 1);
  const int64_t rows = std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<>());
  const at::Tensor flat = t.reshape({rows, columns});
  return columns <= 1 || flat.stride(1) == 1 ? flat : flat.contiguous();
}

at::Tensor gradient_like(bool needed, const OptionalTensor& like, const at::Tensor& x) {
  return at::empty(needed && like ? like->sizes() : at::IntArrayRef({0}),
                   (like ? like->options() : x.options()).memory_format(at::MemoryFormat::Contiguous));
}

}  // namespace pykernels
