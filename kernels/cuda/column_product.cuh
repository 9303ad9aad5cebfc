// Tile products whose operands' rows keep their order, and those whose second operand is contiguous along the columns of the result instead
// of the inner dimension: c[m][n] += sum over k of a[m][k] b[k][n].
#pragma once

#include "wgmma.cuh"

namespace pykernels::cuda {

// A tile of product.cuh; the fields say which layout the weight has.
template <class Base_>
struct RowsTile : Base_ {
  using Base = Base_;
  static constexpr bool kColumnsAdjacent = false;
};

// A stage of b is rows of the inner dimension with the tile's columns.
template <class Base_>
struct ColumnsTile : Base_ {
  using Base = Base_;
  static constexpr bool kColumnsAdjacent = true;
  static constexpr int kSize = int(sizeof(typename Base::Element)), kDepth = Base::kStepBytes / kSize;

  // 16-bit elements are read by ldmatrix, eight rows of one chunk at a time; of the others a warp reads four rows of 32 bytes.
  __device__ __forceinline__ static uint32_t column_address(int row, int chunk) {
    return uint32_t(row * Base::kColumns * kSize + (kSize == 2 ? chunk ^ (row & 7) : chunk ^ (row & 3) << 1) * 16);
  }
};

// For warpgroups: blocks of 64 columns, as their instructions want them.
template <class Math_, int kRows_, int kStages_>
struct ColumnsTile<WarpgroupTile<Math_, kRows_, kStages_>> : WarpgroupTile<Math_, kRows_, kStages_> {
  using Base = WarpgroupTile<Math_, kRows_, kStages_>;
  static constexpr bool kColumnsAdjacent = true;
  static constexpr int kDepth = Base::kStepBytes / 2, kBlockBytes = kDepth * 128;

  __device__ __forceinline__ static uint32_t column_address(int row, int chunk) {
    return uint32_t(chunk / 8 * kBlockBytes + row * 128 + (chunk % 8 ^ row % 8) * 16);
  }
};

template <class Base>
struct Accumulators<RowsTile<Base>> : Accumulators<Base> {};

template <class Base>
struct Accumulators<ColumnsTile<Base>> : Accumulators<Base> {
  using Tile = ColumnsTile<Base>;
  using Accumulators<Base>::c;

  __device__ __forceinline__ void multiply(uint32_t a, uint32_t b) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    a += (warp / Tile::kAcross) * Tile::kWarpRows * Tile::kStepBytes;
    const int column0 = (warp % Tile::kAcross) * Tile::kWarpColumns;
    if constexpr (Tile::Math::kTensorCores) {
      multiply_fragments(a, b, column0, lane);
    } else {
      multiply_elements(a, b, column0, lane);
    }
  }

 private:
  // 4 bytes of column `column` in row `row` of b.
  __device__ __forceinline__ static uint32_t element(uint32_t b, int row, int column) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(b + Tile::column_address(row, column / 4) + column % 4 * 4) : "memory");
    return v;
  }

  __device__ __forceinline__ void multiply_fragments(uint32_t a, uint32_t b, int column0, int lane) {
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
        if constexpr (Tile::kSize == 2) {
          load_matrices_transposed(fb, b + Tile::column_address(step * 16 + lane % 16, (column0 + pair * 16) / 8 + lane / 16));
        } else {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            fb[e] = element(b, step * 8 + e % 2 * 4 + lane % 4, column0 + pair * 16 + e / 2 * 8 + lane / 4);
            Math::prepare(fb[e]);
          }
        }
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

  __device__ __forceinline__ void multiply_elements(uint32_t a, uint32_t b, int column0, int lane) {
#pragma unroll
    for (int chunk = 0; chunk < 4; chunk++) {
      float fa[Tile::kSlots][4];
#pragma unroll
      for (int i = 0; i < Tile::kSlots; i++) {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(fa[i][0]), "=f"(fa[i][1]), "=f"(fa[i][2]), "=f"(fa[i][3])
                     : "r"(a + Tile::swizzled(i * 8 + lane / 4, chunk))
                     : "memory");
      }
#pragma unroll
      for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int g = 0; g < Tile::kGroups; g++) {
#pragma unroll
          for (int t = 0; t < 4; t++) {
            const int column = column0 + g * 32 + t * 8 + lane % 4 * 2;
            float low, high;
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                         : "=f"(low), "=f"(high)
                         : "r"(b + Tile::column_address(chunk * 4 + k, column / 4) + column % 4 * 4)
                         : "memory");
#pragma unroll
            for (int i = 0; i < Tile::kSlots; i++) {
              c[i][g][2 * t] = fmaf(fa[i][k], low, c[i][g][2 * t]);
              c[i][g][2 * t + 1] = fmaf(fa[i][k], high, c[i][g][2 * t + 1]);
            }
          }
        }
      }
    }
  }
};

template <class Math, int kRows, int kStages>
struct Accumulators<ColumnsTile<WarpgroupTile<Math, kRows, kStages>>> : Accumulators<WarpgroupTile<Math, kRows, kStages>> {};

template <class Math, int kRows, int kStages, class Source, class Arrived>
__device__ __forceinline__ void continue_product(Accumulators<ColumnsTile<WarpgroupTile<Math, kRows, kStages>>>& sums, Source& source,
                                                 int steps, char* shared, Arrived arrived) {
  using Tile = ColumnsTile<WarpgroupTile<Math, kRows, kStages>>;
  continue_warpgroups<Tile>(sums, source, steps, shared, arrived, [&](uint32_t from_a, uint32_t from_b) {
    const uint64_t a = operand_descriptor(from_a), b = operand_descriptor(from_b, Tile::kBlockBytes);
    constexpr int kBytes = 16 * 128;  // of 16 rows of b
#pragma unroll
    for (int k = 0; k < Tile::kDepth / 16; k++) warpgroup_multiply<Math, false, true>(sums.c, a + k * 2, b + k * (kBytes >> 4));
  });
}

// Where a thread's sums are: change(row, column, v) for its eight of each group of 32 columns, v[2 t] and v[2 t + 1] belonging to columns
// column + 8 t and the next.
template <class Tile, class Change>
__device__ __forceinline__ void change_sums(Accumulators<Tile>& sums, Change change) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < Tile::kSlots; i++) {
#pragma unroll
    for (int g = 0; g < Tile::kGroups; g++) {
      change(warp / Tile::kAcross * Tile::kWarpRows + lane / 4 + i * 8, warp % Tile::kAcross * Tile::kWarpColumns + g * 32 + lane % 4 * 2,
             sums.c[i][g]);
    }
  }
}

// Calls use(row, column, v) with v the eight sums from column on, through shared memory: neighbours in a row go to neighbouring threads.
template <class Tile, class Use>
__device__ __forceinline__ void exchange_sums(Accumulators<Tile>& sums, char* shared, Use use) {
  constexpr int kEights = Tile::kColumns / 8, kSpread = kEights < 8 ? kEights - 1 : 7;
  float* const all = reinterpret_cast<float*>(shared);
  const auto place = [&](int row, int column) { return all + (row * kEights + (column / 8 ^ row & kSpread)) * 8 + column % 8; };
  change_sums(sums, [&](int row, int column, const float (&v)[8]) {
#pragma unroll
    for (int t = 0; t < 4; t++) *reinterpret_cast<float2*>(place(row, column + t * 8)) = make_float2(v[2 * t], v[2 * t + 1]);
  });
  __syncthreads();
#pragma unroll 1
  for (int index = threadIdx.x; index < Tile::kRows * kEights; index += Tile::kThreads) {
    const int row = index / kEights, column = index % kEights * 8;
    const float4* from = reinterpret_cast<const float4*>(place(row, column));
    const float4 low = from[0], high = from[1];
    const float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    use(row, column, v);
  }
}

}  // namespace pykernels::cuda
