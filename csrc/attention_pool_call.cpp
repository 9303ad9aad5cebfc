#include "attention_pool_call.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

namespace pykernels {
namespace {

// What a unit of work reads again from its own cache.
constexpr int64_t kPanelBytes = 256 << 10;

}  // namespace

AttentionPoolCall::AttentionPoolCall(const AttentionPoolInputs& in) : x(in.x) {
  args.act = choose<PoolAct>("activation", in.activation,
                             {{"tanh", PoolAct::tanh}, {"swish", PoolAct::swish}, {"relu", PoolAct::relu}, {"gelu", PoolAct::gelu}});
  returned = choose<Returned>("return_scores", in.return_scores,
                              {{"none", Returned::none}, {"raw", Returned::raw}, {"softmax", Returned::softmax}});
  args.softmax_returned = returned == Returned::softmax;
  check_shapes(in);
  kernels = PYKERNELS_OF_TIER(tier_for(dtype), attention_pool_kernels)(dtype, dtype == Dtype::float32 && float32_allows_bf16());
  sequences = sequences_of(x, in.mask, in.lengths, in.cu_seqlens, keep_);
  has_dead_rows = in.mask || in.lengths;
  args.sequences = sequences.data();
  args.x_row = x.stride(-2);
  args.x_column = x.size(-1) == 1 ? 1 : x.stride(-1);

  const bool packed_rows = x.dim() == 2, has_heads = in.query.dim() == 2;
  const int64_t length = x.size(-2);
  out_shape = {batch()};
  if (has_heads) out_shape.push_back(args.heads);
  out_shape.push_back(args.width);
  if (!packed_rows) score_shape.push_back(batch());
  if (has_heads) score_shape.push_back(args.heads);
  score_shape.push_back(length);
  kept_shape = {packed_rows ? length : batch() * length, (args.gated ? 2 : 1) * args.hidden};
  args.score_head = length;
  args.score_row = packed_rows ? 1 : args.heads;

  args.dh_half = (args.hidden + kernels->depth_unit - 1) / kernels->depth_unit * kernels->depth_unit;
  args.dh_row = (args.gated ? 2 : 1) * args.dh_half + 64 / kernels->panel_size;  // one cache line: rows at powers of two share cache sets
  cut_chunks();
}

void AttentionPoolCall::check_shapes(const AttentionPoolInputs& in) {
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
  args.hidden = in.weight.size(0);
  args.width = in.weight.size(1);
  TORCH_CHECK_VALUE((in.query.dim() == 1 || in.query.dim() == 2) && in.query.size(-1) == args.hidden,
                    "query: expected [H] or [J, H] with H = ", args.hidden, " like weight, got shape ", in.query.sizes());
  args.heads = in.query.dim() == 2 ? in.query.size(0) : 1;
  check_shape("bias", in.bias, {args.hidden});
  check_shape("gate_weight", in.gate_weight, in.weight.sizes());
  TORCH_CHECK_VALUE(in.gate_weight || !in.gate_bias, "gate_bias: expected None without gate_weight, got a tensor");
  check_shape("gate_bias", in.gate_bias, {args.hidden});
  check_one_of(in.mask, in.lengths, in.cu_seqlens);
  args.gated = in.gate_weight.has_value();

  const auto contiguous = [&](const OptionalTensor& t) -> const void* {
    if (!t) return nullptr;
    keep_.push_back(t->contiguous());
    return keep_.back().const_data_ptr();
  };
  weight = contiguous(in.weight);
  gate_weight = contiguous(in.gate_weight);
  args.query = contiguous(in.query);
  args.bias = contiguous(in.bias);
  args.gate_bias = contiguous(in.gate_bias);
}

// From the first live row of each sequence on, and of a size that depends on D alone, so that results do not move with padding.
void AttentionPoolCall::cut_chunks() {
  constexpr int64_t kMost = 64, kLeast = 32;
  const int64_t row_bytes = std::max<int64_t>(1, args.width * kernels->panel_size);
  const int64_t rows = std::clamp(kPanelBytes / row_bytes / kLeast * kLeast, kLeast, kMost);
  alone_.reserve(sequences.size());
  first_chunk.reserve(sequences.size() + 1);
  for (size_t s = 0; s < sequences.size(); s++) {
    const Sequence& sequence = sequences[s];
    first_chunk.push_back(static_cast<int64_t>(chunks.size()));
    int64_t row = 0;
    while (sequence.mask && row < sequence.live && !sequence.mask[row]) row++;
    for (; row < sequence.live; row += rows) {
      const int64_t n = std::min(rows, sequence.live - row);
      if (!sequence.mask || std::memchr(sequence.mask + row, 1, static_cast<size_t>(n)))
        chunks.push_back({static_cast<int64_t>(s), row, n});
    }
    alone_.push_back(static_cast<int64_t>(chunks.size()) - first_chunk.back() == 1);
    has_dead_rows |= sequence.live == 0;
  }
  first_chunk.push_back(static_cast<int64_t>(chunks.size()));
  args.alone = alone_.data();
}

int64_t AttentionPoolCall::live_rows() const {
  int64_t rows = 0;
  for (const Block& chunk : chunks) rows += chunk.rows;
  return rows;
}

int64_t AttentionPoolCall::unit_rows() const {
  constexpr int64_t kMost = 512;
  const int64_t fits = kPanelBytes / std::max<int64_t>(1, args.width * kernels->panel_size);
  return std::min(fits, kMost);
}

}  // namespace pykernels
