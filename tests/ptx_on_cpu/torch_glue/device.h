// What csrc/cuda/device.h is on a GPU, for tensors on the CPU: no device to choose, and the default stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#define PYKERNELS_DEVICE_KEY CPU

extern "C" void (*ptx_after_launcher)(const char* what);  // null, or what Python has set

namespace pykernels {

struct OnDevice {
  explicit OnDevice(const at::Tensor& x) { TORCH_CHECK_VALUE(x.is_cpu(), "x: expected a tensor on the CPU, got one on ", x.device()); }

  cudaStream_t stream = nullptr;
};

inline void check_cuda(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, "pykernels: ", what, ": ", cudaGetErrorString(error));
  if (ptx_after_launcher) ptx_after_launcher(what);
}

}  // namespace pykernels
