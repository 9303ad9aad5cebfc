#include "gated_conv_arguments.h"

#include <cmath>

namespace pykernels {

void GatedConvArguments::check(const GatedConvInputs& in, GatedConvForm& form) {
  x = in.x;
  form.dilation = in.dilation;
  form.residual = choose<Residual>(
      "residual", in.residual, {{"highway", Residual::highway}, {"add", Residual::add}, {"none", Residual::none}, {"glu", Residual::none}});
  form.value_act = choose<ValueAct>("value_act", in.value_act, {{"identity", ValueAct::identity}, {"tanh", ValueAct::tanh}});
  value_first_ = choose<bool>("split", in.split, {{"value_gate", true}, {"gate_value", false}});
  check_shapes(in, form);
  find_weights(in, form);
  find_cond(in, form);
}

void GatedConvArguments::check_shapes(const GatedConvInputs& in, GatedConvForm& form) {
  dtype = dtype_of(x);
  TORCH_CHECK_VALUE(in.cu_seqlens ? x.dim() == 2 : x.dim() == 3, "x: expected ",
                    in.cu_seqlens ? "[T, C_in] with cu_seqlens" : "[B, L, C_in]", ", got shape ", x.sizes());
  check_like("weight", in.weight, x);
  check_like("bias", in.bias, x);
  check_like("gate_weight", in.gate_weight, x);
  check_like("gate_bias", in.gate_bias, x);
  check_like("cond", in.cond, x);

  const at::Tensor& weight = in.weight;
  TORCH_CHECK_VALUE(weight.dim() == 3 && weight.size(2) >= 1, "weight: expected [", in.gate_weight ? "C_out" : "2 * C_out",
                    ", C_in, K] with K >= 1, got shape ", weight.sizes());
  TORCH_CHECK_VALUE(weight.size(1) == x.size(-1), "weight: expected C_in = ", x.size(-1), " like x, got shape ", weight.sizes());
  TORCH_CHECK_VALUE(in.gate_weight || weight.size(0) % 2 == 0,
                    "weight: expected an even number of outputs (value and gate half), got shape ", weight.sizes());
  form.c_out = c_out_ = in.gate_weight ? weight.size(0) : weight.size(0) / 2;
  form.c_in = weight.size(1);
  form.taps = weight.size(2);
  check_shape("gate_weight", in.gate_weight, weight.sizes());
  check_shape("bias", in.bias, {weight.size(0)});
  TORCH_CHECK_VALUE(in.gate_weight || !in.gate_bias, "gate_bias: expected None without gate_weight, got a tensor");
  check_shape("gate_bias", in.gate_bias, {form.c_out});
  TORCH_CHECK_VALUE(form.residual == Residual::none || form.c_in == form.c_out, "residual: expected 'none' where C_in != C_out, got '",
                    in.residual, "' with C_in = ", form.c_in, " and C_out = ", form.c_out);
  TORCH_CHECK_VALUE(in.dilation >= 1, "dilation: expected >= 1, got ", in.dilation);
  check_one_of(in.mask, in.lengths, in.cu_seqlens);

  const int64_t reach = form.dilation * (form.taps - 1);
  enum class Padding { same, causal, valid };
  const Padding padding =
      choose<Padding>("padding", in.padding, {{"same", Padding::same}, {"causal", Padding::causal}, {"valid", Padding::valid}});
  form.left = padding == Padding::same ? reach / 2 : padding == Padding::causal ? reach : 0;
  form.shift = padding == Padding::valid ? reach : 0;
  TORCH_CHECK_VALUE(padding != Padding::valid || !in.cu_seqlens,
                    "padding: expected 'same' or 'causal' with cu_seqlens (the output's length would depend on data), got 'valid'");
  out_shape = x.sizes().vec();
  out_shape.back() = form.c_out;
  if (padding == Padding::valid) {
    TORCH_CHECK_VALUE(x.size(1) >= reach, "padding: 'valid' expects at least dilation * (K - 1) = ", reach, " rows, got L = ", x.size(1));
    out_shape[1] -= reach;
  }
  in_rows = packed_rows() ? x.size(0) : x.size(0) * x.size(1);
  out_rows = packed_rows() ? in_rows : x.size(0) * out_shape[1];
}

const char* GatedConvArguments::contiguous(const OptionalTensor& t) {
  if (!t) return nullptr;
  keep_.push_back(t->contiguous());
  return static_cast<const char*>(keep_.back().const_data_ptr());
}

void GatedConvArguments::find_weights(const GatedConvInputs& in, GatedConvForm& form) {
  keep_.push_back(in.weight.contiguous());
  const auto size = static_cast<int64_t>(x.element_size());
  const char* base = static_cast<const char*>(keep_.back().const_data_ptr());
  if (in.gate_weight) {
    keep_.push_back(in.gate_weight->contiguous());
    value_weight = base;
    gate_weight = keep_.back().const_data_ptr();
  } else {
    const int64_t half = form.c_out * form.c_in * form.taps * size;
    value_weight = base + (value_first_ ? 0 : half);
    gate_weight = base + (value_first_ ? half : 0);
  }
  const char* bias = contiguous(in.bias);
  form.value_bias = bias && !in.gate_weight ? bias + value_column() * size : bias;
  form.gate_bias = in.gate_weight ? contiguous(in.gate_bias) : bias ? bias + gate_column() * size : nullptr;
}

void GatedConvArguments::find_cond(const GatedConvInputs& in, GatedConvForm& form) {
  if (!in.cond) return;
  const at::Tensor& cond = *in.cond;
  const int64_t width = 2 * form.c_out;
  const auto size = static_cast<int64_t>(x.element_size());
  bool fits = false;
  if (packed_rows()) {
    form.cond_per_row = cond.dim() == 2;
    fits = form.cond_per_row ? cond.size(0) == x.size(0) && cond.size(1) == width
                             : cond.dim() == 3 && cond.size(0) == in.cu_seqlens->numel() - 1 && cond.size(1) == 1 && cond.size(2) == width;
  } else {
    fits = cond.dim() == 3 && cond.size(0) == x.size(0) && cond.size(2) == width && (cond.size(1) == 1 || cond.size(1) == out_shape[1]);
    form.cond_per_row = fits && cond.size(1) != 1;
  }
  TORCH_CHECK_VALUE(fits, "cond: expected ", packed_rows() ? "[T, 2 * C_out] or [B, 1, 2 * C_out]" : "[B, 1 or L', 2 * C_out]",
                    " with 2 * C_out = ", width, ", got shape ", cond.sizes());
  const char* rows = contiguous(in.cond);
  form.value_cond = rows + value_column() * size;
  form.gate_cond = rows + gate_column() * size;
  form.cond_row = width;
}

void GatedConvArguments::set_random(const GatedConvInputs& in, GatedConvForm& form) {
  TORCH_CHECK_VALUE(in.gate_dropout >= 0 && in.gate_dropout < 1, "gate_dropout: expected 0 <= gate_dropout < 1, got ", in.gate_dropout);
  TORCH_CHECK_VALUE(in.gate_noise >= 0 && std::isfinite(in.gate_noise), "gate_noise: expected a finite amplitude >= 0, got ",
                    in.gate_noise);
  TORCH_CHECK_VALUE(in.gate_dropout == 0 || in.gate_noise == 0, "gate_dropout, gate_noise: expected at most one of them, got both");
  if (in.gate_dropout == 0 && in.gate_noise == 0) return;
  TORCH_CHECK_VALUE(in.seed.has_value(), "seed: expected a 0-d int64 tensor with gate_dropout or gate_noise, got None");
  TORCH_CHECK_TYPE(in.seed->scalar_type() == at::kLong && in.seed->numel() == 1, "seed: expected a 0-d int64 tensor, got ",
                   in.seed->scalar_type(), " ", in.seed->sizes());
  form.seed = static_cast<uint64_t>(in.seed->item<int64_t>());
  if (in.gate_dropout > 0) {
    form.random = GateRandom::dropout;
    form.keep_threshold = static_cast<uint32_t>(std::floor((1.0 - in.gate_dropout) * 65536 + 0.5));
    TORCH_CHECK_VALUE(form.keep_threshold > 0, "gate_dropout: ", in.gate_dropout, " keeps fewer than one element in 65536");
    form.random_scale = static_cast<float>(65536.0 / form.keep_threshold);
  } else {
    form.random = GateRandom::noise;
    form.random_scale = static_cast<float>(in.gate_noise);
  }
}

void GatedConvArguments::set_saved(void* saved, GatedConvForm& form) const {
  form.saved_value = saved;
  form.saved_gate = static_cast<char*>(saved) + out_rows * c_out_ * static_cast<int64_t>(x.element_size());
}

}  // namespace pykernels
