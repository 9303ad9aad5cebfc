// Forward of attention_pool for PyTorch on the CPU: allocation and distribution of work. The arithmetic is in kernels/cpu.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "attention_pool_call.h"
#include "parallel.h"
#include "product_work.h"

namespace pykernels {
namespace {

// Units of work: several chunks where these are short, fewer where threads would find nothing to do. Never changes a result.
Work forward_work(const AttentionPoolCall& call) {
  constexpr int64_t kUnitsPerThread = 4;
  const int64_t share = call.live_rows() / (kUnitsPerThread * at::get_num_threads());
  return Work(call.chunks, std::max(2 * call.kernels->row_tile, std::min(call.unit_rows(), share)));
}

// Zeros where a sequence has no live row, and in what is kept of rows that are masked.
void zero_dead(const AttentionPoolCall& call) {
  const AttentionPoolArgs& args = call.args;
  const auto zero = [](void* base, int64_t first, int64_t count, int64_t size) {
    if (base) std::memset(static_cast<char*>(base) + first * size, 0, static_cast<size_t>(count * size));
  };
  const int64_t size = static_cast<int64_t>(call.x.element_size()), sum_size = call.kernels->sum_size;
  for (size_t s = 0; s < call.sequences.size(); s++) {
    const Sequence& sequence = call.sequences[s];
    if (call.first_chunk[s] == call.first_chunk[s + 1]) {
      const int64_t first = sequence.index * args.heads * args.width, count = args.heads * args.width;
      zero(args.out, first, count, size);
      zero(args.pooled, first, count, sum_size);
      zero(args.max_sum, 2 * sequence.index * args.heads, 2 * args.heads, sum_size);
    }
    if (!args.scores) continue;
    call.for_dead_rows(sequence, [&](int64_t first, int64_t count) {
      for (int64_t j = 0; j < args.heads; j++) {
        const int64_t at = sequence.in_row * args.score_row + j * args.score_head + first;
        zero(args.scores, at, count, sum_size);
        zero(args.weights, at, count, sum_size);
      }
      const int64_t kept = call.kept_shape.back();
      zero(args.kept, (sequence.in_row + first) * kept, count * kept, size);
    });
  }
}

void attention_pool_forward(AttentionPoolCall& call) {
  AttentionPoolArgs& args = call.args;
  const AttentionPoolKernels& k = *call.kernels;
  if (call.has_dead_rows) zero_dead(call);
  const Work work = forward_work(call);
  if (work.size() == 0) return;
  args.chunks = work[0].data;

  std::vector<int64_t> split;  // sequences of several chunks
  for (int64_t s = 0; s < call.batch(); s++) {
    if (call.first_chunk[s + 1] - call.first_chunk[s] > 1) split.push_back(s);
  }
  at::Tensor parts;
  if (!split.empty()) {
    parts = at::empty({static_cast<int64_t>(call.chunks.size()) * args.heads * (args.width + 2) * k.sum_size}, at::kByte);
    args.parts = parts.mutable_data_ptr();
  }
  const at::Tensor packed = packed_weights(k.column_blocks(args), k.packed_bytes(args), [&](void* to, int64_t begin, int64_t end) {
    k.pack(args, to, call.weight, call.gate_weight, begin, end);
  });
  int64_t most_chunks = 0;
  for (int64_t i = 0; i < work.size(); i++) most_chunks = std::max(most_chunks, work[i].count);
  parallel_items(work.size(), k.forward_scratch(args, work.max_rows(), most_chunks),
                 [&](int64_t item, void* scratch) { k.forward(args, packed.const_data_ptr(), work[item], scratch); });
  parallel_items(static_cast<int64_t>(split.size()), 0, [&](int64_t item, void*) {
    const int64_t s = split[item];
    k.combine(args, s, call.first_chunk[s], call.first_chunk[s + 1] - call.first_chunk[s]);
  });
  if (args.weights) parallel_items(call.batch(), 0, [&](int64_t s, void*) { k.normalize(args, s); });
}

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Results attention_pool_fwd(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& query, const OptionalTensor& bias,
                           const OptionalTensor& gate_weight, const OptionalTensor& gate_bias, const OptionalTensor& mask,
                           const OptionalTensor& lengths, const OptionalTensor& cu_seqlens, std::string_view activation,
                           std::string_view return_scores, bool save, bool keep) {
  AttentionPoolCall call({x, weight, query, bias, gate_weight, gate_bias, mask, lengths, cu_seqlens, activation, return_scores});
  AttentionPoolArgs& args = call.args;
  using Returned = AttentionPoolCall::Returned;
  const auto sums = x.options().dtype(call.sum_type);
  const std::vector<int64_t> nothing{0};
  const auto wanted = [&](bool is, const std::vector<int64_t>& shape) -> at::IntArrayRef { return is ? shape : nothing; };
  at::Tensor out = at::empty(call.out_shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor scores = at::empty(wanted(save || call.returned != Returned::none, call.score_shape), sums);
  at::Tensor weights = at::empty(wanted(call.returned == Returned::softmax, call.score_shape), sums);
  at::Tensor max_sum = at::empty({call.batch(), args.heads, 2}, sums);
  at::Tensor pooled = at::empty(wanted(save && x.scalar_type() != call.sum_type, call.out_shape), sums);
  at::Tensor kept = at::empty(wanted(keep, call.kept_shape), out.options());
  const auto pointer = [](const at::Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; };
  args.out = pointer(out);
  args.scores = pointer(scores);
  args.weights = pointer(weights);
  args.max_sum = pointer(max_sum);
  args.pooled = pointer(pooled);
  args.kept = pointer(kept);
  if (args.heads > 0) attention_pool_forward(call);
  return {out, scores, weights, max_sum, pooled, kept};
}

}  // namespace

at::Tensor packed_weights(int64_t columns, int64_t bytes, const std::function<void(void* to, int64_t begin, int64_t end)>& pack) {
  constexpr int64_t kSmall = 64 << 10;  // packed by one thread sooner than by several
  at::Tensor buffer = at::empty({columns * bytes}, at::kByte);
  auto* to = static_cast<char*>(buffer.mutable_data_ptr());
  if (columns * bytes <= kSmall)
    pack(to, 0, columns);
  else
    parallel_items(columns, 0, [&](int64_t block, void*) { pack(to + block * bytes, block, block + 1); });
  return buffer;
}

TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("_attention_pool_fwd", &attention_pool_fwd); }

}  // namespace pykernels
