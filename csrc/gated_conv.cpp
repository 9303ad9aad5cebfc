// Forward of gated_conv1d for PyTorch on the CPU: allocation and distribution of work. The arithmetic is in kernels/cpu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "cpu_tier.h"
#include "gated_conv_call.h"
#include "product_work.h"

namespace pykernels {
namespace {

// What a prepacked buffer holds before the weights: a buffer made for another tier, dtype or shape is refused.
struct PackedHeader {
  uint64_t magic = 0x31766e6f63646761;  // "agdconv1"
  int64_t tier, panel_size, c_out, c_in, taps;
  int64_t reserved[2] = {};
};
static_assert(sizeof(PackedHeader) == 64);

PackedHeader header_of(const GatedConvCall& call) {
  return {.tier = static_cast<int64_t>(cpu_tier()),
          .panel_size = call.kernels->panel_size,
          .c_out = call.args.c_out,
          .c_in = call.args.c_in,
          .taps = call.args.taps};
}

// For units of up to so many rows.
ProductWork forward_product(const GatedConvCall& call, int64_t rows) {
  const GatedConvArgs& a = call.args;
  const GatedConvKernels& k = *call.kernels;
  const int64_t columns = (a.c_out + k.columns - 1) / k.columns;
  return {.columns = columns,
          .packed_bytes = columns ? k.packed_bytes(a.c_out, a.c_in, a.taps) / columns : 0,
          .activation_bytes = call.out_rows * a.c_in * k.panel_size,
          .prepared_bytes = k.forward_rows_bytes(a, rows),
          .pack = [&](void* packed, int64_t begin,
                      int64_t end) { k.pack(packed, call.value_weight, call.gate_weight, a.c_out, a.c_in, a.taps, begin, end); },
          .prepare = [&](const Blocks& blocks, void* prepared) { k.prepare_forward(a, blocks, prepared); },
          .run = [&](const void* packed, const Blocks& blocks, int64_t begin, int64_t end,
                     const void* prepared) { k.forward(a, packed, blocks, begin, end, prepared); }};
}

}  // namespace

void gated_conv_forward(const GatedConvCall& call, const void* prepacked) {
  const int64_t rows = call.block_rows(call.out_rows, call.args.c_in);
  const Work work(call.sequences, &Sequence::out_rows, rows, 2 * call.kernels->row_tile);
  run_product(forward_product(call, work.max_rows()), work, prepacked);
}

namespace {

std::tuple<at::Tensor, at::Tensor> gated_conv_fwd(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                                  const OptionalTensor& gate_weight, const OptionalTensor& gate_bias,
                                                  const OptionalTensor& cond, const OptionalTensor& mask, const OptionalTensor& lengths,
                                                  const OptionalTensor& cu_seqlens, const OptionalTensor& seed,
                                                  const OptionalTensor& packed, int64_t dilation, std::string_view padding,
                                                  std::string_view residual, std::string_view value_act, std::string_view split,
                                                  double gate_dropout, double gate_noise, bool save) {
  GatedConvCall call({x, weight, bias, gate_weight, gate_bias, cond, mask, lengths, cu_seqlens, seed, dilation, padding, residual,
                      value_act, split, gate_dropout, gate_noise});
  at::Tensor y = at::empty(call.out_shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  std::vector<int64_t> saved_shape{2};
  saved_shape.insert(saved_shape.end(), call.out_shape.begin(), call.out_shape.end());
  at::Tensor saved = at::empty(save ? at::IntArrayRef(saved_shape) : at::IntArrayRef({0}), x.options());
  if (y.numel() == 0) return {y, saved};
  call.args.y = y.mutable_data_ptr();
  if (save) {
    call.set_saved(saved.mutable_data_ptr());
  }
  if (packed) {
    const PackedHeader wanted = header_of(call);
    const ProductWork product = forward_product(call, 0);
    const auto bytes = static_cast<int64_t>(sizeof wanted) + product.columns * product.packed_bytes;
    TORCH_CHECK(packed->scalar_type() == at::kByte && packed->is_contiguous() && packed->numel() == bytes &&
                    std::memcmp(packed->const_data_ptr(), &wanted, sizeof wanted) == 0,
                "packed: made for other weights or another CPU tier: call prepack() again");
    gated_conv_forward(call, static_cast<const char*>(packed->const_data_ptr()) + sizeof wanted);
  } else {
    gated_conv_forward(call, nullptr);
  }
  return {y, saved};
}

at::Tensor gated_conv_pack(const at::Tensor& weight, const OptionalTensor& gate_weight, std::string_view split) {
  TORCH_CHECK_VALUE(weight.dim() == 3, "weight: expected [2 * C_out, C_in, K], got shape ", weight.sizes());
  const OptionalTensor none;
  const at::Tensor no_rows = at::empty({0, 0, weight.size(1)}, weight.options());
  GatedConvCall call(
      {no_rows, weight, none, gate_weight, none, none, none, none, none, none, 1, "causal", "none", "identity", split, 0, 0});
  const PackedHeader header = header_of(call);
  const ProductWork product = forward_product(call, 0);
  at::Tensor packed = at::empty({static_cast<int64_t>(sizeof header) + product.columns * product.packed_bytes}, at::kByte);
  auto* to = static_cast<char*>(packed.mutable_data_ptr());
  std::memcpy(to, &header, sizeof header);
  pack_all(product, to + sizeof header);
  return packed;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("_gated_conv_fwd", &gated_conv_fwd);
  m.impl("_gated_conv_pack", &gated_conv_pack);
}

}  // namespace pykernels
