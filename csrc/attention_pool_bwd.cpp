// Backward of attention_pool for PyTorch on the CPU: allocation and distribution of work. The derivation and the arithmetic are in
// kernels/cpu/attention_pool_bwd.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "attention_pool_call.h"
#include "parallel.h"
#include "product_work.h"

namespace pykernels {
namespace {

// Never null, even where no hidden unit or column exists.
at::Tensor bytes(int64_t n) { return at::empty({std::max<int64_t>(1, n)}, at::kByte); }

// Where each unit's rows of dh begin, and how many rows there are in all.
std::vector<int64_t> dh_rows(const Work& work, int64_t pad) {
  std::vector<int64_t> first{0};
  for (int64_t i = 0; i < work.size(); i++) first.push_back(first.back() + (work[i].rows + pad - 1) / pad * pad);
  return first;
}

struct Wanted {
  bool dx, weights;
  void *dweight, *dgate_weight, *dquery, *dbias, *dgate_bias;  // null where not wanted
};

// The units of work go through in waves: dh of one wave exists at a time, and stays in a cache that all threads share. Neither waves nor
// units depend on the number of threads, and sums are taken over units in their order.
void run(AttentionPoolCall& call, const Wanted& wanted) {
  constexpr int64_t kWaveBytes = 16 << 20;
  AttentionPoolArgs& args = call.args;
  const AttentionPoolKernels& k = *call.kernels;
  parallel_items(call.batch(), 0, [&](int64_t s, void*) { k.backward_delta(args, s); });

  constexpr int64_t group = 256;  // rows of a unit: what a partial sum of dW is read and written for
  const int64_t row_bytes = std::max<int64_t>(1, args.dh_row * k.panel_size);
  const int64_t wave_rows = std::max(group, kWaveBytes / row_bytes);
  std::vector<Work> waves;
  size_t widest = 0;
  int64_t units = 0, dh_bytes = 0, max_rows = 0, max_chunks = 0;
  for (size_t begin = 0, end = 0; begin < call.chunks.size(); begin = end) {
    int64_t rows = 0;
    while (end < call.chunks.size() && (end == begin || rows + call.chunks[end].rows <= wave_rows)) rows += call.chunks[end++].rows;
    waves.emplace_back(std::vector<Block>(call.chunks.begin() + begin, call.chunks.begin() + end), group);
    const Work& work = waves.back();
    if (work.size() > waves[widest].size()) widest = waves.size() - 1;
    units += work.size();
    dh_bytes = std::max(dh_bytes, dh_rows(work, k.row_pad).back() * row_bytes);
    max_rows = std::max(max_rows, work.max_rows());
    for (int64_t i = 0; i < work.size(); i++) max_chunks = std::max(max_chunks, work[i].count);
  }

  const auto pack = [&](void* to, int64_t begin, int64_t end) { k.pack(args, to, call.weight, call.gate_weight, begin, end); };
  const auto pack_transposed = [&](void* to, int64_t begin, int64_t end) {
    k.pack_transposed(args, to, call.weight, call.gate_weight, begin, end);
  };
  const at::Tensor packed = args.kept ? bytes(0) : packed_weights(k.column_blocks(args), k.packed_bytes(args), pack);
  const at::Tensor transposed =
      wanted.dx ? packed_weights(k.input_column_blocks(args), k.packed_transposed_bytes(args), pack_transposed) : bytes(0);
  const int64_t sum_bytes = k.sum_elements(args) * k.sum_size;
  const at::Tensor sums = bytes(units * sum_bytes), dh = bytes(dh_bytes);
  auto* const sum = static_cast<char*>(sums.mutable_data_ptr());
  auto* const dh_memory = static_cast<char*>(dh.mutable_data_ptr());

  std::vector<int64_t> first;
  WeightGradient gradient{
      .columns = k.input_column_blocks(args), .partial_bytes = std::max<int64_t>(1, k.partial_elements(args) * k.sum_size), .run = {}};
  const int64_t partials = waves.empty() ? 1 : partial_sums(gradient, waves[widest].size());
  const at::Tensor buffer = bytes(wanted.weights ? partials * gradient.partial_bytes : 0);
  if (waves.empty() || (wanted.weights && waves[widest].size() < partials)) buffer.zero_();
  int64_t done = 0;
  for (const Work& work : waves) {
    first = dh_rows(work, k.row_pad);
    parallel_items(work.size(), k.backward_scratch(args, max_rows, max_chunks), [&](int64_t item, void* scratch) {
      k.backward_rows(args, packed.const_data_ptr(), wanted.dx ? transposed.const_data_ptr() : nullptr, work[item],
                      dh_memory + first[item] * row_bytes, sum + (done + item) * sum_bytes, scratch);
    });
    if (wanted.weights) {
      gradient.run = [&](const Blocks& blocks, void* partial, bool add, int64_t begin, int64_t end, void* scratch) {
        k.backward_weight(args, blocks, dh_memory + first[&blocks - &work[0]] * row_bytes, partial, add, begin, end, scratch);
      };
      run_weight_gradient(gradient, work, k.backward_weight_scratch(args, max_rows, max_chunks), partials, done > 0,
                          buffer.mutable_data_ptr());
    }
    done += work.size();
  }
  k.reduce_sums(args, sum, units, wanted.dbias, wanted.dgate_bias, wanted.dquery);
  if (wanted.weights) {
    constexpr int64_t kRows = 16;
    const int64_t outputs = (args.gated ? 2 : 1) * args.hidden;
    parallel_items((outputs + kRows - 1) / kRows, 0, [&](int64_t item, void*) {
      k.reduce_weight(args, buffer.const_data_ptr(), partials, wanted.dweight, wanted.dgate_weight, item * kRows,
                      std::min(outputs, (item + 1) * kRows));
    });
  }
}

void zero_dead(const AttentionPoolCall& call) {
  const int64_t row_bytes = call.args.width * static_cast<int64_t>(call.x.element_size());
  parallel_items(call.batch(), 0, [&](int64_t s, void*) {
    const Sequence& sequence = call.sequences[s];
    call.for_dead_rows(sequence, [&](int64_t first, int64_t count) {
      std::memset(static_cast<char*>(call.args.dx) + (sequence.in_row + first) * row_bytes, 0, static_cast<size_t>(count * row_bytes));
    });
  });
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients attention_pool_bwd(const OptionalTensor& dout, const OptionalTensor& dscores, const at::Tensor& x, const at::Tensor& weight,
                             const at::Tensor& query, const OptionalTensor& bias, const OptionalTensor& gate_weight,
                             const OptionalTensor& gate_bias, const OptionalTensor& mask, const OptionalTensor& lengths,
                             const OptionalTensor& cu_seqlens, const at::Tensor& scores, const at::Tensor& max_sum,
                             const at::Tensor& pooled, const OptionalTensor& kept, std::string_view activation,
                             std::string_view return_scores, std::array<bool, 6> needs) {
  AttentionPoolCall call({x, weight, query, bias, gate_weight, gate_bias, mask, lengths, cu_seqlens, activation, return_scores});
  AttentionPoolArgs& args = call.args;
  call.check_saved({dout, dscores, scores, max_sum, pooled, kept});

  const auto gradient = [&](bool needed, const OptionalTensor& like) {
    return at::empty(needed && like ? like->sizes() : at::IntArrayRef({0}), x.options());
  };
  const Gradients gradients{gradient(needs[0], x),    gradient(needs[1], weight),      gradient(needs[2], query),
                            gradient(needs[3], bias), gradient(needs[4], gate_weight), gradient(needs[5], gate_bias)};
  const auto pointer = [](const at::Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; };
  const Wanted wanted{.dx = std::get<0>(gradients).numel() > 0,
                      .weights = std::get<1>(gradients).numel() > 0 || std::get<4>(gradients).numel() > 0,
                      .dweight = pointer(std::get<1>(gradients)),
                      .dgate_weight = pointer(std::get<4>(gradients)),
                      .dquery = pointer(std::get<2>(gradients)),
                      .dbias = pointer(std::get<3>(gradients)),
                      .dgate_bias = pointer(std::get<5>(gradients))};
  const at::Tensor delta = at::empty({call.batch(), args.heads}, max_sum.options());
  args.delta = delta.mutable_data_ptr();
  args.dx = pointer(std::get<0>(gradients));
  if (wanted.dx && call.has_dead_rows) zero_dead(call);
  run(call, wanted);
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("_attention_pool_bwd", &attention_pool_bwd); }

}  // namespace pykernels
