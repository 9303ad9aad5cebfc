// Starting kernels, and the choice between a tile that is efficient and one that gives every multiprocessor work.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pykernels::cuda {

// Kernels may have 48 KiB of shared memory without asking, static and dynamic together; no kernel here has 16 KiB of static.
constexpr int kUnaskedShared = 32 << 10;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > kUnaskedShared) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetLastError();  // else the next launch, whichever it is, would report it
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

inline unsigned blocks_of(int64_t n, int64_t size) { return unsigned((n + size - 1) / size); }

inline int64_t multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Whether the device has Hopper's own instructions, and this library kernels of them: those of capability 9.0a run on 9.0 alone.
inline bool is_hopper() {
#if defined(PYKERNELS_SM90A)
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

// Whether tiles of rows x columns are enough to occupy most of the device. A result never depends on it.
inline bool fills_device(int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns) {
  return ((rows + tile_rows - 1) / tile_rows) * ((columns + tile_columns - 1) / tile_columns) * 4 >= multiprocessors() * 3;
}

}  // namespace pykernels::cuda
