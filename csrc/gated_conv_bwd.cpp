// Backward of gated_conv1d for PyTorch on the CPU: allocation and distribution of work. The derivation and the arithmetic are in
// kernels/cpu/gated_conv_bwd.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

#include "gated_conv_call.h"
#include "parallel.h"
#include "product_work.h"

namespace pykernels {
namespace {

// Rows that one item of the elementwise pass and one step of the weight gradient take. Sums are cut at these, so they depend on sizes
// alone.
constexpr int64_t kGateRows = 256;
constexpr int64_t kWeightPanelBytes = 1024 << 10;

at::Tensor bytes(int64_t n) { return at::empty({n}, at::kByte); }

// dh, dcond and dbias.
void backward_gate(const GatedConvCall& call, void* value_dbias, void* gate_dbias, void* sequence_dcond) {
  const GatedConvArgs& args = call.args;
  const GatedConvKernels& k = *call.kernels;
  const Work work(call.sequences, &Sequence::live_out, kGateRows, 0);  // nobody reads the rows of dh that are padding
  const int64_t row_bytes = 2 * args.c_out * k.sum_size;
  const at::Tensor sums_tensor = bytes(work.size() * row_bytes);
  char* sums = static_cast<char*>(sums_tensor.mutable_data_ptr());
  parallel_items(work.size(), k.backward_gate_scratch(args, work.max_rows()),
                 [&](int64_t item, void* scratch) { k.backward_gate(args, *work[item].data, sums + item * row_bytes, scratch); });
  if (value_dbias || gate_dbias) k.reduce_sums(args, sums, work.size(), value_dbias, gate_dbias);
  if (!sequence_dcond) return;
  const auto size = static_cast<int64_t>(call.x.element_size());
  int64_t item = 0;
  for (const Sequence& sequence : call.sequences) {
    const int64_t first = item;
    while (item < work.size() && &call.sequences[work[item].data->sequence] == &sequence) item++;
    char* row = static_cast<char*>(sequence_dcond) + sequence.index * 2 * args.c_out * size;
    k.reduce_sums(args, sums + first * row_bytes, item - first, row + call.value_column() * size, row + call.gate_column() * size);
  }
}

void backward_input(const GatedConvCall& call) {
  const GatedConvArgs& a = call.args;
  const GatedConvKernels& k = *call.kernels;
  const int64_t rows = call.block_rows(call.in_rows, 2 * a.dh_half);
  // x rows and output rows of several sequences number alike only without a shift.
  const Work work(call.sequences, &Sequence::in_rows, rows, a.shift ? 0 : 2 * k.row_tile);
  const int64_t columns = (a.c_in + 2 * k.columns - 1) / (2 * k.columns);
  const ProductWork product{
      .columns = columns,
      .packed_bytes = k.packed_transposed_bytes(a.c_out, a.c_in, a.taps) / columns,
      .activation_bytes = call.in_rows * 2 * a.dh_half * k.panel_size,
      .prepared_bytes = k.backward_input_bytes(a, work.max_rows()),
      .pack = [&](void* packed, int64_t begin,
                  int64_t end) { k.pack_transposed(packed, call.value_weight, call.gate_weight, a.c_out, a.c_in, a.taps, begin, end); },
      .prepare = [&](const Blocks& blocks, void* prepared) { k.prepare_backward_input(a, blocks, prepared); },
      .run = [&](const void* packed, const Blocks& blocks, int64_t begin, int64_t end,
                 const void* prepared) { k.backward_input(a, packed, blocks, begin, end, prepared); }};
  run_product(product, work, nullptr);
}

void backward_weight(const GatedConvCall& call, void* value_dweight, void* gate_dweight) {
  const GatedConvArgs& args = call.args;
  const GatedConvKernels& k = *call.kernels;
  const int64_t rows = std::clamp<int64_t>(kWeightPanelBytes / (2 * args.dh_half * k.panel_size) / 32 * 32, 64, 256);
  const Work work(call.sequences, &Sequence::live_out, rows, rows);
  const int64_t blocks = k.weight_column_blocks(args) / args.taps, threads = at::get_num_threads();
  if (work.size() == 1 && threads <= blocks) {
    parallel_items(threads, k.whole_weight_scratch(args, work.max_rows()), [&](int64_t item, void* scratch) {
      k.whole_weight(args, work[0], value_dweight, gate_dweight, blocks * item / threads, blocks * (item + 1) / threads, scratch);
    });
    return;
  }
  const WeightGradient gradient{.columns = k.weight_column_blocks(args),
                                .partial_bytes = k.partial_elements(args) * k.sum_size,
                                .run = [&](const Blocks& blocks, void* partial, bool add, int64_t begin, int64_t end, void* scratch) {
                                  k.backward_weight(args, blocks, partial, add, begin, end, scratch);
                                }};
  const int64_t partials = partial_sums(gradient, work.size());
  const at::Tensor buffer = bytes(partials * gradient.partial_bytes);
  if (work.size() == 0) buffer.zero_();
  void* partial = buffer.mutable_data_ptr();
  run_weight_gradient(gradient, work, k.backward_weight_scratch(args, work.max_rows()), partials, false, partial);
  constexpr int64_t kRows = 16;
  const int64_t outputs = 2 * args.c_out;
  parallel_items((outputs + kRows - 1) / kRows, 0, [&](int64_t item, void*) {
    k.reduce_weight(args, partial, partials, value_dweight, gate_dweight, item * kRows, std::min(outputs, (item + 1) * kRows));
  });
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients gated_conv_bwd(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& gate_weight, const OptionalTensor& gate_bias, const OptionalTensor& cond,
                         const OptionalTensor& mask, const OptionalTensor& lengths, const OptionalTensor& cu_seqlens,
                         const OptionalTensor& seed, const OptionalTensor& saved, int64_t dilation, std::string_view padding,
                         std::string_view residual, std::string_view value_act, std::string_view split, double gate_dropout,
                         double gate_noise, std::array<bool, 6> needs) {
  GatedConvCall call({x, weight, bias, gate_weight, gate_bias, cond, mask, lengths, cu_seqlens, seed, dilation, padding, residual,
                      value_act, split, gate_dropout, gate_noise});
  GatedConvArgs& args = call.args;
  TORCH_CHECK_VALUE(dy.sizes() == at::IntArrayRef(call.out_shape), "dy: expected shape ", call.out_shape, ", got ", dy.sizes());
  TORCH_CHECK_TYPE(dy.scalar_type() == x.scalar_type(), "dy: expected ", x.scalar_type(), " like x, got ", dy.scalar_type());

  const auto gradient = [&](bool needed, const OptionalTensor& like) {
    return at::empty(needed && like ? like->sizes() : at::IntArrayRef({0}), x.options());
  };
  at::Tensor dx = gradient(needs[0], x), dweight = gradient(needs[1], weight), dbias = gradient(needs[2], bias);
  at::Tensor dgate_weight = gradient(needs[3], gate_weight), dgate_bias = gradient(needs[4], gate_bias), dcond = gradient(needs[5], cond);
  const Gradients gradients{dx, dweight, dbias, dgate_weight, dgate_bias, dcond};
  if (call.out_rows == 0 || args.c_out == 0) {
    for (const at::Tensor& g : {dx, dweight, dbias, dgate_weight, dgate_bias, dcond}) g.zero_();
    return gradients;
  }

  const at::Tensor dy_rows = dy.contiguous();
  args.dy = dy_rows.const_data_ptr();
  at::Tensor kept, y;
  if (saved) {
    TORCH_CHECK_VALUE(saved->numel() == 2 * call.out_rows * args.c_out && saved->scalar_type() == x.scalar_type(),
                      "saved: expected what _gated_conv_fwd returned with save=True, got shape ", saved->sizes());
    kept = saved->contiguous();
  } else {
    kept = at::empty({2, call.out_rows, args.c_out}, x.options());
    y = at::empty(call.out_shape, x.options());
    args.y = y.mutable_data_ptr();
  }
  call.set_saved(const_cast<void*>(kept.const_data_ptr()));
  if (!saved) {
    gated_conv_forward(call, nullptr);
    y.reset();
  }

  const auto size = static_cast<int64_t>(x.element_size());
  const auto column = [&](const at::Tensor& t, int64_t c) { return static_cast<char*>(t.mutable_data_ptr()) + c * size; };
  const bool sequence_cond = needs[5] && cond && !args.cond_per_row;
  if (needs[5] && cond && args.cond_per_row) {
    args.value_dcond = column(dcond, call.value_column());
    args.gate_dcond = column(dcond, call.gate_column());
    args.dcond_row = 2 * args.c_out;
    if (lengths || mask) dcond.zero_();  // the rows that are padding
  }
  const at::Tensor dh = bytes(call.out_rows * args.dh_row * call.kernels->panel_size);
  args.dh = dh.mutable_data_ptr();
  // A bias that is not wanted, or not there, has its sums written to a row that nobody reads.
  const at::Tensor unused = at::empty({2 * args.c_out}, x.options());
  const bool has_dbias = needs[2] && bias, has_dgate_bias = needs[4] && gate_bias;
  void* value_dbias = !has_dbias ? column(unused, 0) : gate_weight ? column(dbias, 0) : column(dbias, call.value_column());
  void* gate_dbias = has_dgate_bias              ? column(dgate_bias, 0)
                     : has_dbias && !gate_weight ? column(dbias, call.gate_column())
                                                 : column(unused, args.c_out);
  backward_gate(call, value_dbias, gate_dbias, sequence_cond ? dcond.mutable_data_ptr() : nullptr);

  if (needs[0] && dx.numel() > 0) {
    args.dx = dx.mutable_data_ptr();
    backward_input(call);
  }
  const bool has_dgate_weight = needs[3] && gate_weight;
  if ((needs[1] || has_dgate_weight) && weight.numel() > 0) {
    const int64_t half = args.c_out * args.c_in * args.taps;
    const auto wanted = [&](bool needed, const at::Tensor& t) { return needed ? t : at::empty({half}, x.options()); };
    if (gate_weight) {
      const at::Tensor value = wanted(needs[1], dweight), gate = wanted(has_dgate_weight, dgate_weight);
      backward_weight(call, value.mutable_data_ptr(), gate.mutable_data_ptr());
    } else {
      backward_weight(call, column(dweight, call.value_first() ? 0 : half), column(dweight, call.value_first() ? half : 0));
    }
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("_gated_conv_bwd", &gated_conv_bwd); }

}  // namespace pykernels
