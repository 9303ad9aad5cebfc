// Products that sum over rows, as gradients of weights are: c[m][n] += sum over r of a[r][m] b[r][n], both operands contiguous along m or
// n. As in product.cuh copies run ahead; which rows there are is found out one step before they are copied, and steps without any are
// skipped.
#pragma once

#include "wgmma.cuh"

namespace pykernels::cuda {

template <class Math_, int kRows_, int kColumns_, int kWarpsDown, int kWarpsAcross, int kStages_>
struct RowProductTile {
  using Math = Math_;
  using Element = typename Math::Element;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross, kAcross = kWarpsAcross;
  static constexpr int kWarpRows = kRows / kWarpsDown, kWarpColumns = kColumns / kWarpsAcross;
  static constexpr bool kWarpgroups = false, kNarrow = sizeof(Element) == 2;
  static constexpr int kDepth = kNarrow ? 32 : 16;  // rows of a stage
  // 16-bit rows are swizzled, as ldmatrix reads them; of 32-bit rows four are read at a time, whose banks the padding sets apart.
  static constexpr int kPadding = kNarrow ? 0 : 32;
  static constexpr int kABytes = kRows * int(sizeof(Element)) + kPadding, kBBytes = kColumns * int(sizeof(Element)) + kPadding;
  static constexpr int kAChunks = kRows * int(sizeof(Element)) / 16, kBChunks = kColumns * int(sizeof(Element)) / 16;
  static constexpr int kStageBytes = kDepth * (kABytes + kBBytes);
  static constexpr int kAlignment = 128, kSharedBytes = kStages * kStageBytes + kAlignment;
  static constexpr int kTilesDown = kWarpRows / 16, kTilesAcross = kWarpColumns / 8;
  static_assert(kDepth * kAChunks % kThreads == 0 && kDepth * kBChunks % kThreads == 0 && kAChunks % 8 == 0 && kBChunks % 8 == 0);
  static_assert(Math::kTensorCores || (kWarpRows == 32 && kWarpColumns == 32));

  template <int kRowBytes>
  __device__ __forceinline__ static uint32_t address(int row, int chunk) {
    return uint32_t(row * kRowBytes + (kNarrow ? chunk ^ (row & 7) : chunk) * 16);
  }
};

// The same for warpgroups of four warps, which make 64 rows each: blocks of 64 columns, swizzled as their instructions want it.
template <class Math_, int kStages_>
struct WarpgroupRowTile {
  using Math = Math_;
  using Element = typename Math::Element;
  static constexpr bool kWarpgroups = true;
  static constexpr int kRows = 128, kColumns = 128, kStages = kStages_, kThreads = 2 * kRows;
  static constexpr int kDepth = 64, kBlockBytes = kDepth * 128;
  static constexpr int kABytes = kRows * 2, kBBytes = kColumns * 2, kAChunks = kRows / 8, kBChunks = kColumns / 8;
  static constexpr int kStageBytes = kDepth * (kABytes + kBBytes);
  static constexpr int kAlignment = 1024, kSharedBytes = kStages * kStageBytes + kAlignment;

  template <int kRowBytes>
  __device__ __forceinline__ static uint32_t address(int row, int chunk) {
    return uint32_t(chunk / 8 * kBlockBytes + row * 128 + (chunk % 8 ^ row % 8) * 16);
  }
};

// The rows of the last steps: where each row of b begins, or null. Slots are reused after kStages + 1 steps.
template <class Tile>
struct RowWindow {
  static constexpr int kSlots = Tile::kStages + 1;
  static constexpr int kWarps = (Tile::kDepth + 31) / 32;  // that look for rows
  const char* b[kSlots][Tile::kDepth];
  int found[kSlots][kWarps];

  __device__ __forceinline__ bool any(int slot) const {
    bool any = found[slot][0];
#pragma unroll
    for (int i = 1; i < kWarps; i++) any |= found[slot][i] != 0;
    return any;
  }
};

template <class Tile, bool kWarpgroups = Tile::kWarpgroups>
struct RowSums {
  // Tensor cores: fragments of 16 x 8. Else: 4 x 8 elements, in the first of them.
  static constexpr int kDown = Tile::Math::kTensorCores ? Tile::kTilesDown : 4, kAcross = Tile::Math::kTensorCores ? Tile::kTilesAcross : 2;
  float c[kDown][kAcross][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; i++) {
#pragma unroll
      for (int j = 0; j < kAcross; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) c[i][j][e] = 0.f;
      }
    }
  }

  __device__ __forceinline__ void multiply(const char* a, const char* b) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row0 = warp / Tile::kAcross * Tile::kWarpRows, column0 = warp % Tile::kAcross * Tile::kWarpColumns;
    if constexpr (!Tile::Math::kTensorCores) {
      multiply_elements(a, b, row0 + lane / 4 * 4, column0 + lane % 4 * 4);
    } else if constexpr (Tile::kNarrow) {
      multiply_narrow(shared_address(a), shared_address(b), row0, column0, lane);
    } else {
      multiply_wide(a, b, row0 + lane / 4, column0 + lane / 4, lane % 4);
    }
  }

  // use(row, column, two neighbours or four) in the tile.
  template <class Use>
  __device__ __forceinline__ void visit(Use use) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row0 = warp / Tile::kAcross * Tile::kWarpRows, column0 = warp % Tile::kAcross * Tile::kWarpColumns;
#pragma unroll
    for (int i = 0; i < kDown; i++) {
#pragma unroll
      for (int j = 0; j < kAcross; j++) {
        const float (&v)[4] = c[i][j];
        if constexpr (Tile::Math::kTensorCores) {
          const int row = row0 + i * 16 + lane / 4, column = column0 + j * 8 + lane % 4 * 2;
          use(row, column, v[0], v[1]);
          use(row + 8, column, v[2], v[3]);
        } else {
          const int row = row0 + lane / 4 * 4 + i, column = column0 + j * 16 + lane % 4 * 4;
          use(row, column, v[0], v[1]);
          use(row, column + 2, v[2], v[3]);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void multiply_narrow(uint32_t a, uint32_t b, int row0, int column0, int lane) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t fa[Tile::kTilesDown][4];
#pragma unroll
      for (int i = 0; i < Tile::kTilesDown; i++) {
        const int chunk = (row0 + i * 16) / 8 + lane / 8 % 2;
        load_matrices_transposed(fa[i], a + Tile::template address<Tile::kABytes>(step * 16 + lane / 16 * 8 + lane % 8, chunk));
      }
#pragma unroll
      for (int pair = 0; pair < Tile::kTilesAcross / 2; pair++) {
        uint32_t fb[4];
        const int chunk = (column0 + pair * 16) / 8 + lane / 16;
        load_matrices_transposed(fb, b + Tile::template address<Tile::kBBytes>(step * 16 + lane % 16, chunk));
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
          for (int i = 0; i < Tile::kTilesDown; i++) {
            float (&v)[4] = c[i][2 * pair + half];
            Tile::Math::multiply(v[0], v[1], v[2], v[3], fa[i], fb[2 * half], fb[2 * half + 1]);
          }
        }
      }
    }
  }

  // ldmatrix transposes 16-bit elements only.
  __device__ __forceinline__ void multiply_wide(const char* a, const char* b, int row, int column, int k) {
    const auto element = [](const char* from, int row_bytes, int r, int m) {
      uint32_t v = *reinterpret_cast<const uint32_t*>(from + r * row_bytes + m * 4);
      Tile::Math::prepare(v);
      return v;
    };
#pragma unroll
    for (int step = 0; step < Tile::kDepth; step += 8) {
      uint32_t fa[Tile::kTilesDown][4];
#pragma unroll
      for (int i = 0; i < Tile::kTilesDown; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) fa[i][e] = element(a, Tile::kABytes, step + k + e / 2 * 4, row + i * 16 + e % 2 * 8);
      }
#pragma unroll
      for (int j = 0; j < Tile::kTilesAcross; j++) {
        const uint32_t b0 = element(b, Tile::kBBytes, step + k, column + j * 8),
                       b1 = element(b, Tile::kBBytes, step + k + 4, column + j * 8);
#pragma unroll
        for (int i = 0; i < Tile::kTilesDown; i++) {
          float (&v)[4] = c[i][j];
          Tile::Math::multiply(v[0], v[1], v[2], v[3], fa[i], b0, b1);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_elements(const char* a, const char* b, int row, int column) {
#pragma unroll
    for (int r = 0; r < Tile::kDepth; r++) {
      const float4 va = *reinterpret_cast<const float4*>(a + r * Tile::kABytes + row * 4);
      const float fa[4] = {va.x, va.y, va.z, va.w};
#pragma unroll
      for (int j = 0; j < kAcross; j++) {
        const float4 vb = *reinterpret_cast<const float4*>(b + r * Tile::kBBytes + (column + j * 16) * 4);
#pragma unroll
        for (int i = 0; i < kDown; i++) {
          c[i][j][0] = fmaf(fa[i], vb.x, c[i][j][0]);
          c[i][j][1] = fmaf(fa[i], vb.y, c[i][j][1]);
          c[i][j][2] = fmaf(fa[i], vb.z, c[i][j][2]);
          c[i][j][3] = fmaf(fa[i], vb.w, c[i][j][3]);
        }
      }
    }
  }
};

template <class Tile>
struct RowSums<Tile, true> {
  float c[2][4][8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 64; i++) c[i / 32][i / 8 % 4][i % 8] = 0.f;
  }

  // Waits for its products: ptxas would serialise those that are under way across the branch around this.
  __device__ __forceinline__ void multiply(const char* a, const char* b) {
    const uint64_t from_a = operand_descriptor(shared_address(a) + threadIdx.x / 128 * Tile::kBlockBytes, Tile::kBlockBytes);
    const uint64_t from_b = operand_descriptor(shared_address(b), Tile::kBlockBytes);
    warpgroup_begin();
#pragma unroll
    for (int k = 0; k < Tile::kDepth / 16; k++) {
      constexpr int kBytes = 16 * 128;
      warpgroup_multiply<typename Tile::Math, true>(c, from_a + k * (kBytes >> 4), from_b + k * (kBytes >> 4));
    }
    warpgroup_commit();
    warpgroup_wait(*this);
  }

  template <class Use>
  __device__ __forceinline__ void visit(Use use) const {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int t = 0; t < 16; t++) use(row + i * 8, column + t * 8, c[i][t / 4][t % 4 * 2], c[i][t / 4][t % 4 * 2 + 1]);
    }
  }
};

struct Unchanged {
  __device__ __forceinline__ void operator()(uint32_t, int64_t, int) const {}
};

// Sums over rows [begin, end). a_row(r) is where row r of a begins; b_row(r) where that of b does, or null where the row adds nothing.
// a_bytes and b_bytes, multiples of 16, are what there is of a row from the tile's first element on. arrived(address, row, chunk) may
// change 16 bytes of a that this thread has copied.
template <class Tile, class ARow, class BRow, class Arrived = Unchanged>
__device__ __forceinline__ void run_row_product(RowSums<Tile>& sums, int64_t begin, int64_t end, int64_t a_bytes, int64_t b_bytes,
                                                ARow a_row, BRow b_row, const char* fallback, RowWindow<Tile>& window, char* shared,
                                                Arrived arrived = {}) {
  constexpr int kStages = Tile::kStages, kSlots = RowWindow<Tile>::kSlots;
  const int64_t steps = (end - begin + Tile::kDepth - 1) / Tile::kDepth;
  const uint32_t base = shared_address(shared);
  constexpr int kFinders = 32 * RowWindow<Tile>::kWarps;
  const auto find = [&](int64_t step) {  // by the first warps
    const int64_t row = begin + step * Tile::kDepth + threadIdx.x;
    const char* from = threadIdx.x < Tile::kDepth && row < end ? b_row(row) : nullptr;
    const int slot = int(step % kSlots);
    if (threadIdx.x < Tile::kDepth) window.b[slot][threadIdx.x] = from;
    const bool found = __any_sync(0xffffffffu, from != nullptr);
    if (threadIdx.x % 32 == 0) window.found[slot][threadIdx.x / 32] = found;
  };
  const auto copy = [&](int64_t step, int stage) {
    const int slot = int(step % kSlots);
    if (!window.any(slot)) return;
    const uint32_t a = base + stage * Tile::kStageBytes, b = a + Tile::kDepth * Tile::kABytes;
#pragma unroll
    for (int i = 0; i < Tile::kDepth * Tile::kAChunks / Tile::kThreads; i++) {
      const int index = threadIdx.x + i * Tile::kThreads, row = index / Tile::kAChunks, chunk = index % Tile::kAChunks;
      const bool valid = chunk * 16 < a_bytes && window.b[slot][row];
      copy_async(a + Tile::template address<Tile::kABytes>(row, chunk),
                 valid ? a_row(begin + step * Tile::kDepth + row) + chunk * 16 : fallback, valid);
    }
#pragma unroll
    for (int i = 0; i < Tile::kDepth * Tile::kBChunks / Tile::kThreads; i++) {
      const int index = threadIdx.x + i * Tile::kThreads, row = index / Tile::kBChunks, chunk = index % Tile::kBChunks;
      const char* from = window.b[slot][row];
      const bool valid = chunk * 16 < b_bytes && from;
      copy_async(b + Tile::template address<Tile::kBBytes>(row, chunk), valid ? from + chunk * 16 : fallback, valid);
    }
  };

  sums.clear();
  if (threadIdx.x < kFinders) {
    for (int s = 0; s < kStages; s++) find(s);
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kStages - 1; s++) {
    copy(s, s);
    commit_copies();
  }
  int read = 0, write = kStages - 1;
  for (int64_t step = 0; step < steps; step++) {
    wait_copies<kStages - 2>();
#pragma unroll
    for (int i = 0; i < Tile::kDepth * Tile::kAChunks / Tile::kThreads; i++) {
      const int index = threadIdx.x + i * Tile::kThreads, row = index / Tile::kAChunks, chunk = index % Tile::kAChunks;
      arrived(base + read * Tile::kStageBytes + Tile::template address<Tile::kABytes>(row, chunk), begin + step * Tile::kDepth + row,
              chunk);
    }
    if constexpr (Tile::kWarpgroups) warpgroup_publish();
    __syncthreads();
    if (threadIdx.x < kFinders) find(step + kStages);
    copy(step + kStages - 1, write);
    commit_copies();
    if (window.any(int(step % kSlots))) {
      const char* stage = shared + read * Tile::kStageBytes;
      sums.multiply(stage, stage + Tile::kDepth * Tile::kABytes);
    }
    read = read + 1 == kStages ? 0 : read + 1;
    write = write + 1 == kStages ? 0 : write + 1;
  }
  wait_copies<0>();
}

}  // namespace pykernels::cuda
