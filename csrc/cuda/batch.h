// What the CUDA glue of all operators on sequences shares.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "arguments.h"
#include "kernels/cuda/batch.h"

namespace pykernels {

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// mask [B, L], lengths [B] or cu_seqlens [B + 1] of x, on x's device; their values are looked at by the kernels alone. Tensors that the
// result points into are added to keep.
cuda::Batch batch_of(const at::Tensor& x, const OptionalTensor& mask, const OptionalTensor& lengths, const OptionalTensor& cu_seqlens,
                     cudaStream_t stream, std::vector<at::Tensor>& keep);

// float32 products in tf32, where PyTorch's setting for CUDA matrix products allows it.
bool float32_allows_tf32();

}  // namespace pykernels
