// Plain kernels: elementwise, shared memory, shuffles, atomics, constants, calls, local arrays, fp64, printf-free control flow.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {

__constant__ float powers[8] = {1, 2, 4, 8, 16, 32, 64, 128};
__device__ int counter = 7;

__global__ void axpy_kernel(const float* __restrict__ x, float* __restrict__ y, float a, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) y[i] = a * x[i] + y[i];
}

__device__ float block_sum(float v) {
  __shared__ float partial[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  __syncthreads();
  if (!lane) partial[warp] = v;
  __syncthreads();
  v = lane < int(blockDim.x >> 5) ? partial[lane] : 0;
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

template <class T>
__global__ void __launch_bounds__(256) rms_norm_kernel(const T* __restrict__ x, T* __restrict__ y, int n, float eps) {
  const T* row = x + int64_t(blockIdx.x) * n;
  float s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) s += float(row[i]) * float(row[i]);
  s = block_sum(s);
  const float r = rsqrtf(s / n + eps);
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[int64_t(blockIdx.x) * n + i] = T(float(row[i]) * r);
}

__global__ void histogram_kernel(const int* x, int n, int* out) {
  extern __shared__ int bins[];
  for (int i = threadIdx.x; i < 64; i += blockDim.x) bins[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&bins[x[i] & 63], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < 64; i += blockDim.x) atomicAdd(&out[i], bins[i]);
}

__device__ __noinline__ float polynomial(const float* c, int n, float x) {
  float r = 0;
  for (int i = n - 1; i >= 0; i--) r = fmaf(r, x, c[i]);
  return r;
}
__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }

__global__ void mixed_kernel(const float* x, float* y, double* z, unsigned long long* totals, int n, int select) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float local[16];
  for (int k = 0; k < 16; k++) local[k] = x[i] * k;
  float r = local[(i * 5 + select) & 15] + polynomial(powers, 8, x[i] * 0.1f) + fibonacci(i % 7);
  switch (select + i % 6) {
    case 0: r += 1; break;
    case 1: r *= 2; break;
    case 2: r = sqrtf(fabsf(r)); break;
    case 3: r = expf(-fabsf(r) * 0.01f); break;
    case 4: r = tanhf(r); break;
    case 5: r = powf(fabsf(r) + 1, 0.3f); break;
    default: r = -r;
  }
  y[i] = r;
  z[i] = exp(double(x[i])) / (1.0 + double(x[i]) * x[i]) + erf(double(x[i]));
  atomicAdd(totals, static_cast<unsigned long long>(i));
  atomicMax(totals + 1, static_cast<unsigned long long>(__double_as_longlong(fabs(z[i]))));
  if (i == 0) totals[2] = counter;
}

__global__ void pairs_kernel(const __half2* a, const __nv_bfloat162* b, __half2* c, __nv_bfloat162* d, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
  c[i] = __hfma2(a[i], a[i], h2exp(__hneg2(__habs2(a[i]))));
  d[i] = __hfma2(__hadd2(b[i], b[i]), b[i], b[i]);
}

// Philox4x32-10, as Salmon et al. (2011) define it.
__global__ void philox_kernel(uint4* out, uint64_t seed, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint4 c = {uint32_t(i), 0, 0, 0};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c.x, p1 = uint64_t(0xCD9E8D57u) * c.z;
    c = {uint32_t(p1 >> 32) ^ c.y ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w ^ k1, uint32_t(p0)};
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  out[i] = c;
}

__global__ void votes_kernel(const int* x, unsigned* out) {
  const int v = x[threadIdx.x], lane = threadIdx.x;
  unsigned* o = out + lane * 8;
  o[0] = __ballot_sync(~0u, v > 2);
  o[1] = __any_sync(~0u, v > 100) | __all_sync(~0u, v >= 0) << 1;
  o[2] = __match_any_sync(~0u, v);
  int all;
  o[3] = __match_all_sync(~0u, v > -1, &all) + all;
  o[4] = __reduce_add_sync(~0u, unsigned(v));
  o[5] = __reduce_max_sync(~0u, v);
  o[6] = __syncthreads_count(v > 2);
  o[7] = __shfl_up_sync(~0u, v, 3) * 1000 + __shfl_down_sync(~0u, v, 2, 8);
}

}  // namespace

extern "C" {

cudaError_t axpy(const float* x, float* y, float a, int64_t n, cudaStream_t s) {
  axpy_kernel<<<unsigned((n + 255) / 256), 256, 0, s>>>(x, y, a, n);
  return cudaGetLastError();
}

cudaError_t rms_norm_f32(const float* x, float* y, int rows, int n, float eps, cudaStream_t s) {
  rms_norm_kernel<<<rows, 256, 0, s>>>(x, y, n, eps);
  return cudaGetLastError();
}

cudaError_t rms_norm_bf16(const void* x, void* y, int rows, int n, float eps, cudaStream_t s) {
  rms_norm_kernel<<<rows, 256, 0, s>>>(static_cast<const __nv_bfloat16*>(x), static_cast<__nv_bfloat16*>(y), n, eps);
  return cudaGetLastError();
}

cudaError_t histogram(const int* x, int n, int* out, cudaStream_t s) {
  cudaError_t e = cudaMemsetAsync(out, 0, 64 * sizeof(int), s);
  if (e != cudaSuccess) return e;
  histogram_kernel<<<8, 128, 64 * sizeof(int), s>>>(x, n, out);
  return cudaGetLastError();
}

cudaError_t mixed(const float* x, float* y, double* z, unsigned long long* totals, int n, int select, cudaStream_t s) {
  const int value = 11;
  cudaError_t e = cudaMemcpyToSymbol(counter, &value, sizeof value);
  if (e != cudaSuccess) return e;
  mixed_kernel<<<(n + 127) / 128, 128, 0, s>>>(x, y, z, totals, n, select);
  return cudaGetLastError();
}

cudaError_t pairs(const void* a, const void* b, void* c, void* d, int n, cudaStream_t s) {
  pairs_kernel<<<1, 64, 0, s>>>(static_cast<const __half2*>(a), static_cast<const __nv_bfloat162*>(b), static_cast<__half2*>(c),
                                static_cast<__nv_bfloat162*>(d), n);
  return cudaGetLastError();
}

cudaError_t philox(void* out, uint64_t seed, int n, cudaStream_t s) {
  philox_kernel<<<(n + 63) / 64, 64, 0, s>>>(static_cast<uint4*>(out), seed, n);
  return cudaGetLastError();
}

cudaError_t votes(const int* x, unsigned* out, cudaStream_t s) {
  votes_kernel<<<1, 32, 0, s>>>(x, out);
  return cudaGetLastError();
}

}  // extern "C"
