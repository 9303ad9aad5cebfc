// lora_linear for PyTorch on CUDA devices: allocation, layouts and the order of the kernels. The arithmetic is in kernels/cuda.
#include "kernels/cuda/lora_linear.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>

#include "batch.h"
#include "device.h"
#include "lora_linear_arguments.h"

namespace pykernels {
namespace {

using cuda::LoraRows;

class CudaLoraCall : public LoraLinearArguments {
 public:
  CudaLoraCall(const LoraLinearInputs& in, cudaStream_t on, uint32_t random_stream = 0) : stream_(on), in_(in) {
    check(in, call);
    TORCH_CHECK_TYPE(dtype != Dtype::float64, "x: expected float32, bfloat16 or float16 on CUDA, got ", in.x.scalar_type());
    TORCH_CHECK_VALUE(call.rows < int64_t{1} << 31, "x: expected fewer than 2**31 rows on CUDA, got ", call.rows);
    call.stream = random_stream;
    set_dropout(in, call);
    call.dtype = dtype;
    call.float_adapters = in.lora_a.scalar_type() == at::kFloat;
    call.tf32 = dtype == Dtype::float32 && float32_allows_tf32();
    call.scale = static_cast<float>(in.scale);
    if (in.scales) call.scales = kept(in.scales->to(in.x.device(), at::kFloat)).const_data_ptr<float>();
    if (in.adapter_index && call.rows > 0) {
      call.index = kept(in.adapter_index->to(in.x.device())).const_data_ptr();
      call.wide_index = in.adapter_index->scalar_type() == at::kLong;
      call.rows_per_index = call.rows / in.adapter_index->numel();
      broken_ = at::zeros({2, std::max<int64_t>(1, call.adapters)}, in.x.options().dtype(at::kInt));
    }
    lora_a_ = kept(in.lora_a).const_data_ptr();
    lora_b_ = kept(in.lora_b).const_data_ptr();
    if (in.bias) bias_ = kept(*in.bias).const_data_ptr();
  }

  at::Tensor bytes(int64_t n) const { return at::empty({n}, in_.x.options().dtype(at::kByte)); }
  at::Tensor floats(at::IntArrayRef shape) const { return at::empty(shape, in_.x.options().dtype(at::kFloat)); }

  // y and s.
  void forward(const LoraRows& x, const at::Tensor& y, const at::Tensor& s);
  // Gradients; those without elements are not wanted. That of x is written, or added.
  void backward(const at::Tensor& dy, const LoraRows& x, const at::Tensor& s, const at::Tensor& dx, bool add_to_dx,
                const at::Tensor& dweight, const at::Tensor& da, const at::Tensor& db, const at::Tensor& dbias);

  // Rows of a tensor [..., columns] as the kernels read them: as they are, or a copy of them that can.
  LoraRows rows_of(const at::Tensor& t, int64_t columns);

  cuda::LoraCall call{};

 private:
  enum class Factor { a, b };

  const at::Tensor& kept(const at::Tensor& t) {
    keep_.push_back(t.contiguous());
    return keep_.back();
  }
  LoraRows find_weight();
  bool has_rank() const { return call.rank > 0 && call.in > 0 && call.adapters > 0; }
  at::Tensor expanded_rows() const { return bytes(call.rows * cuda::expand_width(call) * cuda::element_size(dtype)); }
  bool columns_adjacent() const { return call.out > 1 && in_.weight.stride(0) == 1 && in_.weight.stride(1) == call.out; }

  // The adapter's factor as the shrink or the product reads it.
  const void* arrange(Factor factor, bool expand, int64_t width);
  // Which adapters have what is not finite in their factor, once it is arranged; null where there is one adapter for all rows.
  int32_t* broken(Factor factor) const {
    return broken_.defined() ? broken_[factor == Factor::a ? 0 : 1].mutable_data_ptr<int32_t>() : nullptr;
  }
  // How the work is cut, and room for its partial results.
  at::Tensor cut(cuda::LoraShrink& p, bool at_once) const;
  at::Tensor cut(cuda::LoraSums& p, const at::Tensor& to, bool by_adapter) const;
  void sums(cuda::LoraSums p, const at::Tensor& to, bool by_adapter);
  void product(cuda::LoraProduct p);

  const cudaStream_t stream_;
  const LoraLinearInputs in_;
  const void *lora_a_ = nullptr, *lora_b_ = nullptr, *bias_ = nullptr;
  at::Tensor broken_;
};

LoraRows CudaLoraCall::rows_of(const at::Tensor& t, int64_t columns) {
  const at::Tensor flat = t.reshape({call.rows, columns});
  const auto size = static_cast<int64_t>(t.element_size());
  const int64_t width = cuda::width_of(columns, dtype);
  keep_.push_back(flat);
  if (flat.numel() == 0) return {nullptr, width, width};
  const int64_t row = call.rows == 1 ? width : flat.stride(0);
  if (width == columns && (flat.stride(1) == 1 || columns == 1) && row * size % 16 == 0 && aligned(flat.const_data_ptr())) {
    return {flat.const_data_ptr(), row, width};
  }
  keep_.push_back(bytes(call.rows * width * size));
  void* staged = keep_.back().mutable_data_ptr();
  check_cuda(cuda::pykernels_cuda_stage_rows(dtype, flat.const_data_ptr(), 0, flat.stride(0), flat.stride(1), call.rows, call.rows, columns,
                                             width, staged, stream_),
             "stage_rows");
  return {staged, width, width};
}

// [out, in], or [in, out] where the weight is a view of that.
LoraRows CudaLoraCall::find_weight() {
  const at::Tensor stored = columns_adjacent() ? in_.weight.t() : in_.weight.contiguous();
  keep_.push_back(stored);
  const int64_t rows = stored.size(0), columns = stored.size(1), width = cuda::width_of(columns, dtype);
  if (width == columns && aligned(stored.const_data_ptr())) return {stored.const_data_ptr(), columns, columns};
  keep_.push_back(bytes(rows * width * static_cast<int64_t>(stored.element_size())));
  void* staged = keep_.back().mutable_data_ptr();
  if (stored.numel() > 0) {
    check_cuda(cuda::pykernels_cuda_stage_rows(dtype, stored.const_data_ptr(), 0, columns, 1, rows, rows, columns, width, staged, stream_),
               "stage_rows");
  }
  return {staged, width, width};
}

const void* CudaLoraCall::arrange(Factor factor, bool expand, int64_t width) {
  const bool of_a = factor == Factor::a;
  cuda::LoraArrange p{};
  p.call = call;
  p.factor = {of_a ? lora_a_ : lora_b_, of_a ? call.in : call.out, of_a ? 1 : call.rank, of_a ? call.in : 1};
  p.expand = expand;
  p.width = width;
  const int64_t rows = expand ? p.factor.outer : cuda::shrink_terms(call) * call.rank;
  keep_.push_back(bytes(std::max<int64_t>(16, call.adapters * rows * width * cuda::element_size(dtype))));
  p.to = keep_.back().mutable_data_ptr();
  p.broken = broken(factor);
  check_cuda(cuda::pykernels_cuda_lora_linear_arrange(&p, stream_), "lora_linear_arrange");
  return p.to;
}

at::Tensor CudaLoraCall::cut(cuda::LoraShrink& p, bool at_once) const {
  // A block for each multiprocessor of a large device, of at least four steps; where results may be written at once and no random bits are
  // to be computed, as many as keep its memory busy. Depends on sizes alone, since sums are cut there.
  constexpr int64_t kTileRows = 64, kTileColumns = 32, kLeastWidth = 128;
  const int64_t blocks = at_once && !p.drop ? 64 : 128;
  const int64_t columns = cuda::shrink_terms(call) * call.rank;
  const int64_t tiles = ((call.rows + kTileRows - 1) / kTileRows) * ((columns + kTileColumns - 1) / kTileColumns);
  const int64_t splits = std::clamp<int64_t>(blocks / tiles, 1, std::max<int64_t>(1, p.rows.width / kLeastWidth));
  p.call = call;
  p.split_width = cuda::round_up((p.rows.width + splits - 1) / splits, 64);
  p.splits = std::max<int64_t>(1, (p.rows.width + p.split_width - 1) / p.split_width);
  if (at_once && p.splits == 1 && columns <= cuda::kMostWhole) return {};
  const at::Tensor partials = floats({p.splits, call.rows, columns});
  p.partials = partials.mutable_data_ptr<float>();
  return partials;
}

void CudaLoraCall::product(cuda::LoraProduct p) {
  p.call = call;
  p.expand_width = cuda::expand_width(call);
  p.wide = p.columns % 8 == 0 && aligned(p.bias);
  check_cuda(cuda::pykernels_cuda_lora_linear_product(&p, stream_), "lora_linear_product");
}

void CudaLoraCall::forward(const LoraRows& x, const at::Tensor& y, const at::Tensor& s) {
  if (!has_rank()) s.zero_();
  if (call.rows <= cuda::kFewRows && call.in > 0 && !columns_adjacent()) {
    cuda::LoraFew p{};
    p.call = call;
    p.x = x;
    p.lora_a = lora_a_;
    p.lora_b = lora_b_;
    keep_.push_back(in_.weight.contiguous());
    p.weight = keep_.back().const_data_ptr();
    p.wide = call.in % 8 == 0 && aligned(p.weight);
    p.wide_a = call.in % 8 == 0 && aligned(lora_a_);
    p.bias = bias_;
    p.s = s.mutable_data_ptr<float>();
    p.y = y.mutable_data_ptr();
    return check_cuda(cuda::pykernels_cuda_lora_linear_few(&p, stream_), "lora_linear_few");
  }
  cuda::LoraProduct p{};
  at::Tensor expanded;
  if (has_rank()) {
    expanded = expanded_rows();
    cuda::LoraShrink low{};
    low.rows = x;
    low.drop = call.keep_threshold > 0;
    low.factor = arrange(Factor::a, false, x.width);
    low.broken = broken(Factor::a);
    p.factor = arrange(Factor::b, true, cuda::expand_width(call));
    low.expand_broken = broken(Factor::b);
    low.multiplier = low.drop ? static_cast<float>(call.keep_scale) : 1.f;
    low.v = s.mutable_data_ptr<float>();
    low.expanded = expanded.mutable_data_ptr();
    const at::Tensor partials = cut(low, true);
    check_cuda(cuda::pykernels_cuda_lora_linear_shrink(&low, stream_), "lora_linear_shrink");
    p.expanded = low.expanded;
  }
  p.rows = x;
  p.weight = find_weight();
  p.columns_adjacent = columns_adjacent();
  p.columns = call.out;
  p.depth = call.in;
  p.bias = bias_;
  p.out = y.mutable_data_ptr();
  product(p);
}

at::Tensor CudaLoraCall::cut(cuda::LoraSums& p, const at::Tensor& to, bool by_adapter) const {
  // Enough parts to occupy a large device, of at least 256 rows.
  constexpr int64_t kParts = 256, kTileRows = 128, kTileColumns = 64, kLeastRows = 256;
  p.call = call;
  if (!by_adapter) p.call.index = nullptr;
  const int64_t adapters = p.call.index ? call.adapters : 1;
  const int64_t tiles = adapters * ((p.a.width + kTileRows - 1) / kTileRows) * ((p.b.width + kTileColumns - 1) / kTileColumns);
  const int64_t parts = std::clamp<int64_t>(kParts / tiles, 1, 128);
  p.split_rows = std::max(kLeastRows, cuda::round_up((call.rows + parts - 1) / parts, 64));
  p.splits = (call.rows + p.split_rows - 1) / p.split_rows;
  const at::Tensor partials = floats({p.splits, adapters, p.a.width, p.b.width});
  p.partials = partials.mutable_data_ptr<float>();
  p.float_result = to.scalar_type() == at::kFloat;
  p.to = to.mutable_data_ptr();
  return partials;
}

void CudaLoraCall::sums(cuda::LoraSums p, const at::Tensor& to, bool by_adapter) {
  const at::Tensor partials = cut(p, to, by_adapter);
  check_cuda(cuda::pykernels_cuda_lora_linear_sums(&p, stream_), "lora_linear_sums");
}

void CudaLoraCall::backward(const at::Tensor& dy, const LoraRows& x, const at::Tensor& s, const at::Tensor& dx, bool add_to_dx,
                            const at::Tensor& dweight, const at::Tensor& da, const at::Tensor& db, const at::Tensor& dbias) {
  if (call.rows == 0 || call.out == 0) {
    for (const at::Tensor& g : {dweight, da, db, dbias}) g.zero_();
    if (!add_to_dx) dx.zero_();
    return;
  }
  const LoraRows dy_rows = rows_of(dy, call.out);
  const int64_t width = cuda::expand_width(call), terms = cuda::expand_terms(call);
  at::Tensor expanded, ds, scaled_s;
  cuda::LoraShrink low{};
  cuda::LoraSums of_b{};
  cuda::LoraProduct of_dx{};
  at::Tensor low_partials, b_partials;
  const bool wants_ds = has_rank() && (dx.numel() > 0 || da.numel() > 0), wants_b = has_rank() && db.numel() > 0;
  if (wants_ds) {
    low.rows = dy_rows;
    low.factor = arrange(Factor::b, false, dy_rows.width);
    low.broken = broken(Factor::b);
    low.multiplier = call.keep_threshold ? static_cast<float>(call.keep_scale) : 1.f;
    if (dx.numel() > 0) {
      low.expanded = (expanded = expanded_rows()).mutable_data_ptr();
      of_dx.factor = arrange(Factor::a, true, width);
      low.expand_broken = broken(Factor::a);
    }
    if (da.numel() > 0) low.summed = (ds = expanded_rows()).mutable_data_ptr();
    low_partials = cut(low, false);
  }
  if (wants_b) {
    scaled_s = expanded_rows();
    cuda::LoraShrink of_s{};
    of_s.call = call;
    of_s.partials = const_cast<float*>(s.const_data_ptr<float>());
    of_s.splits = 1;
    of_s.multiplier = 1.f;
    of_s.summed = scaled_s.mutable_data_ptr();
    check_cuda(cuda::pykernels_cuda_lora_linear_spread(&of_s, stream_), "lora_linear_spread");
    of_b = {.a = dy_rows,
            .b = {of_s.summed, width, width},
            .a_columns = call.out,
            .b_columns = call.rank,
            .b_terms = terms,
            .a_stride = call.rank,
            .b_stride = 1};
    b_partials = cut(of_b, db, true);
  } else {
    db.zero_();
  }
  if (wants_ds && wants_b) {
    check_cuda(cuda::pykernels_cuda_lora_linear_shrink_and_sums(&low, &of_b, stream_), "lora_linear_shrink_and_sums");
  } else if (wants_ds) {
    check_cuda(cuda::pykernels_cuda_lora_linear_shrink(&low, stream_), "lora_linear_shrink");
  } else if (wants_b) {
    check_cuda(cuda::pykernels_cuda_lora_linear_sums(&of_b, stream_), "lora_linear_sums");
  }
  if (wants_ds && da.numel() > 0) {
    sums({.a = x,
          .b = {low.summed, width, width},
          .drop = call.keep_threshold > 0,
          .a_columns = call.in,
          .b_columns = call.rank,
          .b_terms = terms,
          .a_stride = 1,
          .b_stride = call.in},
         da, true);
  }
  if (dweight.numel() > 0) {
    sums({.a = dy_rows, .b = x, .a_columns = call.out, .b_columns = call.in, .b_terms = 1, .a_stride = call.in, .b_stride = 1}, dweight,
         false);
  }
  if (dbias.numel() > 0) {
    const at::Tensor ones = at::ones({8}, dy.options());  // one row for all
    sums({.a = dy_rows,
          .b = {ones.const_data_ptr(), 0, cuda::width_of(1, dtype)},
          .a_columns = call.out,
          .b_columns = 1,
          .b_terms = 1,
          .a_stride = 1,
          .b_stride = 1},
         dbias, false);
  }
  if (dx.numel() > 0) {
    of_dx.rows = dy_rows;
    of_dx.weight = find_weight();
    of_dx.columns_adjacent = !columns_adjacent();
    of_dx.columns = call.in;
    of_dx.depth = call.out;
    if (expanded.defined()) {
      of_dx.expanded = expanded.const_data_ptr();
      of_dx.drop = call.keep_threshold > 0;
    }
    of_dx.add = add_to_dx;
    of_dx.out = dx.mutable_data_ptr();
    product(of_dx);
  }
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Dropout's bits are drawn again in backward: keep is empty.
Outputs allocate(const CudaLoraCall& call, const at::Tensor& x) {
  return {at::empty(call.out_shape, x.options().memory_format(at::MemoryFormat::Contiguous)), call.floats({call.call.rows, call.call.rank}),
          call.bytes(0)};
}

Outputs lora_linear_fwd(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a, const at::Tensor& lora_b,
                        const OptionalTensor& bias, const OptionalTensor& scales, const OptionalTensor& adapter_index,
                        const OptionalTensor& seed, double scale, double dropout) {
  const OnDevice device(x);
  CudaLoraCall call({x, weight, lora_a, lora_b, bias, scales, adapter_index, seed, scale, dropout}, device.stream);
  const Outputs outputs = allocate(call, x);
  const auto& [y, s, keep] = outputs;
  if (y.numel() > 0) {
    call.forward(call.rows_of(x, call.call.in), y, s);
  } else {
    s.zero_();
  }
  return outputs;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients lora_linear_bwd(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                          const at::Tensor& lora_b, const OptionalTensor& bias, const OptionalTensor& scales,
                          const OptionalTensor& adapter_index, const OptionalTensor& seed, const at::Tensor& s, const at::Tensor& keep,
                          double scale, double dropout, std::array<bool, 5> needs) {
  const OnDevice device(x);
  CudaLoraCall call({x, weight, lora_a, lora_b, bias, scales, adapter_index, seed, scale, dropout}, device.stream);
  call.check_incoming(dy, s, keep, 0);
  const Gradients gradients{gradient_like(needs[0], x, x), gradient_like(needs[1], weight, x), gradient_like(needs[2], lora_a, x),
                            gradient_like(needs[3], lora_b, x), gradient_like(needs[4], bias, x)};
  const auto& [dx, dweight, da, db, dbias] = gradients;
  call.backward(dy, call.rows_of(x, call.call.in), s, dx, false, dweight, da, db, dbias);
  return gradients;
}

// The projections of one x; the first one holds what x's rows are read from.
class Stacked {
 public:
  Stacked(const StackedInputs& in, cudaStream_t stream) {
    const OptionalTensor none;
    const size_t count = check_stacked(in);
    for (size_t i = 0; i < count; i++) {
      const OptionalTensor bias = in.biases.get(i);
      const LoraLinearInputs inputs{in.x, in.weights[i], in.lora_a[i], in.lora_b[i], bias, none, none, in.seed, in.scales[i], in.dropout};
      calls.push_back(std::make_unique<CudaLoraCall>(inputs, stream, static_cast<uint32_t>(i)));
    }
    if (count > 0) rows = calls[0]->rows_of(in.x, calls[0]->call.in);
  }

  std::vector<std::unique_ptr<CudaLoraCall>> calls;
  LoraRows rows{};
};

std::vector<at::Tensor> lora_linear_stacked_fwd(const at::Tensor& x, at::TensorList weights, at::TensorList lora_a, at::TensorList lora_b,
                                                const OptionalTensors& biases, const OptionalTensor& seed, at::ArrayRef<double> scales,
                                                double dropout) {
  const OnDevice device(x);
  const Stacked stacked({x, weights, lora_a, lora_b, biases, seed, scales, dropout}, device.stream);
  std::vector<at::Tensor> results;
  for (const auto& call : stacked.calls) {
    const auto [y, s, keep] = allocate(*call, x);
    results.insert(results.end(), {y, s, keep});
    if (y.numel() > 0) {
      call->forward(stacked.rows, y, s);
    } else {
      s.zero_();
    }
  }
  return results;
}

std::vector<at::Tensor> lora_linear_stacked_bwd(const OptionalTensors& dys, const at::Tensor& x, at::TensorList weights,
                                                at::TensorList lora_a, at::TensorList lora_b, const OptionalTensors& biases,
                                                const OptionalTensor& seed, at::TensorList saved, at::ArrayRef<double> scales,
                                                double dropout, const c10::List<bool>& needs) {
  constexpr size_t kEach = 4;  // dweight, dlora_a, dlora_b, dbias
  const OnDevice device(x);
  const Stacked stacked({x, weights, lora_a, lora_b, biases, seed, scales, dropout}, device.stream);
  const size_t count = stacked.calls.size();
  check_stacked_incoming(count, dys.size(), saved.size(), needs.size());
  std::vector<at::Tensor> gradients{gradient_like(needs.get(0), x, x)};
  bool written = false;
  for (size_t i = 0; i < count; i++) {
    const OptionalTensor dy = dys.get(i), bias = biases.get(i);
    const auto of = [&](size_t j, const OptionalTensor& like) { return gradient_like(needs.get(1 + kEach * i + j) && dy, like, x); };
    gradients.insert(gradients.end(), {of(0, weights[i]), of(1, lora_a[i]), of(2, lora_b[i]), of(3, bias)});
    if (!dy) continue;
    stacked.calls[i]->check_incoming(*dy, saved[2 * i], saved[2 * i + 1], 0);
    const at::Tensor* own = &gradients[1 + kEach * i];
    stacked.calls[i]->backward(*dy, stacked.rows, saved[2 * i], gradients[0], written, own[0], own[1], own[2], own[3]);
    written = true;
  }
  if (!written) gradients[0].zero_();
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, PYKERNELS_DEVICE_KEY, m) {
  m.impl("_lora_linear_fwd", &lora_linear_fwd);
  m.impl("_lora_linear_bwd", &lora_linear_bwd);
  m.impl("_lora_linear_stacked_fwd", &lora_linear_stacked_fwd);
  m.impl("_lora_linear_stacked_bwd", &lora_linear_stacked_bwd);
}

}  // namespace pykernels
