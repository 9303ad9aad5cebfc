#include "batch.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include "device.h"

namespace pykernels {

cuda::Batch batch_of(const at::Tensor& x, const OptionalTensor& mask, const OptionalTensor& lengths, const OptionalTensor& cu_seqlens,
                     cudaStream_t stream, std::vector<at::Tensor>& keep) {
  cuda::Batch batch{};
  batch.packed = cu_seqlens.has_value();
  batch.rows = batch.packed ? x.size(0) : x.size(0) * x.size(1);
  batch.length = batch.packed ? 0 : x.size(1);
  TORCH_CHECK_VALUE(batch.rows < int64_t{1} << 31, "x: expected fewer than 2**31 rows on CUDA, got ", batch.rows);
  if (lengths) check_indices("lengths", *lengths, x.size(0));
  if (cu_seqlens) check_indices("cu_seqlens", *cu_seqlens, -1);
  if (const OptionalTensor& bounds = cu_seqlens ? cu_seqlens : lengths) {
    keep.push_back(bounds->to(x.device()).contiguous());
    batch.bounds = keep.back().const_data_ptr();
    batch.wide_bounds = bounds->scalar_type() == at::kLong;
  }
  batch.sequences = batch.packed ? cu_seqlens->numel() - 1 : x.size(0);
  if (mask) {
    check_mask(*mask, x);
    keep.push_back(mask->to(x.device(), at::kBool).contiguous());
    batch.mask = reinterpret_cast<const uint8_t*>(keep.back().const_data_ptr<bool>());
  }
  if (batch.packed) {
    TORCH_CHECK_VALUE(batch.sequences > 0 || (batch.sequences == 0 && batch.rows == 0),
                      "cu_seqlens: expected non-decreasing row numbers from 0 to T = ", batch.rows, ", got ", batch.sequences + 1,
                      " of them");
    if (batch.rows > 0) {
      keep.push_back(at::empty({batch.rows}, x.options().dtype(at::kInt)));
      auto* to = keep.back().mutable_data_ptr<int32_t>();
      check_cuda(cuda::pykernels_cuda_sequence_of_row(&batch, to, stream), "sequence_of_row");
      batch.sequence_of_row = to;
    }
  }
  return batch;
}

bool float32_allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
}

}  // namespace pykernels
