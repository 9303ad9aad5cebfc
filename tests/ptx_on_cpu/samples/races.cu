// Kernels that are right with `safe` and race without it, for test_sanitizers.py.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

__global__ void reversed_kernel(float* y, bool safe) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  if (safe) __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}

__global__ void warp_sum_kernel(float* y, bool safe) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;
  for (int o = 16; o; o >>= 1) {
    if (safe) __syncwarp();
    const float other = s[threadIdx.x ^ o];
    if (safe) __syncwarp();
    s[threadIdx.x] = s[threadIdx.x] + other;
  }
  y[threadIdx.x] = s[threadIdx.x];
}

// A shuffle moves registers; it does not order memory.
__global__ void exchange_kernel(float* y, bool safe) {
  y[threadIdx.x] = threadIdx.x;
  const int other = __shfl_xor_sync(~0u, threadIdx.x, 1);
  if (safe) __syncwarp();
  const float v = y[other];
  if (safe) __syncwarp();
  y[threadIdx.x] = v + 1;
}

__global__ void asynchronous_kernel(const float* x, float* y, bool safe) {
  __shared__ float s[64];
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(uint32_t(__cvta_generic_to_shared(s + threadIdx.x))), "l"(x + threadIdx.x));
  asm volatile("cp.async.wait_all;");
  if (safe) __syncthreads();
  y[threadIdx.x] = s[threadIdx.x ^ 32];
}

__device__ unsigned arrived;

// The last block to come sums what all have written.
__global__ void last_block_kernel(float* x, float* y) {
  __shared__ bool last;
  x[blockIdx.x] = blockIdx.x;
  __threadfence();
  if (threadIdx.x == 0) last = atomicAdd(&arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  float s = 0;
  for (unsigned i = 0; i < gridDim.x; i++) s += x[i];
  y[threadIdx.x] = s;
  if (threadIdx.x == 0) arrived = 0;
}

__global__ void blocks_overlap_kernel(float* y) { y[threadIdx.x] = blockIdx.x; }

__global__ void local_array_kernel(const float* x, float* y, int n) {
  float local[8];
  for (int i = 0; i < n; i++) local[i] = x[i];
  float s = 0;
#pragma unroll 1
  for (int i = 0; i < n; i++) s += local[(i * 5) % n];
  y[threadIdx.x] = s;
}

}  // namespace

extern "C" {
cudaError_t reversed(float*, float* y, int safe) {
  reversed_kernel<<<1, 64>>>(y, safe);
  return cudaGetLastError();
}
cudaError_t warp_sum(float*, float* y, int safe) {
  warp_sum_kernel<<<1, 32>>>(y, safe);
  return cudaGetLastError();
}
cudaError_t exchange(float*, float* y, int safe) {
  exchange_kernel<<<1, 32>>>(y, safe);
  return cudaGetLastError();
}
cudaError_t asynchronous(float* x, float* y, int safe) {
  asynchronous_kernel<<<1, 64>>>(x, y, safe);
  return cudaGetLastError();
}
cudaError_t last_block(float* x, float* y, int) {
  last_block_kernel<<<4, 1>>>(x, y);
  return cudaGetLastError();
}
cudaError_t blocks_overlap(float*, float* y, int) {
  blocks_overlap_kernel<<<4, 32>>>(y);
  return cudaGetLastError();
}
cudaError_t local_array(const float* x, float* y, int n) {
  local_array_kernel<<<1, 32>>>(x, y, n);
  return cudaGetLastError();
}
}
