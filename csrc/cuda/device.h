// The one place that reaches the device through PyTorch: everything else in this folder would run wherever these lines say.
#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

// The dispatch key of the operators here.
#define PYKERNELS_DEVICE_KEY CUDA

namespace pykernels {

// Makes x's device the current one until it goes out of scope, and holds its current stream.
struct OnDevice {
  explicit OnDevice(const at::Tensor& x) {
    TORCH_CHECK_VALUE(x.is_cuda(), "x: expected a tensor on CUDA like the others, got one on ", x.device());
    guard.set_device(x.device());
    stream = c10::cuda::getCurrentCUDAStream();
  }

  c10::cuda::OptionalCUDAGuard guard;
  cudaStream_t stream;
};

// Throws RuntimeError for what a launcher returned.
inline void check_cuda(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, "pykernels: ", what, ": ", cudaGetErrorString(error));
}

}  // namespace pykernels
