// lora_linear of a few rows, whose time is that of reading the weight: each warp reads rows of it once, 16 bytes a lane.
#pragma once

#include "launch.cuh"
#include "lora_rows.cuh"

namespace pykernels::cuda {

constexpr int kFewThreads = 256, kFewWarps = kFewThreads / 32;

__device__ __forceinline__ float sum_over_lanes(float v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}

// S of one row and one of the adapter's ranks.
template <class T, class F>
__global__ void __launch_bounds__(kFewThreads) lora_few_shrink_kernel(const __grid_constant__ LoraFew p) {
  __shared__ float of_warp[kFewWarps];
  const int64_t row = blockIdx.x / p.call.rank, rank = blockIdx.x % p.call.rank, in = p.call.in;
  const int adapter = adapter_of(p.call, row);
  float sum = 0.f;
  if (adapter >= 0) {
    const T* const x = static_cast<const T*>(p.x.data) + row * p.x.row;
    const F* const a = static_cast<const F*>(p.lora_a) + (adapter * p.call.rank + rank) * in;
    for (int64_t column = threadIdx.x * 8; column < in; column += kFewThreads * 8) {
      const int n = int(in - column < 8 ? in - column : 8);
      float v[8], f[8];
      load_eight(v, x + column, n, p.wide && n == 8);
      load_eight(f, a + column, n, p.wide_a && n == 8);
      if (p.call.keep_threshold) {
        const Draws draws = draws_of(p.call, row, column);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = draws[i] < p.call.keep_threshold ? v[i] : 0.f;
      }
#pragma unroll
      for (int i = 0; i < 8; i++) sum = fmaf(v[i], f[i], sum);
    }
  }
  sum = sum_over_lanes(sum);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kFewWarps; i++) total += of_warp[i];
  p.s[row * p.call.rank + rank] = p.call.keep_threshold ? total * float(p.call.keep_scale) : total;
}

// Warps make kOutputs neighbouring outputs of up to kRows rows.
template <class T, int kRows, int kOutputs>
__global__ void __launch_bounds__(kFewThreads) lora_few_kernel(const __grid_constant__ LoraFew p) {
  const int lane = threadIdx.x % 32;
  const int64_t in = p.call.in, out = p.call.out, rank = p.call.rank;
  const int64_t output0 = (int64_t(blockIdx.x) * kFewWarps + threadIdx.x / 32) * kOutputs;
  if (output0 >= out) return;
  const T* const weight = static_cast<const T*>(p.weight) + output0 * in;
  const T* const x = static_cast<const T*>(p.x.data);
  float sums[kOutputs][kRows] = {};
  constexpr int kTogether = kRows == 1 ? 4 : 2;
#pragma unroll kTogether
  for (int64_t column = lane * 8; column < in; column += 32 * 8) {
    const int n = int(in - column < 8 ? in - column : 8);
    float w[kOutputs][8];
#pragma unroll
    for (int o = 0; o < kOutputs; o++) load_eight(w[o], weight + o * in + column, output0 + o < out ? n : 0, p.wide && output0 + o < out);
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      if (m >= p.call.rows) break;
      float v[8];
      load_eight(v, x + m * p.x.row + column, n, p.wide);
#pragma unroll
      for (int o = 0; o < kOutputs; o++) {
#pragma unroll
        for (int i = 0; i < 8; i++) sums[o][m] = fmaf(v[i], w[o][i], sums[o][m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; m++) {
    if (m >= p.call.rows) break;
    const int adapter = adapter_of(p.call, m);
    const float scale = scale_of(p.call, adapter);
#pragma unroll
    for (int o = 0; o < kOutputs; o++) {
      const int64_t output = output0 + o;
      if (output >= out) break;
      if (adapter >= 0) {
        const int64_t first = (adapter * out + output) * rank;
        for (int64_t r = lane; r < rank; r += 32) {
          const float b =
              p.call.float_adapters ? static_cast<const float*>(p.lora_b)[first + r] : to_float(static_cast<const T*>(p.lora_b)[first + r]);
          sums[o][m] = fmaf(scale * p.s[m * rank + r], b, sums[o][m]);
        }
      }
      float v = sum_over_lanes(sums[o][m]);
      if (p.bias) v += to_float(static_cast<const T*>(p.bias)[output]);
      if (lane == 0) static_cast<T*>(p.y)[m * out + output] = from_float<T>(v);
    }
  }
}

template <class T, int kRows>
cudaError_t launch_few_rows(const LoraFew& p, cudaStream_t stream) {
  constexpr int kOutputs = kRows == 1 ? 1 : 2;
  return launch(lora_few_kernel<T, kRows, kOutputs>, dim3(blocks_of(p.call.out, kFewWarps * kOutputs)), dim3(kFewThreads), 0, stream, p);
}

template <class T>
cudaError_t launch_few(const LoraFew& p, cudaStream_t stream) {
  if (p.call.rank > 0) {
    const auto shrink = p.call.float_adapters ? lora_few_shrink_kernel<T, float> : lora_few_shrink_kernel<T, T>;
    const cudaError_t error = launch(shrink, dim3(unsigned(p.call.rows * p.call.rank)), dim3(kFewThreads), 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  return p.call.rows == 1 ? launch_few_rows<T, 1>(p, stream) : launch_few_rows<T, kFewRows>(p, stream);
}

}  // namespace pykernels::cuda
