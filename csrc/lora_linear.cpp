// Forward of lora_linear for PyTorch on the CPU: allocation and distribution of work. The arithmetic is in kernels/cpu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "lora_linear_call.h"
#include "parallel.h"

namespace pykernels {
namespace {

// Dropout bits and S, which the epilogues of all column blocks read.
void shrink(const LoraLinearCall& call) {
  const LoraLinearArgs& args = call.args;
  if (args.rank == 0 && !args.keep) return;
  const auto shrink_rows = [&](int64_t first, int64_t count) {
    if (args.keep) call.kernels->keep_bits(args, first, count);
    call.kernels->shrink(args, first, count);
  };
  if (args.rows <= call.kernels->few_rows) return shrink_rows(0, args.rows);  // no thread is worth waking
  const Work work = call.low_rank_work();
  parallel_items(work.size(), 0, [&](int64_t item, void*) { shrink_rows(work[item].data[0].first, work[item].data[0].rows); });
}

// The base products of several projections as one: their column blocks follow each other, so that a unit of rows serves all.
void forward_products(const std::vector<LoraLinearCall*>& calls) {
  const LoraLinearCall& first = *calls[0];
  const LoraLinearKernels& k = *first.kernels;
  std::vector<int64_t> starts{0};
  for (const LoraLinearCall* call : calls) starts.push_back(starts.back() + k.column_blocks(call->args.out));
  const int64_t packed_bytes = k.packed_bytes(first.args.in);
  // Calls part(call, begin, end, place) for the column blocks [begin, end) of each projection; place is where the first one lies packed.
  const auto by_projection = [&](int64_t begin, int64_t end, const auto& part) {
    for (size_t i = 0; i < calls.size(); i++) {
      const int64_t from = std::max(begin, starts[i]), to = std::min(end, starts[i + 1]);
      if (from < to) part(calls[i]->args, from - starts[i], to - starts[i], (from - begin) * packed_bytes);
    }
  };
  const Work work = first.product_work();
  const ProductWork product{.columns = starts.back(),
                            .packed_bytes = packed_bytes,
                            .activation_bytes = first.args.rows * first.args.in * k.panel_size,
                            .prepared_bytes = k.prepared_bytes(work.max_rows(), first.args.in),
                            .pack =
                                [&](void* packed, int64_t begin, int64_t end) {
                                  by_projection(begin, end, [&](const LoraLinearArgs& args, int64_t from, int64_t to, int64_t place) {
                                    k.pack(args, static_cast<char*>(packed) + place, from, to);
                                  });
                                },
                            .prepare =
                                [&](const Blocks& blocks, void* prepared) {
                                  const LoraLinearArgs& a = first.args;
                                  k.prepare(a.x, a.x_row, a.in, a.rows, blocks.data[0].first, blocks.rows, prepared);
                                },
                            .run =
                                [&](const void* packed, const Blocks& blocks, int64_t begin, int64_t end, const void* prepared) {
                                  by_projection(begin, end, [&](const LoraLinearArgs& args, int64_t from, int64_t to, int64_t place) {
                                    k.forward(args, static_cast<const char*>(packed) + place, blocks.data[0].first, blocks.rows, from, to,
                                              prepared);
                                  });
                                }};
  run_product(product, work, nullptr);
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// y, s and keep of a call, which points into them.
Outputs allocate(LoraLinearCall& call, const at::Tensor& x) {
  LoraLinearArgs& args = call.args;
  at::Tensor y = at::empty(call.out_shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  const auto sums = x.options().dtype(call.sum_type);
  const bool unwritten = args.adapter_of || y.numel() == 0;  // rows without an adapter
  at::Tensor s = unwritten ? at::zeros({args.rows, args.rank}, sums) : at::empty({args.rows, args.rank}, sums);
  at::Tensor keep = at::empty({call.keep_bytes()}, x.options().dtype(at::kByte));
  if (y.numel() == 0) return {y, s, keep.zero_()};
  args.y = y.mutable_data_ptr();
  args.s = elements_of(s);
  if (keep.numel()) {
    args.keep = keep.mutable_data_ptr<uint8_t>();
    args.keep[keep.numel() - 1] = 0;
  }
  return {y, s, keep};
}

// Calls with outputs, which have the same x.
void run(const std::vector<LoraLinearCall*>& calls) {
  if (calls.empty()) return;
  for (const LoraLinearCall* call : calls) shrink(*call);
  const LoraLinearKernels& k = *calls[0]->kernels;
  if (calls[0]->args.rows > k.few_rows) return forward_products(calls);
  for (const LoraLinearCall* call : calls) {
    const LoraLinearArgs& args = call->args;
    few_rows(k.few_scratch, args.rows, args.in, args.out,
             [&](int64_t begin, int64_t end, void* scratch) { k.forward_few(args, begin, end, scratch); });
  }
}

Outputs lora_linear_fwd(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a, const at::Tensor& lora_b,
                        const OptionalTensor& bias, const OptionalTensor& scales, const OptionalTensor& adapter_index,
                        const OptionalTensor& seed, double scale, double dropout) {
  LoraLinearCall call({x, weight, lora_a, lora_b, bias, scales, adapter_index, seed, scale, dropout});
  Outputs outputs = allocate(call, x);
  if (call.args.y) run({&call});
  return outputs;
}

std::vector<at::Tensor> lora_linear_stacked_fwd(const at::Tensor& x, at::TensorList weights, at::TensorList lora_a, at::TensorList lora_b,
                                                const OptionalTensors& biases, const OptionalTensor& seed, at::ArrayRef<double> scales,
                                                double dropout) {
  auto calls = stacked_calls({x, weights, lora_a, lora_b, biases, seed, scales, dropout});
  std::vector<at::Tensor> results;
  std::vector<LoraLinearCall*> with_outputs;
  for (LoraLinearCall& call : calls) {
    auto [y, s, keep] = allocate(call, x);
    results.insert(results.end(), {y, s, keep});
    if (call.args.y) with_outputs.push_back(&call);
  }
  run(with_outputs);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("_lora_linear_fwd", &lora_linear_fwd);
  m.impl("_lora_linear_stacked_fwd", &lora_linear_stacked_fwd);
}

}  // namespace pykernels
