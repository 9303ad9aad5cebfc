// Backward of lora_linear for PyTorch on the CPU: allocation and distribution of work. The derivation and the arithmetic are in
// kernels/cpu/lora_linear_bwd.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "lora_linear_call.h"
#include "parallel.h"

namespace pykernels {
namespace {

void* pointer(const at::Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

// dS of all rows, and the gradients that are sums over rows: partial sums that each take a fixed share of the units.
void adapter_gradients(const LoraLinearCall& call, void* da, void* db, void* dbias) {
  const LoraLinearArgs& args = call.args;
  const LoraLinearKernels& k = *call.kernels;
  const Work work = call.low_rank_work();
  const int64_t elements = k.partial_elements(args), bytes = std::max<int64_t>(1, elements * k.sum_size);
  const int64_t partials = partial_sums(WeightGradient{.columns = 1, .partial_bytes = bytes, .run = {}}, work.size());
  const bool wanted = da || db || dbias;
  const at::Tensor sums = at::zeros({wanted ? partials * bytes : 0}, at::kByte);
  auto* const to = static_cast<char*>(pointer(sums));
  parallel_items(partials, 0, [&](int64_t p, void*) {
    for (int64_t unit = work.size() * p / partials; unit < work.size() * (p + 1) / partials; unit++) {
      const Block& block = work[unit].data[0];
      if (args.ds) k.backward_shrink(args, block.first, block.rows);
      if (wanted) k.backward_adapters(args, block.first, block.rows, to + p * bytes, da, db, dbias);
    }
  });
  if (wanted) k.reduce_adapters(args, call.adapters, to, partials, da, db, dbias);
}

void input_gradient(const LoraLinearCall& call) {
  const LoraLinearArgs& args = call.args;
  const LoraLinearKernels& k = *call.kernels;
  if (args.rows <= k.few_rows) {
    return few_rows(k.few_scratch, args.rows, args.out, args.in,
                    [&](int64_t begin, int64_t end, void* scratch) { k.backward_input_few(args, begin, end, scratch); });
  }
  const Work work = call.product_work();
  const ProductWork product{
      .columns = k.column_blocks(args.in),
      .packed_bytes = k.packed_bytes(args.out),
      .activation_bytes = args.rows * args.out * k.panel_size,
      .prepared_bytes = k.prepared_bytes(work.max_rows(), args.out),
      .pack = [&](void* to, int64_t begin, int64_t end) { k.pack_transposed(args, to, begin, end); },
      .prepare = [&](const Blocks& blocks,
                     void* prepared) { k.prepare(args.dy, args.dy_row, args.out, args.rows, blocks.data[0].first, blocks.rows, prepared); },
      .run = [&](const void* packed, const Blocks& blocks, int64_t begin, int64_t end,
                 const void* prepared) { k.backward_input(args, packed, blocks.data[0].first, blocks.rows, begin, end, prepared); }};
  run_product(product, work, nullptr);
}

void weight_gradient(const LoraLinearCall& call, void* dweight) {
  constexpr int64_t kRows = 256, kReduceRows = 16;
  const LoraLinearArgs& args = call.args;
  const LoraLinearKernels& k = *call.kernels;
  const Work work = call.low_rank_work(kRows);
  const WeightGradient gradient{.columns = k.column_blocks(args.in),
                                .partial_bytes = std::max<int64_t>(1, k.weight_partial_elements(args) * k.sum_size),
                                .run = [&](const Blocks& blocks, void* partial, bool add, int64_t begin, int64_t end, void* scratch) {
                                  k.backward_weight(args, blocks.data[0].first, blocks.rows, partial, add, begin, end, scratch);
                                }};
  const int64_t partials = partial_sums(gradient, work.size());
  const at::Tensor buffer = at::empty({partials * gradient.partial_bytes}, at::kByte);
  if (work.size() == 0) buffer.zero_();
  run_weight_gradient(gradient, work, k.backward_weight_scratch(args, work.max_rows()), partials, false, buffer.mutable_data_ptr());
  parallel_items((args.out + kReduceRows - 1) / kReduceRows, 0, [&](int64_t item, void*) {
    k.reduce_weight(args, buffer.const_data_ptr(), partials, dweight, item * kReduceRows, std::min(args.out, (item + 1) * kReduceRows));
  });
}

// Gradients of one projection; that of x is written to dx, or added to it.
void run(LoraLinearCall& call, const at::Tensor& dy, const at::Tensor& s, const at::Tensor& keep, const at::Tensor& dx, bool add_to_dx,
         const at::Tensor& dweight, const at::Tensor& da, const at::Tensor& db, const at::Tensor& dbias) {
  LoraLinearArgs& args = call.args;
  const at::Tensor dy_rows = rows_of(dy, args.out);
  at::Tensor ds = at::empty({dx.numel() || da.numel() ? args.rows : 0, args.rank}, s.options());
  args.dy = elements_of(dy_rows);
  args.dy_row = dy_rows.stride(0);
  args.s = elements_of(s);
  args.ds = pointer(ds);
  args.dx = pointer(dx);
  args.add_to_dx = add_to_dx;
  if (keep.numel()) args.keep = const_cast<uint8_t*>(keep.const_data_ptr<uint8_t>());
  adapter_gradients(call, pointer(da), pointer(db), pointer(dbias));
  if (dweight.numel()) weight_gradient(call, pointer(dweight));
  if (args.dx) input_gradient(call);
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients lora_linear_bwd(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                          const at::Tensor& lora_b, const OptionalTensor& bias, const OptionalTensor& scales,
                          const OptionalTensor& adapter_index, const OptionalTensor& seed, const at::Tensor& s, const at::Tensor& keep,
                          double scale, double dropout, std::array<bool, 5> needs) {
  LoraLinearCall call({x, weight, lora_a, lora_b, bias, scales, adapter_index, seed, scale, dropout});
  call.check_incoming(dy, s, keep, call.keep_bytes());
  const Gradients gradients{gradient_like(needs[0], x, x), gradient_like(needs[1], weight, x), gradient_like(needs[2], lora_a, x),
                            gradient_like(needs[3], lora_b, x), gradient_like(needs[4], bias, x)};
  const auto& [dx, dweight, da, db, dbias] = gradients;
  run(call, dy, s, keep, dx, false, dweight, da, db, dbias);
  return gradients;
}

std::vector<at::Tensor> lora_linear_stacked_bwd(const OptionalTensors& dys, const at::Tensor& x, at::TensorList weights,
                                                at::TensorList lora_a, at::TensorList lora_b, const OptionalTensors& biases,
                                                const OptionalTensor& seed, at::TensorList saved, at::ArrayRef<double> scales,
                                                double dropout, const c10::List<bool>& needs) {
  constexpr size_t kEach = 4;  // dweight, dlora_a, dlora_b, dbias
  auto calls = stacked_calls({x, weights, lora_a, lora_b, biases, seed, scales, dropout});
  check_stacked_incoming(calls.size(), dys.size(), saved.size(), needs.size());
  std::vector<at::Tensor> gradients{gradient_like(needs.get(0), x, x)};
  bool written = false;
  for (size_t i = 0; i < calls.size(); i++) {
    const OptionalTensor dy = dys.get(i), bias = biases.get(i);
    const auto of = [&](size_t j, const OptionalTensor& like) { return gradient_like(needs.get(1 + kEach * i + j) && dy, like, x); };
    gradients.insert(gradients.end(), {of(0, weights[i]), of(1, lora_a[i]), of(2, lora_b[i]), of(3, bias)});
    if (!dy) continue;
    calls[i].check_incoming(*dy, saved[2 * i], saved[2 * i + 1], calls[i].keep_bytes());
    const at::Tensor* own = &gradients[1 + kEach * i];
    run(calls[i], *dy, saved[2 * i], saved[2 * i + 1], gradients[0], written, own[0], own[1], own[2], own[3]);
    written = true;
  }
  if (!written) gradients[0].zero_();
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("_lora_linear_bwd", &lora_linear_bwd);
  m.impl("_lora_linear_stacked_bwd", &lora_linear_stacked_bwd);
}

}  // namespace pykernels
