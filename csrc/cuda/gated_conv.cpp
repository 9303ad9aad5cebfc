// gated_conv1d for PyTorch on CUDA devices: allocation, layouts and the order of the kernels. The arithmetic is in kernels/cuda.
#include "kernels/cuda/gated_conv.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "batch.h"
#include "device.h"
#include "gated_conv_arguments.h"

namespace pykernels {
namespace {

class CudaGatedConvCall : public GatedConvArguments {
 public:
  explicit CudaGatedConvCall(const GatedConvInputs& in) {
    check(in, args);
    TORCH_CHECK_TYPE(dtype != Dtype::float64, "x: expected float32, bfloat16 or float16 on CUDA, got ", x.scalar_type());
  }

  // What needs the device: to be called under its guard.
  void lay_out(const GatedConvInputs& in, cudaStream_t stream) {
    set_random(in, args);
    args.batch = batch_of(x, in.mask, in.lengths, in.cu_seqlens, stream, keep_);
    args.dtype = dtype;
    args.tf32 = dtype == Dtype::float32 && float32_allows_tf32();
    args.out_length = packed_rows() ? 0 : out_shape[1];
    args.out_rows = out_rows;
    args.in_width = cuda::width_of(args.c_in, dtype);
    args.out_width = cuda::width_of(args.c_out, dtype);
    args.value_weight = value_weight;
    args.gate_weight = gate_weight;
    if (in_rows > 0 && args.c_in > 0) find_x(stream);
    // Gradients and outputs are fresh, hence aligned.
    args.wide = args.c_out % 8 == 0;
    for (const void* p : {args.value_bias, args.gate_bias, args.value_cond, args.gate_cond}) args.wide &= aligned(p);
  }

  at::Tensor bytes(int64_t n) const { return at::empty({n}, x.options().dtype(at::kByte)); }
  void set_saved(void* saved) { GatedConvArguments::set_saved(saved, args); }

  cuda::GatedConv args{};

 private:
  // Rows that can be read 16 bytes at a time as they are, or a copy of them that can.
  void find_x(cudaStream_t stream) {
    const auto size = static_cast<int64_t>(x.element_size());
    const int64_t length = packed_rows() ? x.size(0) : x.size(1), sequence = packed_rows() ? 0 : x.stride(0), row = x.stride(-2);
    args.x = x.const_data_ptr();
    args.x_sequence = sequence;
    args.x_row = row;
    const bool readable = args.in_width == args.c_in && (x.stride(-1) == 1 || args.c_in == 1) && row * size % 16 == 0 &&
                          sequence * size % 16 == 0 && aligned(args.x);
    if (readable) return;
    keep_.push_back(bytes(in_rows * args.in_width * size));
    void* staged = keep_.back().mutable_data_ptr();
    check_cuda(cuda::pykernels_cuda_stage_rows(dtype, args.x, sequence, row, x.stride(-1), in_rows, length, args.c_in, args.in_width,
                                               staged, stream),
               "stage_rows");
    args.x = staged;
    args.x_sequence = packed_rows() ? 0 : length * args.in_width;
    args.x_row = args.in_width;
  }
};

int64_t packed_bytes(const cuda::GatedConv& p) { return cuda::packed_bytes(p.c_out, p.c_in, p.taps, p.dtype); }

// Into args.y and saved_*.
void forward(CudaGatedConvCall& call, const OptionalTensor& packed, cudaStream_t stream) {
  cuda::GatedConv& args = call.args;
  const int64_t wanted = packed_bytes(args);
  const at::Tensor weights = packed ? *packed : call.bytes(wanted);
  TORCH_CHECK(weights.scalar_type() == at::kByte && weights.is_contiguous() && weights.numel() == wanted &&
                  weights.device() == call.x.device() && aligned(weights.const_data_ptr()),
              "packed: made for other weights or another device: call prepack() again");
  args.packed = const_cast<void*>(weights.const_data_ptr());
  if (!packed) check_cuda(cuda::pykernels_cuda_gated_conv_pack(&args, stream), "gated_conv_pack");
  check_cuda(cuda::pykernels_cuda_gated_conv_forward(&args, stream), "gated_conv_forward");
}

std::tuple<at::Tensor, at::Tensor> gated_conv_fwd(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                                  const OptionalTensor& gate_weight, const OptionalTensor& gate_bias,
                                                  const OptionalTensor& cond, const OptionalTensor& mask, const OptionalTensor& lengths,
                                                  const OptionalTensor& cu_seqlens, const OptionalTensor& seed,
                                                  const OptionalTensor& packed, int64_t dilation, std::string_view padding,
                                                  std::string_view residual, std::string_view value_act, std::string_view split,
                                                  double gate_dropout, double gate_noise, bool save) {
  const GatedConvInputs inputs{x,    weight,   bias,    gate_weight, gate_bias, cond,  mask,         lengths,   cu_seqlens,
                               seed, dilation, padding, residual,    value_act, split, gate_dropout, gate_noise};
  const OnDevice device(x);
  CudaGatedConvCall call(inputs);
  call.lay_out(inputs, device.stream);
  at::Tensor y = at::empty(call.out_shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  std::vector<int64_t> saved_shape{2};
  saved_shape.insert(saved_shape.end(), call.out_shape.begin(), call.out_shape.end());
  at::Tensor saved = at::empty(save ? at::IntArrayRef(saved_shape) : at::IntArrayRef({0}), x.options());
  if (y.numel() == 0) return {y, saved};
  call.args.y = y.mutable_data_ptr();
  if (save) call.set_saved(saved.mutable_data_ptr());
  forward(call, packed, device.stream);
  return {y, saved};
}

at::Tensor gated_conv_pack(const at::Tensor& weight, const OptionalTensor& gate_weight, std::string_view split) {
  TORCH_CHECK_VALUE(weight.dim() == 3, "weight: expected [2 * C_out, C_in, K], got shape ", weight.sizes());
  const OptionalTensor none;
  const at::Tensor no_rows = at::empty({0, 0, weight.size(1)}, weight.options());
  const GatedConvInputs inputs{no_rows, weight, none,     gate_weight, none,       none,  none, none, none,
                               none,    1,      "causal", "none",      "identity", split, 0,    0};
  const OnDevice device(weight);
  CudaGatedConvCall call(inputs);
  call.lay_out(inputs, device.stream);
  const at::Tensor packed = call.bytes(packed_bytes(call.args));
  call.args.packed = packed.mutable_data_ptr();
  if (packed.numel() > 0) check_cuda(cuda::pykernels_cuda_gated_conv_pack(&call.args, device.stream), "gated_conv_pack");
  return packed;
}

// Rows that one block of the elementwise pass takes. Sums are cut at these, so they depend on sizes alone.
int64_t gate_rows(int64_t rows) { return std::clamp<int64_t>(cuda::round_up(rows / 512, 32), 32, 1024); }

void backward_weight(CudaGatedConvCall& call, void* value_dweight, void* gate_dweight, cudaStream_t stream) {
  cuda::GatedConv& args = call.args;
  // Enough parts to occupy a large device, of at least 256 rows.
  constexpr int64_t kParts = 512, kTile = 128 * 64, kLeastRows = 256;
  const int64_t elements = args.taps * 2 * args.out_width * args.in_width;
  const int64_t parts = std::clamp<int64_t>(kParts / (elements / kTile + 1), 1, 128);
  args.split_rows = std::max(kLeastRows, cuda::round_up((args.out_rows + parts - 1) / parts, 32));
  args.splits = (args.out_rows + args.split_rows - 1) / args.split_rows;
  const at::Tensor partials = call.bytes(args.splits * elements * static_cast<int64_t>(sizeof(float)));
  args.partials = static_cast<float*>(partials.mutable_data_ptr());
  args.value_dweight = value_dweight;
  args.gate_dweight = gate_dweight;
  check_cuda(cuda::pykernels_cuda_gated_conv_backward_weight(&args, stream), "gated_conv_backward_weight");
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients gated_conv_bwd(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& gate_weight, const OptionalTensor& gate_bias, const OptionalTensor& cond,
                         const OptionalTensor& mask, const OptionalTensor& lengths, const OptionalTensor& cu_seqlens,
                         const OptionalTensor& seed, const OptionalTensor& saved, int64_t dilation, std::string_view padding,
                         std::string_view residual, std::string_view value_act, std::string_view split, double gate_dropout,
                         double gate_noise, std::array<bool, 6> needs) {
  const GatedConvInputs inputs{x,    weight,   bias,    gate_weight, gate_bias, cond,  mask,         lengths,   cu_seqlens,
                               seed, dilation, padding, residual,    value_act, split, gate_dropout, gate_noise};
  const OnDevice device(x);
  CudaGatedConvCall call(inputs);
  call.lay_out(inputs, device.stream);
  cuda::GatedConv& args = call.args;
  TORCH_CHECK_VALUE(dy.sizes() == at::IntArrayRef(call.out_shape), "dy: expected shape ", call.out_shape, ", got ", dy.sizes());
  check_like("dy", dy, x);

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

  at::Tensor kept, y;
  if (saved) {
    TORCH_CHECK_VALUE(saved->numel() == 2 * call.out_rows * args.c_out && saved->scalar_type() == x.scalar_type(),
                      "saved: expected what _gated_conv_fwd returned with save=True, got shape ", saved->sizes());
    kept = saved->contiguous();
    call.set_saved(const_cast<void*>(kept.const_data_ptr()));
  } else {
    kept = at::empty({2, call.out_rows, args.c_out}, x.options());
    y = at::empty(call.out_shape, x.options());
    args.y = y.mutable_data_ptr();
    call.set_saved(kept.mutable_data_ptr());
    forward(call, {}, device.stream);
    y.reset();
  }
  const at::Tensor dy_rows = dy.contiguous();
  args.dy = dy_rows.const_data_ptr();
  args.wide = args.wide && aligned(args.dy) && aligned(kept.const_data_ptr());

  const auto size = static_cast<int64_t>(x.element_size());
  const auto column = [&](const at::Tensor& t, int64_t c) { return static_cast<char*>(t.mutable_data_ptr()) + c * size; };
  if (needs[5] && cond) {
    args.value_dcond = column(dcond, call.value_column());
    args.gate_dcond = column(dcond, call.gate_column());
  }
  const at::Tensor dh = call.bytes(call.out_rows * 2 * args.out_width * size);
  args.dh = dh.mutable_data_ptr();
  if (needs[2] && bias) args.value_dbias = column(dbias, gate_weight ? 0 : call.value_column());
  if (needs[2] && bias && !gate_weight) args.gate_dbias = column(dbias, call.gate_column());
  if (needs[4] && gate_bias) args.gate_dbias = column(dgate_bias, 0);
  args.sum_rows = gate_rows(call.out_rows);
  args.sum_blocks = (call.out_rows + args.sum_rows - 1) / args.sum_rows;
  const at::Tensor sums = call.bytes(args.sum_blocks * 2 * args.out_width * static_cast<int64_t>(sizeof(float)));
  args.sums = static_cast<float*>(sums.mutable_data_ptr());
  check_cuda(cuda::pykernels_cuda_gated_conv_backward_gate(&args, device.stream), "gated_conv_backward_gate");

  if (dx.numel() > 0) {
    const at::Tensor packed = call.bytes(cuda::packed_transposed_bytes(args.c_out, args.c_in, args.taps, call.dtype));
    args.packed_transposed = packed.mutable_data_ptr();
    args.dx = dx.mutable_data_ptr();
    check_cuda(cuda::pykernels_cuda_gated_conv_backward_input(&args, device.stream), "gated_conv_backward_input");
  }
  const bool has_dgate_weight = needs[3] && gate_weight;
  if ((needs[1] || has_dgate_weight) && weight.numel() > 0) {
    const int64_t half = args.c_out * args.c_in * args.taps;
    if (gate_weight) {
      backward_weight(call, needs[1] ? column(dweight, 0) : nullptr, has_dgate_weight ? column(dgate_weight, 0) : nullptr, device.stream);
    } else {
      backward_weight(call, column(dweight, call.value_first() ? 0 : half), column(dweight, call.value_first() ? half : 0), device.stream);
    }
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, PYKERNELS_DEVICE_KEY, m) {
  m.impl("_gated_conv_fwd", &gated_conv_fwd);
  m.impl("_gated_conv_bwd", &gated_conv_bwd);
  m.impl("_gated_conv_pack", &gated_conv_pack);
}

}  // namespace pykernels
