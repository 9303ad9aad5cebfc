// Products of tiles: c[m][n] += sum over k of a[m][k] b[n][k], with both operands contiguous along k. Copies to shared memory run kStages -
// 1 steps of 64 bytes of k ahead of the arithmetic. Every element is summed in the order of k by one thread, whatever the tile's shape.
//
// Columns are permuted within groups of 32 so that a thread's accumulators are eight neighbours in memory: the operand's row
// permuted_column(n) holds what belongs to column n.
#pragma once

#include "mma.cuh"

namespace pykernels::cuda {

__host__ __device__ __forceinline__ int64_t permuted_column(int64_t n) {
  const int in = int(n % 32), lane = in / 8, tile = in % 8 / 2;
  return n - in + tile * 8 + 2 * lane + in % 2;
}

template <class Math_, int kRows_, int kColumns_, int kWarpsDown, int kWarpsAcross, int kStages_>
struct ProductTile {
  using Math = Math_;
  using Element = typename Math::Element;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross, kAcross = kWarpsAcross;
  static constexpr int kWarpRows = kRows / kWarpsDown, kWarpColumns = kColumns / kWarpsAcross;
  // A thread has rows lane / 4 + 8 * slot of its warp's, and of each group of 32 columns the eight from 8 (lane % 4) on.
  static constexpr int kSlots = kWarpRows / 8, kGroups = kWarpColumns / 32;
  static constexpr bool kWarpgroups = false;
  static constexpr int kStepBytes = 64, kRowThreads = 4, kPassRows = kThreads / kRowThreads;  // four threads copy a row
  static constexpr int kARows = kRows / kPassRows, kBRows = kColumns / kPassRows;
  static constexpr int kStageBytes = (kRows + kColumns) * kStepBytes;
  static constexpr int kPipelineBytes = kStages * kStageBytes, kResultBytes = kRows * kColumns * 4;
  static constexpr int kAlignment = 128, kSharedBytes = (kPipelineBytes > kResultBytes ? kPipelineBytes : kResultBytes) + kAlignment;
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 32 == 0 && kRows % kPassRows == 0 && kColumns % kPassRows == 0);

  // Where 16 bytes of a row of a stage lie: eight consecutive rows of one chunk fall into different banks.
  __device__ __forceinline__ static uint32_t swizzled(int row, int chunk) {
    return uint32_t(row * kStepBytes + ((chunk ^ (row >> 1)) & 3) * 16);
  }
};

// Dynamic shared memory from where a tile may begin.
template <class Tile>
__device__ __forceinline__ char* aligned_shared(char* shared) {
  return shared + (Tile::kAlignment - shared_address(shared) % Tile::kAlignment) % Tile::kAlignment;
}

template <class Tile>
struct Accumulators {
  float c[Tile::kSlots][Tile::kGroups][8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Tile::kSlots; i++) {
#pragma unroll
      for (int g = 0; g < Tile::kGroups; g++) {
#pragma unroll
        for (int e = 0; e < 8; e++) c[i][g][e] = 0.f;
      }
    }
  }

  // One stage: a and b are the shared addresses of its operands.
  __device__ __forceinline__ void multiply(uint32_t a, uint32_t b) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    a += (warp / Tile::kAcross) * Tile::kWarpRows * Tile::kStepBytes;
    b += (warp % Tile::kAcross) * Tile::kWarpColumns * Tile::kStepBytes;
    if constexpr (Tile::Math::kTensorCores) {
      multiply_fragments(a, b, lane);
    } else {
      multiply_elements(a, b, lane);
    }
  }

 private:
  __device__ __forceinline__ void multiply_fragments(uint32_t a, uint32_t b, int lane) {
    using Math = typename Tile::Math;
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t fa[Tile::kSlots / 2][4];
#pragma unroll
      for (int i = 0; i < Tile::kSlots / 2; i++) {
        load_matrices(fa[i], a + Tile::swizzled(i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int e = 0; e < 4; e++) Math::prepare(fa[i][e]);
      }
#pragma unroll
      for (int pair = 0; pair < Tile::kGroups * 2; pair++) {
        uint32_t fb[4];
        load_matrices(fb, b + Tile::swizzled(pair * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int e = 0; e < 4; e++) Math::prepare(fb[e]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
          for (int i = 0; i < Tile::kSlots / 2; i++) {
            float (&upper)[8] = c[2 * i][pair / 2], (&lower)[8] = c[2 * i + 1][pair / 2];
            const int e = 2 * (pair % 2 * 2 + half);
            Math::multiply(upper[e], upper[e + 1], lower[e], lower[e + 1], fa[i], fb[2 * half], fb[2 * half + 1]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_elements(uint32_t a, uint32_t b, int lane) {
    const auto load = [](uint32_t address) {
      float4 v;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
      return v;
    };
#pragma unroll
    for (int chunk = 0; chunk < 4; chunk++) {
      float4 fa[Tile::kSlots];
#pragma unroll
      for (int i = 0; i < Tile::kSlots; i++) fa[i] = load(a + Tile::swizzled(i * 8 + lane / 4, chunk));
#pragma unroll
      for (int g = 0; g < Tile::kGroups; g++) {
#pragma unroll
        for (int e = 0; e < 8; e++) {
          const float4 fb = load(b + Tile::swizzled(g * 32 + e / 2 * 8 + lane % 4 * 2 + e % 2, chunk));
#pragma unroll
          for (int i = 0; i < Tile::kSlots; i++) {
            float& sum = c[i][g][e];
            sum = fmaf(fa[i].x, fb.x, sum);
            sum = fmaf(fa[i].y, fb.y, sum);
            sum = fmaf(fa[i].z, fb.z, sum);
            sum = fmaf(fa[i].w, fb.w, sum);
          }
        }
      }
    }
  }
};

// Adds to the sums. source.copy(a, b) begins the copies of the next step into a stage; it is called `steps` times in all. arrived(a) may
// change what this thread has copied of the operand a of the next product.
template <class Tile, class Source, class Arrived>
__device__ __forceinline__ void continue_product(Accumulators<Tile>& sums, Source& source, int steps, char* shared, Arrived arrived) {
  const uint32_t base = shared_address(shared);
#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; s++) {
    if (s < steps) source.copy(base + s * Tile::kStageBytes, base + s * Tile::kStageBytes + Tile::kRows * Tile::kStepBytes);
    commit_copies();
  }
  int read = 0, write = Tile::kStages - 1;
  for (int step = 0; step < steps; step++) {
    wait_copies<Tile::kStages - 2>();
    arrived(base + read * Tile::kStageBytes);
    __syncthreads();  // what all threads copied is there, and the stage to be overwritten has been read
    if (step + Tile::kStages - 1 < steps) {
      source.copy(base + write * Tile::kStageBytes, base + write * Tile::kStageBytes + Tile::kRows * Tile::kStepBytes);
    }
    commit_copies();
    sums.multiply(base + read * Tile::kStageBytes, base + read * Tile::kStageBytes + Tile::kRows * Tile::kStepBytes);
    read = read + 1 == Tile::kStages ? 0 : read + 1;
    write = write + 1 == Tile::kStages ? 0 : write + 1;
  }
  wait_copies<0>();
  __syncthreads();
}

template <class Tile, class Source>
__device__ __forceinline__ void run_product(Accumulators<Tile>& sums, Source& source, int64_t steps, char* shared) {
  sums.clear();
  continue_product(sums, source, int(steps), shared, [](uint32_t) {});
}

// Calls use(row of the tile, column of the tile, v) with v[g] the eight sums from column + 32 g on, kTogether groups at a time. They go
// through shared memory, each thread's own, so that the code of `use` exists once and not for each row.
template <int kTogether, class Tile, class Use>
__device__ __forceinline__ void visit_sums(const Accumulators<Tile>& sums, char* shared, Use use) {
  static_assert(Tile::kGroups % kTogether == 0);
  float4* mine = reinterpret_cast<float4*>(shared) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < Tile::kSlots; i++) {
#pragma unroll
    for (int g = 0; g < Tile::kGroups; g++) {
      const float (&v)[8] = sums.c[i][g];
      mine[(i * Tile::kGroups + g) * 2 * Tile::kThreads] = make_float4(v[0], v[1], v[2], v[3]);
      mine[((i * Tile::kGroups + g) * 2 + 1) * Tile::kThreads] = make_float4(v[4], v[5], v[6], v[7]);
    }
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / Tile::kAcross * Tile::kWarpRows + lane / 4;
  const int column = warp % Tile::kAcross * Tile::kWarpColumns + lane % 4 * 8;
#pragma unroll 1
  for (int i = 0; i < Tile::kSlots * Tile::kGroups; i += kTogether) {
    float v[kTogether][8];
#pragma unroll
    for (int g = 0; g < kTogether; g++) {
      const float4 low = mine[(i + g) * 2 * Tile::kThreads], high = mine[((i + g) * 2 + 1) * Tile::kThreads];
      v[g][0] = low.x, v[g][1] = low.y, v[g][2] = low.z, v[g][3] = low.w;
      v[g][4] = high.x, v[g][5] = high.y, v[g][6] = high.z, v[g][7] = high.w;
    }
    use(row + i / Tile::kGroups * 8, column + i % Tile::kGroups * 32, v);
  }
}

}  // namespace pykernels::cuda
