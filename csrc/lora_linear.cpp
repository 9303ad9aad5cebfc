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

void lora_linear_forward(LoraLinearCall& call) {
  LoraLinearArgs& args = call.args;
  const LoraLinearKernels& k = *call.kernels;
  shrink(call);
  if (args.rows <= k.few_rows) {
    return few_rows(k.few_scratch, args.rows, args.in, args.out,
                    [&](int64_t begin, int64_t end, void* scratch) { k.forward_few(args, begin, end, scratch); });
  }
  const Work work = call.product_work();
  const ProductWork product{.columns = k.column_blocks(args.out),
                            .packed_bytes = k.packed_bytes(args.in),
                            .activation_bytes = args.rows * args.in * k.panel_size,
                            .pack = [&](void* to, int64_t begin, int64_t end) { k.pack(args, to, begin, end); },
                            .run = [&](const void* packed, const Blocks& blocks, int64_t begin, int64_t end,
                                       void* scratch) { k.forward(args, packed, blocks.data[0].first, blocks.rows, begin, end, scratch); }};
  at::Tensor x;
  if (runs_by_columns(product, work)) {  // every column block reads all rows again
    x = spread_rows(call.x);
    args.x = x.const_data_ptr();
    args.x_row = x.stride(0);
  }
  run_product(product, work, k.product_scratch(work.max_rows(), args.in), nullptr);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_linear_fwd(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                                                               const at::Tensor& lora_b, const OptionalTensor& bias,
                                                               const OptionalTensor& scales, const OptionalTensor& adapter_index,
                                                               const OptionalTensor& seed, double scale, double dropout) {
  LoraLinearCall call({x, weight, lora_a, lora_b, bias, scales, adapter_index, seed, scale, dropout});
  LoraLinearArgs& args = call.args;
  at::Tensor y = at::empty(call.out_shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  const auto sums = x.options().dtype(call.sum_type);
  at::Tensor s = args.adapter_of ? at::zeros({args.rows, args.rank}, sums) : at::empty({args.rows, args.rank}, sums);
  at::Tensor keep = at::empty({call.keep_bytes()}, x.options().dtype(at::kByte));
  if (y.numel() == 0) return {y, s.zero_(), keep.zero_()};
  args.y = y.mutable_data_ptr();
  args.s = s.mutable_data_ptr();
  if (keep.numel()) {
    args.keep = keep.mutable_data_ptr<uint8_t>();
    args.keep[keep.numel() - 1] = 0;
  }
  lora_linear_forward(call);
  return {y, s, keep};
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("_lora_linear_fwd", &lora_linear_fwd); }

}  // namespace pykernels
