// The bits and random numbers of eight neighbours of a parameter, and their places among all that a block has selected.
#pragma once

#include "child_update.h"
#include "philox.cuh"

namespace pykernels::cuda {

// Index in the whole parameter of local element i.
__device__ __forceinline__ uint64_t whole_index(const ChildTensor& t, int64_t i) {
  if (!t.runs) return uint64_t(i);
  const ElementRun run = t.runs[i / t.run_elements];
  const int64_t in = i % t.run_elements;
  return uint64_t(run.start + in / run.length * run.stride + in % run.length);
}

// The draws of local elements i ... i + n - 1, i a multiple of 8.
__device__ __forceinline__ Draws draw_eight(uint64_t seed, const ChildTensor& t, int64_t i, int n, uint32_t stream) {
  if (!t.runs) return philox(seed, uint64_t(i) / 8, stream, t.step);
  Draws draws{};
#pragma unroll 1
  for (int k = 0; k < n; k++) {
    const uint64_t element = whole_index(t, i + k);
    const Draws d = philox(seed, element / 8, stream, t.step);
    const int from = int(element % 8 / 2);
    const uint32_t pair = from == 0 ? d.words[0] : from == 1 ? d.words[1] : from == 2 ? d.words[2] : d.words[3];
    const uint32_t draw = element % 2 ? pair >> 16 : pair & 0xffffu;
#pragma unroll
    for (int w = 0; w < 4; w++) draws.words[w] |= k / 2 == w ? draw << k % 2 * 16 : 0;  // registers have no index
  }
  return draws;
}

// Bit k: whether element i + k is selected; stored, drawn, or all of them. None from n on.
__device__ __forceinline__ uint32_t bits_of_eight(const ChildArgs& args, const ChildTensor& t, int64_t i, int n) {
  if (n <= 0) return 0;
  const uint32_t present = (1u << n) - 1;
  if (t.mask) return t.mask[i / 8] & present;
  if (!args.threshold) return present;
  const Draws draws = draw_eight(args.seed, t, i, n, t.stream);
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < 8; k++) bits |= uint32_t(k < n && draws[k] < args.threshold) << k;
  return bits;
}

// The sum of `own` over the threads before this one, and over all. Every thread of the block calls it; shared holds kThreads / 32.
template <int kThreads>
__device__ __forceinline__ int sum_before(int own, int* shared, int& all) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int lower = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += lower;
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  int before = 0;
  all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    const int n = shared[w];
    if (w < warp) before += n;
    all += n;
  }
  __syncthreads();  // shared may be written again
  return before + sum - own;
}

}  // namespace pykernels::cuda
