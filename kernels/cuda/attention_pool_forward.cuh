// Forward of attention_pool for one dtype.
#pragma once

#include "attention_pool_scores.cuh"

namespace pykernels::cuda {

constexpr int kLeastChunkRows = 16, kMostHeads = 32;  // heads that one block scores

// Some rows of one sequence, in shared memory.
struct ChunkPlace {
  int64_t sequence;
  int rows;      // that x has, masked ones too
  bool whole;    // all of a sequence: its result is final
  bool partial;  // it is put together with others
};

__device__ __forceinline__ int64_t first_chunk(const AttentionPool& p, int64_t sequence, int64_t first_row) {
  return p.batch.packed ? first_row / p.chunk_rows + sequence : sequence * p.sequence_chunks;
}

// The sequence that a chunk belongs to.
__device__ __forceinline__ int64_t sequence_of_chunk(const AttentionPool& p, int64_t chunk) {
  if (!p.batch.packed) return chunk / p.sequence_chunks;
  int64_t low = 0, high = p.batch.sequences;  // the first sequence that begins behind the chunk is in [low + 1, high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_chunk(p, middle, clamp(bound(p.batch, middle), 0, p.batch.rows)) <= chunk ? low : high) = middle;
  }
  return low;
}

// u of one thread's columns of a tile, and what they add to the scores.
template <class Tile>
__device__ __forceinline__ void add_scores(const AttentionPool& p, const PoolRow* rows, int first_head, int heads, int tile,
                                           Accumulators<Tile>& sums, float* scores) {
  using T = typename Tile::Element;
  const auto [unit, block] = columns_of<Tile>(p, tile);
  const float* const bias = p.parameters + (p.gated ? p.padded_hidden : 32);  // of the second eight, which follow those of the first
  float b0[8], b1[8];
  load_eight(b0, p.parameters + unit, 8, true);
  load_eight(b1, bias + unit, 8, true);
  const int n0 = units_left(p.hidden, unit), n1 = p.gated ? n0 : units_left(p.hidden, unit + 32);
#pragma unroll
  for (int i = 0; i < Tile::kSlots; i++) {
    float (&c)[2][8] = sums.c[i];
#pragma unroll
    for (int e = 0; e < 8; e++) {
      c[0][e] += b0[e];
      c[1][e] += b1[e];
    }
    const PoolRow row = rows[row_of_slot<Tile>(i)];
    if (p.kept && first_head == 0 && row.x) {
      T* to = static_cast<T*>(p.kept) + row.row * p.halves * p.hidden + unit;
      store_eight(to, c[0], n0, n0 == 8 && p.wide_kept);
      store_eight(to + (p.gated ? p.hidden : 32), c[1], n1, n1 == 8 && p.wide_kept);
    }
  }
  with_activation<T>(p.act, [&](auto act) {
#pragma unroll
    for (int i = 0; i < Tile::kSlots; i++) {
#pragma unroll
      for (int e = 0; e < 8; e++) {
        float (&c)[2][8] = sums.c[i];
        // Not by their zero weights: an infinite x times these is NaN.
        c[0][e] = e < n0 ? act(c[0][e]).value : 0.f;
        if (!p.gated) c[1][e] = e < n1 ? act(c[1][e]).value : 0.f;
      }
    }
  });
  if (p.gated) {
#pragma unroll
    for (int i = 0; i < Tile::kSlots; i++) {
#pragma unroll
      for (int e = 0; e < 8; e++) {
        if (e < n0) sums.c[i][0][e] *= sigmoid_to<T>(sums.c[i][1][e]);
        sums.c[i][1][e] = 0.f;
      }
    }
  }
  for (int j = 0; j < heads; j++) {
    const float* const query = p.parameters + (2 + first_head + j) * p.padded_hidden + unit;
    float q0[8], q1[8] = {};
    load_eight(q0, query, 8, true);
    if (!p.gated) load_eight(q1, query + 32, 8, true);
#pragma unroll
    for (int i = 0; i < Tile::kSlots; i++) {
      float sum = 0.f;
#pragma unroll
      for (int e = 0; e < 8; e++) sum += sums.c[i][0][e] * q0[e] + sums.c[i][1][e] * q1[e];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (threadIdx.x % 4 == 0) scores[(j * 2 + block) * Tile::kRows + row_of_slot<Tile>(i)] += sum;
    }
  }
}

// The scores of one chunk and head turn into e^(s - largest); called by a warp. The place behind holds their sum, negative where no row is.
__device__ __forceinline__ void weigh_chunk(const AttentionPool& p, const ChunkPlace& place, const PoolRow* rows, int64_t chunk, int head,
                                            int tile_rows, float* scores) {
  const float kLowest = __int_as_float(0xff800000);
  const int lane = threadIdx.x % 32;
  float s[2], largest = kLowest;
  bool live[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int r = lane + i * 32;
    const bool inside = r < place.rows;
    live[i] = inside && rows[r].x;
    s[i] = live[i] ? scores[r] + scores[tile_rows + r] : 0.f;
    if (inside && p.scores) {
      const int64_t row = rows[r].row;
      static_cast<float*>(p.scores)[score_index(p, row, row - place.sequence * p.batch.length, head)] = s[i];
    }
    if (live[i] && s[i] > largest) largest = s[i];  // NaN counts as nothing here; it comes back with the weights
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, largest, step);
    largest = other > largest ? other : largest;
  }
  // Not minus infinity, from which nothing can be subtracted.
  const float base = largest == kLowest ? 0.f : largest;
  const float e[2] = {live[0] ? expf(s[0] - base) : 0.f, live[1] ? expf(s[1] - base) : 0.f};
  float total = e[0] + e[1];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
  const bool any = __any_sync(0xffffffffu, live[0] || live[1]);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (lane + i * 32 < place.rows) scores[lane + i * 32] = e[i];
  }
  __syncwarp();
  if (lane != 0) return;
  scores[tile_rows] = any ? total : -1.f;
  if (place.whole) {
    float* const to = static_cast<float*>(p.max_sum) + 2 * (place.sequence * p.heads + head);
    to[0] = any ? base : 0.f;
    to[1] = any ? total : 0.f;
  } else if (place.partial) {
    p.ends[chunk * p.heads + head] = make_float2(any ? total : -1.f, largest);
  }
}

// Eight columns of row r of the tile, from shared memory where the rows stayed there.
template <class Tile>
__device__ __forceinline__ void load_columns(float (&x)[8], const AttentionPool& p, const char* panel, const PoolRow& row, int r,
                                             int64_t column) {
  using T = typename Tile::Element;
  if (!panel) {
    const int n = units_left(p.in_width, column);
    load_eight(x, reinterpret_cast<const T*>(row.x) + column, n, n == 8);
    return;
  }
  const int64_t byte = column * int64_t(sizeof(T));
  Eight<T> eight;
#pragma unroll
  for (int i = 0; i < Eight<T>::kPieces; i++) {
    const uint32_t at =
        uint32_t(byte / Tile::kStepBytes) * ScoreProduct<Tile>::kABytes + Tile::swizzled(r, int(byte % Tile::kStepBytes) / 16 + i);
    eight.pieces[i] = *reinterpret_cast<const uint4*>(panel + at);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = to_float(eight.elements[i]);
}

// The sum of a chunk's rows with their weights; called by a warp for 64 columns. Four rows at a time are read beside each other.
template <class Tile>
__device__ __forceinline__ void pool_chunk(const AttentionPool& p, const ChunkPlace& place, const PoolRow* rows, int64_t chunk,
                                           int first_head, int heads, int64_t column, int first_row, const char* panel,
                                           const float* weights) {
  using T = typename Tile::Element;
  constexpr int kTogether = 2;  // heads that share the loads of x
  const int slab = threadIdx.x / 4 % 4;
  const int n = units_left(p.width, column);
  for (int j = 0; j < heads; j += kTogether) {
    float sum[kTogether][8] = {};
    for (int r = slab; r < place.rows && n > 0; r += 4) {
      if (!rows[r].x) continue;
      float x[8];
      load_columns<Tile>(x, p, panel, rows[r], first_row + r, column);
#pragma unroll
      for (int k = 0; k < kTogether; k++) {
        const float weight = j + k < heads ? weights[(j + k) * 2 * Tile::kRows + r] : 0.f;
#pragma unroll
        for (int i = 0; i < 8; i++) sum[k][i] = fmaf(weight, x[i], sum[k][i]);
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; k++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sum[k][i] += __shfl_xor_sync(0xffffffffu, sum[k][i], 4);
        sum[k][i] += __shfl_xor_sync(0xffffffffu, sum[k][i], 8);
      }
      if (slab != 0 || n == 0 || j + k >= heads) continue;
      const int head = first_head + j + k;
      if (place.partial) {
        store_eight(p.parts + (chunk * p.heads + head) * p.width + column, sum[k], n, p.wide);
      } else {
        const float total = weights[((j + k) * 2 + 1) * Tile::kRows];
#pragma unroll
        for (int i = 0; i < 8; i++) sum[k][i] = total < 0.f ? 0.f : sum[k][i] / total;
        const int64_t at = (place.sequence * p.heads + head) * p.width + column;
        store_eight(static_cast<T*>(p.out) + at, sum[k], n, p.wide);
        if (p.pooled) store_eight(static_cast<float*>(p.pooled) + at, sum[k], n, p.wide);
      }
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_pool_forward_kernel(const __grid_constant__ AttentionPool p, int heads_together, bool resident) {
  using T = typename Tile::Element;
  constexpr int kWarps = Tile::kThreads / 32;
  static_assert(Tile::kRows <= Tile::kThreads);
  extern __shared__ char shared_memory[];
  char* const shared = aligned_shared<Tile>(shared_memory);
  float* const scores = reinterpret_cast<float*>(shared + ScoreProduct<Tile>::shared_bytes(p, resident));  // [heads, 2, rows]
  __shared__ PoolRow rows[Tile::kRows];
  __shared__ ChunkPlace places[Tile::kRows / kLeastChunkRows];
  __shared__ bool live_rows[Tile::kRows / 32];
  const int warp = threadIdx.x / 32, chunk_rows = int(p.chunk_rows), tile_chunks = Tile::kRows / chunk_rows;
  const int first_head = blockIdx.y * heads_together;
  const int heads = int(p.heads) - first_head < heads_together ? int(p.heads) - first_head : heads_together;
  const int64_t chunk0 = int64_t(blockIdx.x) * tile_chunks;

  if (threadIdx.x < Tile::kRows) {
    const int r = threadIdx.x, in = r / chunk_rows;
    PoolRow row{nullptr, -1};
    ChunkPlace place{0, 0, false, false};
    if (chunk0 + in < p.chunks) {
      place.sequence = sequence_of_chunk(p, chunk0 + in);
      const SequenceRows those = sequence_rows(p.batch, place.sequence);
      const int64_t first = (chunk0 + in - first_chunk(p, place.sequence, those.first)) * chunk_rows;
      if (first >= 0) {
        place.rows = int(clamp((p.batch.packed ? those.live : p.batch.length) - first, 0, chunk_rows));
        place.whole = first == 0 && those.live <= chunk_rows;
        place.partial = first < those.live && those.live > chunk_rows;
      }
      const int64_t t = first + r % chunk_rows;
      if (r % chunk_rows < place.rows) {
        row.row = int(those.first + t);
        if (exists(those, t)) row.x = row_of_x<T>(p, place.sequence, those.first, t);
      }
    }
    rows[r] = row;
    if (r % chunk_rows == 0) places[in] = place;
    const bool live = __any_sync(0xffffffffu, row.x != nullptr);
    if (r % 32 == 0) live_rows[r / 32] = live;
  }
  for (int i = threadIdx.x; i < heads * 2 * Tile::kRows; i += Tile::kThreads) scores[i] = 0.f;
  __syncthreads();
  bool any = false;
#pragma unroll
  for (int i = 0; i < Tile::kRows / 32; i++) any |= live_rows[i];

  if (any) {
    ScoreProduct<Tile> product(p, rows, resident, shared);
    product.run(
        int(p.column_tiles), [&](int tile) { return live_rows[warp / Tile::kAcross] && has_units<Tile>(p, tile); },
        [&](int tile, Accumulators<Tile>& sums) { add_scores<Tile>(p, rows, first_head, heads, tile, sums, scores); });
  }
  if (p.kept && first_head == 0) {
    const int64_t width = p.halves * p.hidden;
    for (int r = warp; r < Tile::kRows; r += kWarps) {
      if (rows[r].x || rows[r].row < 0) continue;
      for (int64_t i = threadIdx.x % 32; i < width; i += 32) static_cast<T*>(p.kept)[rows[r].row * width + i] = from_float<T>(0.f);
    }
  }
  for (int item = warp; item < tile_chunks * heads; item += kWarps) {
    const int in = item / heads, j = item % heads, r = in * chunk_rows;
    weigh_chunk(p, places[in], rows + r, chunk0 + in, first_head + j, Tile::kRows, scores + j * 2 * Tile::kRows + r);
  }
  __syncthreads();
  const int groups = int((p.width + 63) / 64);
  for (int item = warp; item < tile_chunks * groups; item += kWarps) {
    const int in = item / groups, r = in * chunk_rows;
    if (!places[in].whole && !places[in].partial) continue;
    const int64_t column = item % groups * 64 + (threadIdx.x % 32 / 16 * 4 + threadIdx.x % 4) * 8;
    pool_chunk<Tile>(p, places[in], rows + r, chunk0 + in, first_head, heads, column, r, resident ? shared : nullptr, scores + r);
  }
}

template <class Tile>
cudaError_t launch_pool_forward(const AttentionPool& p, cudaStream_t stream) {
  const int64_t tile_chunks = Tile::kRows / p.chunk_rows;
  const int64_t groups = (p.heads + kMostHeads - 1) / kMostHeads, heads = (p.heads + groups - 1) / groups;
  const int64_t more = heads * 2 * Tile::kRows * int64_t(sizeof(float)) + Tile::kAlignment;
  const int64_t all = ScoreProduct<Tile>::shared_bytes(p, true) + more;
  // Static shared memory, and what the driver takes.
  constexpr int64_t kElse = sizeof(PoolRow) * Tile::kRows + 2048;
  const bool resident = p.column_tiles > 0 && all + kElse <= most_shared_bytes();
  const int64_t shared = resident ? all : ScoreProduct<Tile>::shared_bytes(p, false) + more;
  return launch(attention_pool_forward_kernel<Tile>, dim3(blocks_of(p.chunks, tile_chunks), unsigned(groups)), dim3(Tile::kThreads),
                int(shared), stream, p, int(heads), resident);
}

}  // namespace pykernels::cuda
