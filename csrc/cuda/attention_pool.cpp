// attention_pool for PyTorch on CUDA devices: allocation, layouts and the order of the kernels. The arithmetic is in kernels/cuda.
#include "kernels/cuda/attention_pool.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "attention_pool_arguments.h"
#include "batch.h"
#include "device.h"

namespace pykernels {
namespace {

void* pointer(const at::Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

class CudaAttentionPoolCall : public AttentionPoolArguments {
 public:
  explicit CudaAttentionPoolCall(const AttentionPoolInputs& in) {
    check(in, args);
    TORCH_CHECK_TYPE(dtype != Dtype::float64, "x: expected float32, bfloat16 or float16 on CUDA, got ", x.scalar_type());
  }
  void check_saved(const AttentionPoolSaved& saved) { AttentionPoolArguments::check_saved(saved, args); }

  // What needs the device: to be called under its guard.
  void lay_out(const AttentionPoolInputs& in, cudaStream_t stream) {
    args.batch = batch_of(x, in.mask, in.lengths, in.cu_seqlens, stream, keep_);
    args.dtype = dtype;
    args.tf32 = dtype == Dtype::float32 && float32_allows_tf32();
    args.in_width = cuda::width_of(args.width, dtype);
    args.hidden_width = cuda::width_of(args.hidden, dtype);
    args.halves = args.gated ? 2 : 1;
    args.column_tiles = (args.halves * cuda::round_up(args.hidden, args.gated ? 32 : 1) + cuda::kPoolColumns - 1) / cuda::kPoolColumns;
    args.padded_hidden = args.column_tiles * cuda::kPoolColumns / args.halves;
    args.wide = args.width % 8 == 0;
    args.wide_kept = args.hidden % 8 == 0;
    args.x = x.const_data_ptr();
    if (args.batch.rows > 0 && args.width > 0) find_x(stream);
    args.weight = readable_weight(weight, stream);
    args.gate_weight = readable_weight(gate_weight, stream);
  }

  at::Tensor bytes(int64_t n) const { return at::empty({n}, x.options().dtype(at::kByte)); }
  at::Tensor floats(at::IntArrayRef shape) const { return at::empty(shape, x.options().dtype(at::kFloat)); }

  // bias, gate_bias and query as the kernels read them; they live as long as the call.
  void find_parameters(cudaStream_t stream) {
    keep_.push_back(floats({2 + args.heads, args.padded_hidden}));
    args.parameters = keep_.back().mutable_data_ptr<float>();
    check_cuda(cuda::pykernels_cuda_attention_pool_parameters(&args, stream), "attention_pool_parameters");
  }

  cuda::AttentionPool args{};

 private:
  // Rows that can be read 16 bytes at a time as they are, or a copy of them that can.
  void find_x(cudaStream_t stream) {
    const auto size = static_cast<int64_t>(x.element_size());
    const int64_t length = packed_rows() ? x.size(0) : x.size(1), sequence = packed_rows() ? 0 : x.stride(0), row = x.stride(-2);
    args.x_sequence = sequence;
    args.x_row = row;
    const bool readable = args.in_width == args.width && (x.stride(-1) == 1 || args.width == 1) && row * size % 16 == 0 &&
                          sequence * size % 16 == 0 && aligned(args.x);
    if (readable) return;
    args.x = stage(args.x, sequence, row, x.stride(-1), args.batch.rows, length, stream);
    args.x_sequence = packed_rows() ? 0 : length * args.in_width;
    args.x_row = args.in_width;
  }

  const void* readable_weight(const void* from, cudaStream_t stream) {
    const bool readable = args.in_width == args.width && aligned(from);
    return readable || !from || args.hidden * args.width == 0 ? from : stage(from, 0, args.width, 1, args.hidden, args.hidden, stream);
  }

  // A copy of rows of `width` elements as contiguous ones of in_width.
  const void* stage(const void* from, int64_t sequence, int64_t row, int64_t column, int64_t rows, int64_t length, cudaStream_t stream) {
    keep_.push_back(bytes(rows * args.in_width * static_cast<int64_t>(x.element_size())));
    void* to = keep_.back().mutable_data_ptr();
    check_cuda(cuda::pykernels_cuda_stage_rows(dtype, from, sequence, row, column, rows, length, args.width, args.in_width, to, stream),
               "stage_rows");
    return to;
  }
};

// Chunks as attention_pool.h numbers them. Shorter ones where all sequences are short: results are the same.
void cut_chunks(cuda::AttentionPool& args) {
  const cuda::Batch& batch = args.batch;
  args.chunk_rows = cuda::kChunkRows;
  while (!batch.packed && args.chunk_rows > 16 && batch.length <= args.chunk_rows / 2) args.chunk_rows /= 2;
  args.sequence_chunks = batch.packed ? 0 : std::max<int64_t>(1, (batch.length + args.chunk_rows - 1) / args.chunk_rows);
  args.chunks = batch.packed ? batch.rows / args.chunk_rows + batch.sequences : batch.sequences * args.sequence_chunks;
}

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Results attention_pool_fwd(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& query, const OptionalTensor& bias,
                           const OptionalTensor& gate_weight, const OptionalTensor& gate_bias, const OptionalTensor& mask,
                           const OptionalTensor& lengths, const OptionalTensor& cu_seqlens, std::string_view activation,
                           std::string_view return_scores, bool save, bool keep) {
  const AttentionPoolInputs inputs{x, weight, query, bias, gate_weight, gate_bias, mask, lengths, cu_seqlens, activation, return_scores};
  const OnDevice device(x);
  CudaAttentionPoolCall call(inputs);
  call.lay_out(inputs, device.stream);
  cuda::AttentionPool& args = call.args;
  using Returned = CudaAttentionPoolCall::Returned;
  const std::vector<int64_t> nothing{0};
  const auto wanted = [&](bool is, const std::vector<int64_t>& shape) -> at::IntArrayRef { return is ? shape : nothing; };
  at::Tensor out = at::empty(call.out_shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  // No chunk has packed rows that are in no sequence, which cu_seqlens may wrongly leave.
  const auto sums = x.options().dtype(at::kFloat);
  const at::IntArrayRef score_shape = wanted(save || call.returned != Returned::none, call.score_shape);
  at::Tensor scores = call.packed_rows() ? at::zeros(score_shape, sums) : at::empty(score_shape, sums);
  at::Tensor weights = call.floats(wanted(call.returned == Returned::softmax, call.score_shape));
  at::Tensor max_sum = call.floats({call.batch(), args.heads, 2});
  at::Tensor pooled = call.floats(wanted(save && x.scalar_type() != at::kFloat, call.out_shape));
  at::Tensor kept = at::empty(wanted(keep, call.kept_shape), out.options());
  Results results{out, scores, weights, max_sum, pooled, kept};
  if (call.batch() == 0 || args.heads == 0) return results;
  args.out = pointer(out);
  args.scores = pointer(scores);
  args.weights = pointer(weights);
  args.max_sum = pointer(max_sum);
  args.pooled = pointer(pooled);
  args.kept = pointer(kept);
  cut_chunks(args);
  call.find_parameters(device.stream);
  at::Tensor parts, ends;
  if (args.batch.packed ? args.batch.rows > args.chunk_rows : args.sequence_chunks > 1) {
    parts = call.floats({std::max<int64_t>(1, args.chunks * args.heads * args.width)});
    ends = call.floats({args.chunks, args.heads, 2});
    args.parts = parts.mutable_data_ptr<float>();
    args.ends = static_cast<float2*>(ends.mutable_data_ptr());
  }
  check_cuda(cuda::pykernels_cuda_attention_pool_forward(&args, device.stream), "attention_pool_forward");
  return results;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// How rows are cut, by sizes alone: dh of one wave stays in a large device's cache, and partial sums of dweight over parts of a wave, of at
// least 256 rows, are enough to occupy one.
struct Waves {
  int64_t rows, count;

  Waves(cuda::AttentionPool& args, bool weights) {
    constexpr int64_t kWaveBytes = 32 << 20, kTileRows = 128, kParts = 512, kTile = 128 * 64, kLeastRows = 256;
    const int64_t outputs = args.halves * args.hidden_width, row_bytes = std::max<int64_t>(1, outputs * cuda::element_size(args.dtype));
    rows = std::max(kTileRows, std::min(kWaveBytes / row_bytes, args.batch.rows + kTileRows - 1) / kTileRows * kTileRows);
    count = (args.batch.rows + rows - 1) / rows;
    if (!weights) return;
    const int64_t widest = std::min(rows, args.batch.rows), elements = outputs * args.in_width;
    const int64_t parts = std::clamp<int64_t>(kParts / (elements / kTile + 1), 1, 128);
    args.split_rows = std::max(kLeastRows, cuda::round_up((widest + parts - 1) / parts, 32));
    args.splits = (widest + args.split_rows - 1) / args.split_rows;
  }
};

Gradients attention_pool_bwd(const OptionalTensor& dout, const OptionalTensor& dscores, const at::Tensor& x, const at::Tensor& weight,
                             const at::Tensor& query, const OptionalTensor& bias, const OptionalTensor& gate_weight,
                             const OptionalTensor& gate_bias, const OptionalTensor& mask, const OptionalTensor& lengths,
                             const OptionalTensor& cu_seqlens, const at::Tensor& scores, const at::Tensor& max_sum,
                             const at::Tensor& pooled, const OptionalTensor& kept, std::string_view activation,
                             std::string_view return_scores, std::array<bool, 6> needs) {
  const AttentionPoolInputs inputs{x, weight, query, bias, gate_weight, gate_bias, mask, lengths, cu_seqlens, activation, return_scores};
  const OnDevice device(x);
  CudaAttentionPoolCall call(inputs);
  call.check_saved({dout, dscores, scores, max_sum, pooled, kept});
  call.lay_out(inputs, device.stream);
  cuda::AttentionPool& args = call.args;
  const int64_t rows = args.batch.rows;
  const bool any = rows > 0 && args.heads > 0;
  const auto gradient = [&](bool needed, const OptionalTensor& like) {
    const std::vector<int64_t> shape = needed && like ? like->sizes().vec() : std::vector<int64_t>{0};
    return any ? at::empty(shape, x.options()) : at::zeros(shape, x.options());
  };
  const Gradients gradients{gradient(needs[0], x),    gradient(needs[1], weight),      gradient(needs[2], query),
                            gradient(needs[3], bias), gradient(needs[4], gate_weight), gradient(needs[5], gate_bias)};
  if (!any) return gradients;
  args.dx = pointer(std::get<0>(gradients));
  args.dweight = pointer(std::get<1>(gradients));
  args.dquery = pointer(std::get<2>(gradients));
  args.dbias = pointer(std::get<3>(gradients));
  args.dgate_weight = pointer(std::get<4>(gradients));
  args.dgate_bias = pointer(std::get<5>(gradients));
  // Fresh tensors are aligned, given ones may begin anywhere.
  args.wide = args.wide && aligned(args.dout);
  args.wide_kept = args.wide_kept && aligned(args.kept);

  call.find_parameters(device.stream);
  const at::Tensor delta = call.floats({call.batch(), args.heads}), a = call.floats({args.heads, rows}),
                   ds = call.floats({args.heads, rows});
  args.delta = delta.mutable_data_ptr();
  args.row_weights = a.mutable_data_ptr<float>();
  args.row_gradients = ds.mutable_data_ptr<float>();
  check_cuda(cuda::pykernels_cuda_attention_pool_backward_scores(&args, device.stream), "attention_pool_backward_scores");

  const bool weights = args.dweight || args.dgate_weight;
  const Waves waves(args, weights);
  const auto size = static_cast<int64_t>(x.element_size());
  const at::Tensor dh = call.bytes(std::max<int64_t>(1, std::min(waves.rows, rows) * args.halves * args.hidden_width * size));
  args.dh = dh.mutable_data_ptr();
  args.sum_blocks = (rows + cuda::kSumRows - 1) / cuda::kSumRows;
  const at::Tensor sums = call.floats({args.sum_blocks, 2 + args.heads, args.padded_hidden});
  args.sums = sums.mutable_data_ptr<float>();
  at::Tensor transposed, partials;
  if (args.dx) {
    transposed = call.bytes(cuda::packed_transposed_bytes(args));
    args.packed_transposed = transposed.mutable_data_ptr();
    if (args.hidden > 0)
      check_cuda(cuda::pykernels_cuda_attention_pool_pack_transposed(&args, device.stream), "attention_pool_pack_transposed");
  }
  if (weights) {
    partials = call.floats({args.splits, args.halves * args.hidden_width, args.in_width});
    args.partials = partials.mutable_data_ptr<float>();
  }
  for (int64_t wave = 0; wave < waves.count; wave++) {
    args.wave_begin = wave * waves.rows;
    args.wave_end = std::min(rows, args.wave_begin + waves.rows);
    if (args.hidden > 0)
      check_cuda(cuda::pykernels_cuda_attention_pool_backward_hidden(&args, device.stream), "attention_pool_backward_hidden");
    if (args.dx) check_cuda(cuda::pykernels_cuda_attention_pool_backward_input(&args, device.stream), "attention_pool_backward_input");
    if (weights) check_cuda(cuda::pykernels_cuda_attention_pool_backward_weight(&args, device.stream), "attention_pool_backward_weight");
  }
  if (args.hidden > 0) check_cuda(cuda::pykernels_cuda_attention_pool_reduce(&args, device.stream), "attention_pool_reduce");
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, PYKERNELS_DEVICE_KEY, m) {
  m.impl("_attention_pool_fwd", &attention_pool_fwd);
  m.impl("_attention_pool_bwd", &attention_pool_bwd);
}

}  // namespace pykernels
