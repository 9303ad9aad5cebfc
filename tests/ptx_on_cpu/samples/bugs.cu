// Kernels with a bug each, and launches that CUDA refuses. test_seeded_bugs.py says what must be reported.
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>

namespace {

__global__ void missing_barrier(float* out) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void with_barrier(float* out) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void read_outside(const float* x, float* out, int n) {
  if (threadIdx.x <= n) out[threadIdx.x < n ? threadIdx.x : 0] = x[threadIdx.x];
}
__global__ void write_input(float* x) { x[threadIdx.x] = 1; }
__global__ void shared_outside(float* out, int n) {
  extern __shared__ float s[];
  s[threadIdx.x + n] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
__global__ void misaligned_vector(const float* x, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(x + 1);
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}
__global__ void absent_lanes(float* x) {
  float v = x[threadIdx.x];
  if (threadIdx.x < 16) v = __shfl_xor_sync(~0u, v, 1);
  x[threadIdx.x] = v;
}
__global__ void not_in_mask(float* x) { x[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1); }
__global__ void divergent_exit(float* x) {
  if (threadIdx.x < 32) __syncthreads();
  x[threadIdx.x] = 1;
}
__global__ void divergent_barriers(float* x, int n) {
  if (threadIdx.x < n) {
    x[threadIdx.x] = 1;
    asm volatile("bar.sync 0;");
    x[threadIdx.x] += x[threadIdx.x ^ 1];
  } else {
    x[threadIdx.x] = 2;
    asm volatile("bar.sync 0;");
  }
}
__global__ void deadlock(float* x) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;");
  else
    asm volatile("bar.sync 2, 64;");
  x[threadIdx.x] = 1;
}
__global__ void mixed_collectives(unsigned* x) {
  if (threadIdx.x & 1)
    x[threadIdx.x] = __ballot_sync(~0u, 1);
  else
    x[threadIdx.x] = __shfl_sync(~0u, x[threadIdx.x], 0);
}
__global__ void failed_assert(int* x) { assert(x[threadIdx.x] == 0); }
__global__ void null_pointer(float* x) { x[threadIdx.x] = 1; }
__global__ void blocks_race(float* x) { x[threadIdx.x] = blockIdx.x; }
__global__ void __launch_bounds__(64) bounded(float* x) { x[threadIdx.x] = 1; }
__global__ void dynamic_shared(float* x) {
  extern __shared__ float s[];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  x[threadIdx.x] = s[threadIdx.x ^ 1];
}

}  // namespace

#define LAUNCHER(kernel, parameters, arguments, grid, block, shared) \
  cudaError_t launch_##kernel parameters {                           \
    kernel<<<grid, block, shared>>> arguments;                       \
    return cudaGetLastError();                                       \
  }

extern "C" {
LAUNCHER(missing_barrier, (float* x), (x), 1, 64, 0)
LAUNCHER(with_barrier, (float* x), (x), 1, 64, 0)
LAUNCHER(read_outside, (const float* x, float* y, int n), (x, y, n), 1, 64, 0)
LAUNCHER(write_input, (float* x), (x), 1, 32, 0)
LAUNCHER(shared_outside, (float* x, int n), (x, n), 1, 32, 128)
LAUNCHER(misaligned_vector, (const float* x, float* y), (x, y), 1, 1, 0)
LAUNCHER(absent_lanes, (float* x), (x), 1, 32, 0)
LAUNCHER(not_in_mask, (float* x), (x), 1, 32, 0)
LAUNCHER(divergent_exit, (float* x), (x), 1, 64, 0)
LAUNCHER(divergent_barriers, (float* x, int n), (x, n), 1, 64, 0)
LAUNCHER(deadlock, (float* x), (x), 1, 64, 0)
LAUNCHER(mixed_collectives, (unsigned* x), (x), 1, 32, 0)
LAUNCHER(failed_assert, (int* x), (x), 1, 32, 0)
LAUNCHER(null_pointer, (float* x), (x), 1, 32, 0)
LAUNCHER(blocks_race, (float* x), (x), 4, 32, 0)

cudaError_t launch_bounded(float* x, int threads) {
  bounded<<<1, threads>>>(x);
  return cudaGetLastError();
}
cudaError_t launch_any(float* x, int gx, int gy, int bx, int bz, int shared, int opt_in) {
  if (opt_in) {
    const cudaError_t e = cudaFuncSetAttribute(dynamic_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, opt_in);
    if (e != cudaSuccess) return cudaGetLastError();  // else the next launcher would return it
  }
  dynamic_shared<<<dim3(gx, gy), dim3(bx, 1, bz), shared>>>(x);
  return cudaGetLastError();
}
}
