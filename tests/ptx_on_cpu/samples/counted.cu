// Kernels whose traffic, conflicts and operations are known. test_counters.py does the sums.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

__global__ void copy_kernel(const float* x, float* y, int stride) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i * stride];
}
__global__ void copy16_kernel(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void reread_kernel(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x & 7] + x[threadIdx.x]; }
__global__ void shared_kernel(float* y, int stride) {
  __shared__ float s[32 * 33];
  s[threadIdx.x * stride] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void arithmetic_kernel(float* x, double* y) {
  const float a = x[threadIdx.x];
  x[threadIdx.x] = fmaf(a, a, a) + a;
  y[threadIdx.x] = y[threadIdx.x] * 2;
}
__global__ void divergent_kernel(const float* x, float* y) {
  float s = 0;
  for (int i = 0; i <= int(threadIdx.x) % 4; i++) s += x[i * 32 + threadIdx.x];
  y[threadIdx.x] = s;
}

}  // namespace

extern "C" {
cudaError_t copy(const float* x, float* y, int blocks, int stride) {
  copy_kernel<<<blocks, 64>>>(x, y, stride);
  return cudaGetLastError();
}
cudaError_t copy16(const void* x, void* y) {
  copy16_kernel<<<1, 32>>>(static_cast<const float4*>(x), static_cast<float4*>(y));
  return cudaGetLastError();
}
cudaError_t reread(const float* x, float* y) {
  reread_kernel<<<1, 32>>>(x, y);
  return cudaGetLastError();
}
cudaError_t shared(float* y, int stride) {
  shared_kernel<<<1, 32>>>(y, stride);
  return cudaGetLastError();
}
cudaError_t arithmetic(float* x, double* y) {
  arithmetic_kernel<<<1, 32>>>(x, y);
  return cudaGetLastError();
}
cudaError_t divergent(const float* x, float* y) {
  divergent_kernel<<<1, 32>>>(x, y);
  return cudaGetLastError();
}
}
