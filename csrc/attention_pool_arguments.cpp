#include "attention_pool_arguments.h"

#include <algorithm>

namespace pykernels {
namespace {

void check_device(const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK_VALUE(t.device() == x.device(), name, ": expected a tensor on ", x.device(), " like x, got ", t.device());
}

void check_returned(const char* name, const at::Tensor& t, const at::Tensor& x, at::IntArrayRef shape, at::ScalarType type) {
  check_device(name, t, x);
  TORCH_CHECK_VALUE(t.sizes() == shape && t.scalar_type() == type, name, ": expected what _attention_pool_fwd returned for backward, ",
                    shape, " ", type, ", got ", t.sizes(), " ", t.scalar_type());
}

}  // namespace

void AttentionPoolArguments::check(const AttentionPoolInputs& in, AttentionPoolForm& form) {
  x = in.x;
  form.act = choose<PoolAct>("activation", in.activation,
                             {{"tanh", PoolAct::tanh}, {"swish", PoolAct::swish}, {"relu", PoolAct::relu}, {"gelu", PoolAct::gelu}});
  returned = choose<Returned>("return_scores", in.return_scores,
                              {{"none", Returned::none}, {"raw", Returned::raw}, {"softmax", Returned::softmax}});
  form.softmax_returned = returned == Returned::softmax;
  check_shapes(in, form);
  find_shapes(in, form);
  weight = contiguous(in.weight);
  gate_weight = contiguous(in.gate_weight);
  form.query = contiguous(in.query);
  form.bias = contiguous(in.bias);
  form.gate_bias = contiguous(in.gate_bias);
}

void AttentionPoolArguments::check_shapes(const AttentionPoolInputs& in, AttentionPoolForm& form) {
  dtype = dtype_of(x);
  sum_type = dtype == Dtype::float64 ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(in.cu_seqlens ? x.dim() == 2 : x.dim() == 3, "x: expected ", in.cu_seqlens ? "[T, D] with cu_seqlens" : "[B, L, D]",
                    ", got shape ", x.sizes());
  check_like("weight", in.weight, x);
  check_like("query", in.query, x);
  check_like("bias", in.bias, x);
  check_like("gate_weight", in.gate_weight, x);
  check_like("gate_bias", in.gate_bias, x);
  TORCH_CHECK_VALUE(in.weight.dim() == 2 && in.weight.size(1) == x.size(-1), "weight: expected [H, D] with D = ", x.size(-1),
                    " like x, got shape ", in.weight.sizes());
  form.hidden = in.weight.size(0);
  form.width = in.weight.size(1);
  TORCH_CHECK_VALUE((in.query.dim() == 1 || in.query.dim() == 2) && in.query.size(-1) == form.hidden,
                    "query: expected [H] or [J, H] with H = ", form.hidden, " like weight, got shape ", in.query.sizes());
  form.heads = in.query.dim() == 2 ? in.query.size(0) : 1;
  check_shape("bias", in.bias, {form.hidden});
  check_shape("gate_weight", in.gate_weight, in.weight.sizes());
  TORCH_CHECK_VALUE(in.gate_weight || !in.gate_bias, "gate_bias: expected None without gate_weight, got a tensor");
  check_shape("gate_bias", in.gate_bias, {form.hidden});
  check_one_of(in.mask, in.lengths, in.cu_seqlens);
  form.gated = in.gate_weight.has_value();
}

void AttentionPoolArguments::find_shapes(const AttentionPoolInputs& in, AttentionPoolForm& form) {
  const bool has_heads = in.query.dim() == 2;
  const int64_t length = x.size(-2), sequences = in.cu_seqlens ? std::max<int64_t>(0, in.cu_seqlens->numel() - 1) : x.size(0);
  out_shape = {sequences};
  if (has_heads) out_shape.push_back(form.heads);
  out_shape.push_back(form.width);
  if (!packed_rows()) score_shape.push_back(sequences);
  if (has_heads) score_shape.push_back(form.heads);
  score_shape.push_back(length);
  kept_shape = {packed_rows() ? length : sequences * length, (form.gated ? 2 : 1) * form.hidden};
  form.score_head = length;
  form.score_row = packed_rows() ? 1 : form.heads;
}

void AttentionPoolArguments::check_saved(const AttentionPoolSaved& saved, AttentionPoolForm& form) {
  if (saved.dout) {
    check_device("dout", *saved.dout, x);
    check_shape("dout", saved.dout, out_shape);
    TORCH_CHECK_TYPE(saved.dout->scalar_type() == x.scalar_type(), "dout: expected ", x.scalar_type(), " like x, got ",
                     saved.dout->scalar_type());
  }
  if (saved.dscores) {
    check_device("dscores", *saved.dscores, x);
    TORCH_CHECK_VALUE(returned != Returned::none, "dscores: expected None where no scores are returned, got a tensor");
    check_shape("dscores", saved.dscores, score_shape);
    TORCH_CHECK_TYPE(saved.dscores->scalar_type() == sum_type, "dscores: expected ", sum_type, ", got ", saved.dscores->scalar_type());
  }
  check_returned("scores", saved.scores, x, score_shape, sum_type);
  check_returned("max_sum", saved.max_sum, x, {batch(), form.heads, 2}, sum_type);
  check_returned("pooled", saved.pooled, x, out_shape, sum_type);
  if (saved.kept) check_returned("kept", *saved.kept, x, kept_shape, x.scalar_type());
  form.dout = contiguous(saved.dout);
  form.dscores = contiguous(saved.dscores);
  form.scores = const_cast<void*>(contiguous(saved.scores));
  form.max_sum = const_cast<void*>(contiguous(saved.max_sum));
  form.pooled = const_cast<void*>(contiguous(saved.pooled));
  form.kept = const_cast<void*>(contiguous(saved.kept));
}

const void* AttentionPoolArguments::contiguous(const OptionalTensor& t) {
  if (!t) return nullptr;
  keep_.push_back(t->contiguous());
  return keep_.back().const_data_ptr();
}

}  // namespace pykernels
