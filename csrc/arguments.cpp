#include "arguments.h"

#include <ATen/Context.h>

#include <algorithm>

namespace pykernels {
namespace {

// int32 or int64 indices as a vector, whatever their stride.
std::vector<int64_t> integers(const char* name, const at::Tensor& t, int64_t count) {
  check_indices(name, t, count);
  const at::Tensor longs = t.to(at::kLong).contiguous();
  const int64_t* p = longs.const_data_ptr<int64_t>();
  return {p, p + longs.numel()};
}

}  // namespace

Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::float32;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    case at::kDouble: return Dtype::float64;
    default: TORCH_CHECK_TYPE(false, "x: expected float32, bfloat16, float16 or float64, got ", x.scalar_type());
  }
}

void check_like(const char* name, const OptionalTensor& t, const at::Tensor& x) {
  if (!t) return;
  TORCH_CHECK_TYPE(t->scalar_type() == x.scalar_type(), name, ": expected ", x.scalar_type(), " like x, got ", t->scalar_type());
  TORCH_CHECK_VALUE(t->device() == x.device(), name, ": expected a tensor on ", x.device(), " like x, got ", t->device());
}

void check_shape(const char* name, const OptionalTensor& t, at::IntArrayRef shape) {
  if (t) TORCH_CHECK_VALUE(t->sizes() == shape, name, ": expected shape ", shape, ", got ", t->sizes());
}

void check_one_of(const OptionalTensor& mask, const OptionalTensor& lengths, const OptionalTensor& cu_seqlens) {
  TORCH_CHECK_VALUE(!mask + !lengths + !cu_seqlens >= 2, "mask, lengths, cu_seqlens: expected at most one of them, got several");
}

void check_indices(const char* name, const at::Tensor& t, int64_t count) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt || t.scalar_type() == at::kLong, name, ": expected int32 or int64, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 1 && (count < 0 || t.size(0) == count), name, ": expected shape [",
                    count < 0 ? "B + 1" : std::to_string(count), "], got ", t.sizes());
}

void check_mask(const at::Tensor& mask, const at::Tensor& x) {
  TORCH_CHECK_TYPE(!mask.is_floating_point() && !mask.is_complex(),
                   "mask: expected bool or 0/1 integers (True = keep; additive masks are not accepted), got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.dim() == 2 && mask.size(0) == x.size(0) && mask.size(1) == x.size(1), "mask: expected shape [", x.size(0), ", ",
                    x.size(1), "], got ", mask.sizes());
}

bool float32_allows_bf16() {
  const auto& context = at::globalContext();
  return context.float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM ||
         context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL) == at::Float32Precision::BF16;
}

std::vector<Sequence> sequences_of(const at::Tensor& x, const OptionalTensor& mask, const OptionalTensor& lengths,
                                   const OptionalTensor& cu_seqlens, std::vector<at::Tensor>& keep) {
  std::vector<Sequence> sequences;
  const auto* data = static_cast<const char*>(x.const_data_ptr());
  const auto size = static_cast<int64_t>(x.element_size());
  if (cu_seqlens) {
    const std::vector<int64_t> bounds = integers("cu_seqlens", *cu_seqlens, -1);
    TORCH_CHECK_VALUE(!bounds.empty() && bounds.front() == 0 && bounds.back() == x.size(0) && std::is_sorted(bounds.begin(), bounds.end()),
                      "cu_seqlens: expected non-decreasing row numbers from 0 to T = ", x.size(0), ", got ", at::IntArrayRef(bounds));
    for (size_t b = 0; b + 1 < bounds.size(); b++) {
      const int64_t rows = bounds[b + 1] - bounds[b];
      sequences.push_back(
          {data + bounds[b] * x.stride(0) * size, nullptr, rows, rows, bounds[b], rows, bounds[b], rows, static_cast<int64_t>(b)});
    }
    return sequences;
  }
  const int64_t batch = x.size(0), length = x.size(1);
  std::vector<int64_t> live_rows;
  if (lengths) {
    live_rows = integers("lengths", *lengths, batch);
    for (int64_t n : live_rows) TORCH_CHECK_VALUE(n >= 0 && n <= length, "lengths: expected values from 0 to L = ", length, ", got ", n);
  }
  const uint8_t* bytes = nullptr;
  if (mask) {
    check_mask(*mask, x);
    if (mask->scalar_type() != at::kBool) {
      TORCH_CHECK_VALUE(mask->eq(0).logical_or_(mask->eq(1)).all().item<bool>(), "mask: expected only 0 and 1, got other integers");
    }
    keep.push_back(mask->to(at::kBool).contiguous());
    bytes = reinterpret_cast<const uint8_t*>(keep.back().const_data_ptr<bool>());
  }
  for (int64_t b = 0; b < batch; b++) {
    const uint8_t* row = bytes ? bytes + b * length : nullptr;
    int64_t live = live_rows.empty() ? length : live_rows[b];
    while (row && live > 0 && !row[live - 1]) live--;  // a mask that pads at the end costs no more than lengths
    sequences.push_back({data + b * x.stride(0) * size, row, live, live, b * length, length, b * length, length, b});
  }
  return sequences;
}

}  // namespace pykernels
