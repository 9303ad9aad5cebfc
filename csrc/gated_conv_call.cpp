#include "gated_conv_call.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>

#include "arguments.h"

namespace pykernels {

GatedConvCall::GatedConvCall(const GatedConvInputs& in) : x(in.x) {
  args.dilation = in.dilation;
  args.residual = choose<Residual>(
      "residual", in.residual, {{"highway", Residual::highway}, {"add", Residual::add}, {"none", Residual::none}, {"glu", Residual::none}});
  args.value_act = choose<ValueAct>("value_act", in.value_act, {{"identity", ValueAct::identity}, {"tanh", ValueAct::tanh}});
  value_first_ = choose<bool>("split", in.split, {{"value_gate", true}, {"gate_value", false}});
  check_shapes(in);
  kernels = PYKERNELS_OF_TIER(tier_for(dtype), gated_conv_kernels)(dtype, dtype == Dtype::float32 && float32_allows_bf16());
  lay_out_sequences(in);
  set_random(in);
  args.sequences = sequences.data();
  args.dh_half = (args.c_out + kernels->depth_unit - 1) / kernels->depth_unit * kernels->depth_unit;
  args.dh_row = 2 * args.dh_half + 64 / kernels->panel_size;  // one cache line: rows at powers of two share cache sets
}

void GatedConvCall::check_shapes(const GatedConvInputs& in) {
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
  args.c_out = in.gate_weight ? weight.size(0) : weight.size(0) / 2;
  args.c_in = weight.size(1);
  args.taps = weight.size(2);
  check_shape("gate_weight", in.gate_weight, weight.sizes());
  check_shape("bias", in.bias, {weight.size(0)});
  TORCH_CHECK_VALUE(in.gate_weight || !in.gate_bias, "gate_bias: expected None without gate_weight, got a tensor");
  check_shape("gate_bias", in.gate_bias, {args.c_out});
  TORCH_CHECK_VALUE(args.residual == Residual::none || args.c_in == args.c_out, "residual: expected 'none' where C_in != C_out, got '",
                    in.residual, "' with C_in = ", args.c_in, " and C_out = ", args.c_out);
  TORCH_CHECK_VALUE(in.dilation >= 1, "dilation: expected >= 1, got ", in.dilation);
  check_one_of(in.mask, in.lengths, in.cu_seqlens);

  const int64_t reach = args.dilation * (args.taps - 1);
  enum class Padding { same, causal, valid };
  const Padding padding =
      choose<Padding>("padding", in.padding, {{"same", Padding::same}, {"causal", Padding::causal}, {"valid", Padding::valid}});
  args.left = padding == Padding::same ? reach / 2 : padding == Padding::causal ? reach : 0;
  args.shift = padding == Padding::valid ? reach : 0;
  TORCH_CHECK_VALUE(padding != Padding::valid || !in.cu_seqlens,
                    "padding: expected 'same' or 'causal' with cu_seqlens (the output's length would depend on data), got 'valid'");
  out_shape = x.sizes().vec();
  out_shape.back() = args.c_out;
  if (padding == Padding::valid) {
    TORCH_CHECK_VALUE(x.size(1) >= reach, "padding: 'valid' expects at least dilation * (K - 1) = ", reach, " rows, got L = ", x.size(1));
    out_shape[1] -= reach;
  }

  keep_.push_back(weight.contiguous());
  const auto size = static_cast<int64_t>(x.element_size());
  const char* base = static_cast<const char*>(keep_.back().const_data_ptr());
  if (in.gate_weight) {
    keep_.push_back(in.gate_weight->contiguous());
    value_weight = base;
    gate_weight = keep_.back().const_data_ptr();
  } else {
    const int64_t half = args.c_out * args.c_in * args.taps * size;
    value_weight = base + (value_first_ ? 0 : half);
    gate_weight = base + (value_first_ ? half : 0);
  }
  const auto contiguous = [&](const OptionalTensor& t) -> const char* {
    if (!t) return nullptr;
    keep_.push_back(t->contiguous());
    return static_cast<const char*>(keep_.back().const_data_ptr());
  };
  const char* bias = contiguous(in.bias);
  args.value_bias = bias && !in.gate_weight ? bias + value_column() * size : bias;
  args.gate_bias = in.gate_weight ? contiguous(in.gate_bias) : bias ? bias + gate_column() * size : nullptr;

  if (in.cond) {
    const at::Tensor& cond = *in.cond;
    const int64_t width = 2 * args.c_out;
    bool fits = false;
    if (packed_rows()) {
      args.cond_per_row = cond.dim() == 2;
      fits = args.cond_per_row
                 ? cond.size(0) == x.size(0) && cond.size(1) == width
                 : cond.dim() == 3 && cond.size(0) == in.cu_seqlens->numel() - 1 && cond.size(1) == 1 && cond.size(2) == width;
    } else {
      fits = cond.dim() == 3 && cond.size(0) == x.size(0) && cond.size(2) == width && (cond.size(1) == 1 || cond.size(1) == out_shape[1]);
      args.cond_per_row = fits && cond.size(1) != 1;
    }
    TORCH_CHECK_VALUE(fits, "cond: expected ", packed_rows() ? "[T, 2 * C_out] or [B, 1, 2 * C_out]" : "[B, 1 or L', 2 * C_out]",
                      " with 2 * C_out = ", width, ", got shape ", cond.sizes());
    const char* rows = contiguous(in.cond);
    args.value_cond = rows + value_column() * size;
    args.gate_cond = rows + gate_column() * size;
    args.cond_row = width;
  }
}

void GatedConvCall::lay_out_sequences(const GatedConvInputs& in) {
  args.x_row = x.stride(-2);
  args.x_column = x.size(-1) == 1 ? 1 : x.stride(-1);
  sequences = sequences_of(x, in.mask, in.lengths, in.cu_seqlens, keep_);
  in_rows = out_rows = packed_rows() ? x.size(0) : x.size(0) * x.size(1);
  if (args.shift == 0) return;
  const int64_t out_length = out_shape[1];
  out_rows = x.size(0) * out_length;
  for (Sequence& s : sequences) {
    s.live_out = std::clamp<int64_t>(s.live - args.shift, 0, out_length);
    s.out_row = s.index * out_length;
    s.out_rows = out_length;
  }
}

void GatedConvCall::set_random(const GatedConvInputs& in) {
  TORCH_CHECK_VALUE(in.gate_dropout >= 0 && in.gate_dropout < 1, "gate_dropout: expected 0 <= gate_dropout < 1, got ", in.gate_dropout);
  TORCH_CHECK_VALUE(in.gate_noise >= 0 && std::isfinite(in.gate_noise), "gate_noise: expected a finite amplitude >= 0, got ",
                    in.gate_noise);
  TORCH_CHECK_VALUE(in.gate_dropout == 0 || in.gate_noise == 0, "gate_dropout, gate_noise: expected at most one of them, got both");
  if (in.gate_dropout == 0 && in.gate_noise == 0) return;
  TORCH_CHECK_VALUE(in.seed.has_value(), "seed: expected a 0-d int64 tensor with gate_dropout or gate_noise, got None");
  TORCH_CHECK_TYPE(in.seed->scalar_type() == at::kLong && in.seed->numel() == 1, "seed: expected a 0-d int64 tensor, got ",
                   in.seed->scalar_type(), " ", in.seed->sizes());
  args.seed = static_cast<uint64_t>(in.seed->item<int64_t>());
  if (in.gate_dropout > 0) {
    args.random = GateRandom::dropout;
    args.keep_threshold = static_cast<uint32_t>(std::floor((1.0 - in.gate_dropout) * 65536 + 0.5));
    TORCH_CHECK_VALUE(args.keep_threshold > 0, "gate_dropout: ", in.gate_dropout, " keeps fewer than one element in 65536");
    args.random_scale = static_cast<float>(65536.0 / args.keep_threshold);
  } else {
    args.random = GateRandom::noise;
    args.random_scale = static_cast<float>(in.gate_noise);
  }
}

void GatedConvCall::set_saved(void* saved) {
  args.saved_value = saved;
  args.saved_gate = static_cast<char*>(saved) + out_rows * args.c_out * static_cast<int64_t>(x.element_size());
}

int64_t GatedConvCall::block_rows(int64_t total_rows, int64_t channels) const {
  constexpr int64_t kPanelBytes = 128 << 10, kBlocksPerThread = 4;
  const int64_t tile = kernels->row_tile;
  const int64_t fits = kPanelBytes / std::max<int64_t>(1, channels * kernels->panel_size);
  const int64_t shares = total_rows / (kBlocksPerThread * at::get_num_threads());
  return std::max(tile, std::min({fits, shares, 16 * tile}) / tile * tile);
}

}  // namespace pykernels
