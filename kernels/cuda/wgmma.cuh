// Products of tiles by Hopper's warpgroup instructions, which read both operands from shared memory (compute capability 9.0a alone).
// A tile of product.cuh's kind: rows of 128 bytes of k, swizzled as the instructions want it; warpgroups of four warps make 64 rows each.
#pragma once

#include "product.cuh"

namespace pykernels::cuda {

template <class Math_, int kRows_, int kStages_>
struct WarpgroupTile {
  using Math = Math_;
  using Element = typename Math::Element;
  static constexpr bool kWarpgroups = true;
  static constexpr int kRows = kRows_, kColumns = 128, kStages = kStages_;
  static constexpr int kThreads = 2 * kRows, kAcross = 1, kWarpRows = 16, kWarpColumns = kColumns;
  static constexpr int kSlots = 2, kGroups = kColumns / 32;
  static constexpr int kStepBytes = 128, kRowThreads = 8, kPassRows = kThreads / kRowThreads;
  static constexpr int kARows = kRows / kPassRows, kBRows = kColumns / kPassRows;
  static constexpr int kStageBytes = (kRows + kColumns) * kStepBytes;
  static constexpr int kAlignment = 1024;  // of the swizzle's period
  static constexpr int kSharedBytes = kStages * kStageBytes + kAlignment;
  static_assert(kRows % 64 == 0 && kRows * kColumns * 4 <= kStages * kStageBytes);

  __device__ __forceinline__ static uint32_t swizzled(int row, int chunk) { return uint32_t(row * kStepBytes + (chunk ^ (row & 7)) * 16); }
};

// Where an operand of rows of 128 bytes begins: blocks of eight rows follow each other. Where the sum is over rows, `across` bytes lie
// between 64 columns and the next.
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address, uint32_t across = 16) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kBlockBytes = 8 * 128;
  return kSwizzle128 | (kBlockBytes >> 4) << 32 | uint64_t(across >> 4) << 16 | (address & 0x3ffff) >> 4;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYKERNELS_WARPGROUP_SUMS(t) \
  "+f"(c[0][t / 4][t % 4 * 2]), "+f"(c[0][t / 4][t % 4 * 2 + 1]), "+f"(c[1][t / 4][t % 4 * 2]), "+f"(c[1][t / 4][t % 4 * 2 + 1])
#define PYKERNELS_WARPGROUP_PRODUCT(types, transposed_a, transposed_b)                                                                    \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                                                       \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, "    \
               "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
               "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, " transposed_a             \
               ", " transposed_b ";"                                                                                                      \
               : PYKERNELS_WARPGROUP_SUMS(0), PYKERNELS_WARPGROUP_SUMS(1), PYKERNELS_WARPGROUP_SUMS(2), PYKERNELS_WARPGROUP_SUMS(3),      \
                 PYKERNELS_WARPGROUP_SUMS(4), PYKERNELS_WARPGROUP_SUMS(5), PYKERNELS_WARPGROUP_SUMS(6), PYKERNELS_WARPGROUP_SUMS(7),      \
                 PYKERNELS_WARPGROUP_SUMS(8), PYKERNELS_WARPGROUP_SUMS(9), PYKERNELS_WARPGROUP_SUMS(10), PYKERNELS_WARPGROUP_SUMS(11),    \
                 PYKERNELS_WARPGROUP_SUMS(12), PYKERNELS_WARPGROUP_SUMS(13), PYKERNELS_WARPGROUP_SUMS(14), PYKERNELS_WARPGROUP_SUMS(15)   \
               : "l"(a), "l"(b))
#endif

// c += the product of 64 rows, 128 columns and 16 of k; the warpgroup does other things meanwhile. kOverRows, kOverColumns: a is contiguous
// along rows, b along columns, instead of k.
template <class Math, bool kOverRows, bool kOverColumns = kOverRows>
__device__ __forceinline__ void warpgroup_multiply(float (&c)[2][4][8], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static_assert(kOverColumns || !kOverRows);
  if constexpr (Math::kBfloat16 && kOverRows) {
    PYKERNELS_WARPGROUP_PRODUCT("bf16.bf16", "1", "1");
  } else if constexpr (Math::kBfloat16 && kOverColumns) {
    PYKERNELS_WARPGROUP_PRODUCT("bf16.bf16", "0", "1");
  } else if constexpr (Math::kBfloat16) {
    PYKERNELS_WARPGROUP_PRODUCT("bf16.bf16", "0", "0");
  } else if constexpr (kOverRows) {
    PYKERNELS_WARPGROUP_PRODUCT("f16.f16", "1", "1");
  } else if constexpr (kOverColumns) {
    PYKERNELS_WARPGROUP_PRODUCT("f16.f16", "0", "1");
  } else {
    PYKERNELS_WARPGROUP_PRODUCT("f16.f16", "0", "0");
  }
#endif
}

__device__ __forceinline__ void warpgroup_begin() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void warpgroup_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until the sums are there.
template <class Sums>
__device__ __forceinline__ void warpgroup_wait(Sums& sums) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int g = 0; g < 4; g++) {
#pragma unroll
      for (int e = 0; e < 8; e++) asm volatile("" : "+f"(sums.c[i][g][e])::"memory");
    }
  }
#endif
}
// What this thread has copied to shared memory becomes visible to the instructions, which read it another way.
__device__ __forceinline__ void warpgroup_publish() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// As continue_product of product.cuh; multiply(a, b) begins the products of a stage at these addresses. A stage is overwritten after its
// products are complete, which is one step later.
template <class Tile, class Sums, class Source, class Arrived, class Multiply>
__device__ __forceinline__ void continue_warpgroups(Sums& sums, Source& source, int steps, char* shared, Arrived arrived,
                                                    Multiply multiply) {
  const uint32_t base = shared_address(shared), a_offset = threadIdx.x / 128 * 64 * Tile::kStepBytes;
  constexpr uint32_t b_offset = Tile::kRows * Tile::kStepBytes;
#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; s++) {
    if (s < steps) source.copy(base + s * Tile::kStageBytes, base + s * Tile::kStageBytes + b_offset);
    commit_copies();
  }
  int read = 0, write = Tile::kStages - 1;
  for (int step = 0; step < steps; step++) {
    wait_copies<Tile::kStages - 2>();
    warpgroup_wait(sums);
    const uint32_t stage = base + read * Tile::kStageBytes;
    arrived(stage);
    warpgroup_publish();
    __syncthreads();
    warpgroup_begin();
    multiply(stage + a_offset, stage + b_offset);
    warpgroup_commit();
    if (step + Tile::kStages - 1 < steps) source.copy(base + write * Tile::kStageBytes, base + write * Tile::kStageBytes + b_offset);
    commit_copies();
    read = read + 1 == Tile::kStages ? 0 : read + 1;
    write = write + 1 == Tile::kStages ? 0 : write + 1;
  }
  warpgroup_wait(sums);
  wait_copies<0>();
  __syncthreads();
}

template <class Math, int kRows, int kStages, class Source, class Arrived>
__device__ __forceinline__ void continue_product(Accumulators<WarpgroupTile<Math, kRows, kStages>>& sums, Source& source, int steps,
                                                 char* shared, Arrived arrived) {
  using Tile = WarpgroupTile<Math, kRows, kStages>;
  continue_warpgroups<Tile>(sums, source, steps, shared, arrived, [&](uint32_t from_a, uint32_t from_b) {
    const uint64_t a = operand_descriptor(from_a), b = operand_descriptor(from_b);
#pragma unroll
    for (int k = 0; k < Tile::kStepBytes / 32; k++) warpgroup_multiply<Math, false>(sums.c, a + k * 2, b + k * 2);
  });
}

}  // namespace pykernels::cuda
