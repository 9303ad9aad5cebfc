// Backward of attention_pool for one dtype. What passes through the softmax, a and ds, is there for all rows; dh, the gradient of what the
// activations are taken of, for the rows of one wave.
#pragma once

#include "attention_pool_scores.cuh"
#include "row_product.cuh"
#include "taps.cuh"

namespace pykernels::cuda {

// ---- dh, and its sums over kSumRows rows ---------------------------------------------------------------------------------------------

// Where the sums of one quantity over the rows of a warp go: of dc, dz, then ds u of each head.
__device__ __forceinline__ float* sums_at(const AttentionPool& p, int64_t row, int64_t quantity) {
  return p.sums + (row / kSumRows * (2 + p.heads) + quantity) * p.padded_hidden;
}

// The sum over the rows of a warp; lanes 0 to 3 store theirs.
__device__ __forceinline__ void store_row_sum(float* to, float (&v)[8]) {
#pragma unroll
  for (int e = 0; e < 8; e++) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) v[e] += __shfl_xor_sync(0xffffffffu, v[e], step);
  }
  if (threadIdx.x % 32 < 4) store_eight(to, v, 8, true);
}

// dh of one thread's columns of a tile. The sums turn into u.
template <class Tile>
__device__ __forceinline__ void hidden_gradients(const AttentionPool& p, const PoolRow* rows, int64_t warp_row, int tile,
                                                 Accumulators<Tile>& sums) {
  using T = typename Tile::Element;
  const int64_t unit = columns_of<Tile>(p, tile).unit;
  const int64_t second = p.gated ? p.padded_hidden : 32;  // where the second eight are, from the first on
  const int n0 = units_left(p.hidden, unit), n1 = p.gated ? n0 : units_left(p.hidden, unit + 32);
  const int padded0 = units_left(p.hidden_width, unit), padded1 = p.gated ? padded0 : units_left(p.hidden_width, unit + 32);
  float b0[8], b1[8], total[2][8] = {};
  load_eight(b0, p.parameters + unit, 8, true);
  load_eight(b1, p.parameters + second + unit, 8, true);
#pragma unroll
  for (int i = 0; i < Tile::kSlots; i++) {
    float (&c)[2][8] = sums.c[i];
    const PoolRow row = rows[row_of_slot<Tile>(i)];
    if (p.kept) {
      const T* from = static_cast<const T*>(p.kept) + row.row * p.halves * p.hidden + unit;
      const int m0 = row.x ? n0 : 0, m1 = row.x ? n1 : 0;
      load_eight(c[0], from, m0, m0 == 8 && p.wide_kept);
      load_eight(c[1], from + (p.gated ? p.hidden : 32), m1, m1 == 8 && p.wide_kept);
    } else {
#pragma unroll
      for (int e = 0; e < 8; e++) {
        c[0][e] += b0[e];
        c[1][e] += b1[e];
      }
    }
    float du[2][8] = {};
    for (int64_t j = 0; j < p.heads; j++) {
      const float ds = row.x ? p.row_gradients[j * p.batch.rows + row.row] : 0.f;
      const float* const query = p.parameters + (2 + j) * p.padded_hidden + unit;
      float q[8];
      load_eight(q, query, 8, true);
#pragma unroll
      for (int e = 0; e < 8; e++) du[0][e] = fmaf(ds, q[e], du[0][e]);
      if (p.gated) continue;
      load_eight(q, query + 32, 8, true);
#pragma unroll
      for (int e = 0; e < 8; e++) du[1][e] = fmaf(ds, q[e], du[1][e]);
    }
    float slope[2][8];
    with_activation<T>(p.act, [&](auto act) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if (h == 1 && p.gated) break;
#pragma unroll
        for (int e = 0; e < 8; e++) {
          const Activated a = act(c[h][e]);
          c[h][e] = a.value;
          slope[h][e] = a.slope;
        }
      }
    });
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if (p.gated) {
        const float g = sigmoid_to<T>(c[1][e]);
        c[0][e] *= g;
        du[1][e] = du[0][e] * c[0][e] * (1.f - g);
        du[0][e] *= g * slope[0][e];
      } else {
        du[0][e] *= slope[0][e];
        du[1][e] *= slope[1][e];
      }
      // By selection: what is not there may be infinite, or be multiplied by it.
      if (!row.x || e >= n0) du[0][e] = c[0][e] = 0.f;
      if (!row.x || e >= n1) du[1][e] = c[1][e] = 0.f;
      total[0][e] += du[0][e];
      total[1][e] += du[1][e];
    }
    if (row.x) {
      T* to = static_cast<T*>(p.dh) + (row.row - p.wave_begin) * p.halves * p.hidden_width + unit;
      store_eight(to, du[0], padded0, padded0 == 8);
      store_eight(to + (p.gated ? p.hidden_width : 32), du[1], padded1, padded1 == 8);
    }
  }
  store_row_sum(sums_at(p, warp_row, 0) + unit, total[0]);
  store_row_sum(sums_at(p, warp_row, 0) + second + unit, total[1]);
  for (int64_t j = 0; j < p.heads; j++) {
    float dq[2][8] = {};
#pragma unroll
    for (int i = 0; i < Tile::kSlots; i++) {
      const PoolRow row = rows[row_of_slot<Tile>(i)];
      const float ds = row.x ? p.row_gradients[j * p.batch.rows + row.row] : 0.f;
#pragma unroll
      for (int e = 0; e < 8; e++) {
        dq[0][e] = fmaf(ds, sums.c[i][0][e], dq[0][e]);
        if (!p.gated) dq[1][e] = fmaf(ds, sums.c[i][1][e], dq[1][e]);
      }
    }
    float* const to = sums_at(p, warp_row, 2 + j) + unit;
    store_row_sum(to, dq[0]);
    if (!p.gated) store_row_sum(to + 32, dq[1]);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) attention_pool_hidden_kernel(const __grid_constant__ AttentionPool p, bool resident) {
  using T = typename Tile::Element;
  extern __shared__ char shared_memory[];
  char* const shared = aligned_shared<Tile>(shared_memory);
  __shared__ PoolRow rows[Tile::kRows];
  __shared__ bool live_rows[Tile::kRows / 32];
  const int64_t row0 = p.wave_begin + int64_t(blockIdx.x) * Tile::kRows;
  if (threadIdx.x < Tile::kRows) {
    PoolRow place{nullptr, -1};
    const int64_t row = row0 + threadIdx.x;
    if (row < p.wave_end) {
      const auto [sequence, t] = place_of(p.batch, row, p.batch.length);
      const SequenceRows those = sequence_rows(p.batch, sequence);
      place.row = int(row);
      if (exists(those, t)) place.x = row_of_x<T>(p, sequence, those.first, t);
    }
    rows[threadIdx.x] = place;
    const bool live = __any_sync(0xffffffffu, place.x != nullptr);
    if (threadIdx.x % 32 == 0) live_rows[threadIdx.x / 32] = live;
  }
  __syncthreads();
  bool any = false;
#pragma unroll
  for (int i = 0; i < Tile::kRows / 32; i++) any |= live_rows[i];

  const int down = threadIdx.x / 32 / Tile::kAcross;
  const int64_t warp_row = row0 + down * kSumRows;
  const bool live = live_rows[down];
  if (!live && warp_row < p.wave_end && threadIdx.x / 32 % Tile::kAcross == 0) {
    float* const to = sums_at(p, warp_row, 0);
    for (int64_t i = threadIdx.x % 32; i < (2 + p.heads) * p.padded_hidden; i += 32) to[i] = 0.f;
  }
  if (!any) return;
  const auto wanted = [&](int tile) { return live && has_units<Tile>(p, tile); };
  const auto finish = [&](int tile, Accumulators<Tile>& sums) { hidden_gradients<Tile>(p, rows, warp_row, tile, sums); };
  ScoreProduct<Tile> product(p, rows, resident, shared, !p.kept);
  product.run(int(p.column_tiles), wanted, finish);
}

template <class Tile>
cudaError_t launch_pool_hidden(const AttentionPool& p, cudaStream_t stream) {
  const int64_t all = ScoreProduct<Tile>::shared_bytes(p, true) + Tile::kAlignment;
  constexpr int64_t kElse = sizeof(PoolRow) * Tile::kRows + 2048;
  const bool resident = p.column_tiles > 1 && !p.kept && all + kElse <= most_shared_bytes();
  const int64_t shared = resident ? all : ScoreProduct<Tile>::shared_bytes(p, false) + Tile::kAlignment;
  return launch(attention_pool_hidden_kernel<Tile>, dim3(blocks_of(p.wave_end - p.wave_begin, Tile::kRows)), dim3(Tile::kThreads),
                int(shared), stream, p, resident);
}

// ---- dx ------------------------------------------------------------------------------------------------------------------------------

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) attention_pool_input_kernel(const __grid_constant__ AttentionPool p, int column_tiles) {
  using T = typename Tile::Element;
  extern __shared__ char shared_memory[];
  char* const shared = aligned_shared<Tile>(shared_memory);
  __shared__ TapRow rows[Tile::kRows];  // of dh
  const int64_t row0 = p.wave_begin + int64_t(blockIdx.x / column_tiles) * Tile::kRows;
  const int64_t column0 = int64_t(blockIdx.x % column_tiles) * Tile::kColumns, dh_row = p.halves * p.hidden_width;

  bool live = false;
  for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) {
    TapRow place{nullptr, nullptr, 0, 0, 0};
    const int64_t row = row0 + r;
    if (row < p.wave_end) {
      const auto [sequence, t] = place_of(p.batch, row, p.batch.length);
      if (exists(sequence_rows(p.batch, sequence), t)) {
        place = {reinterpret_cast<const char*>(static_cast<const T*>(p.dh) + (row - p.wave_begin) * dh_row), nullptr, 0, 1, sequence};
      }
    }
    live |= place.live > 0;
    rows[r] = place;
  }
  const bool any = __syncthreads_or(live);

  const auto use = [&](int r, int64_t column, float (&v)[1][8]) {
    const int64_t row = row0 + r;
    column += column0;
    if (row >= p.wave_end || column >= p.width) return;
    const int n = units_left(p.width, column);
    float (&out)[8] = v[0];
    if (!rows[r].live) {
#pragma unroll
      for (int i = 0; i < 8; i++) out[i] = 0.f;
    } else if (p.dout) {
      for (int64_t j = 0; j < p.heads; j++) {
        const float a = p.row_weights[j * p.batch.rows + row];
        float dout[8];
        load_eight(dout, static_cast<const T*>(p.dout) + (rows[r].index * p.heads + j) * p.width + column, n, p.wide);
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = fmaf(a, dout[i], out[i]);
      }
    }
    store_eight(static_cast<T*>(p.dx) + row * p.width + column, out, n, p.wide);
  };

  Accumulators<Tile> sums;
  if (any && p.hidden > 0) {
    const int64_t width = dh_row * int64_t(sizeof(T)), packed_columns = (p.width + 31) / 32 * 32;
    TapSource<Tile> source(rows, 0, 0, 0, 1, static_cast<const char*>(p.packed_transposed) + column0 * width, packed_columns - column0,
                           width);
    run_product(sums, source, TapSource<Tile>::steps(1, width), shared);
  } else {
    sums.clear();
  }
  visit_sums<1>(sums, shared, use);
}

template <class Tile>
cudaError_t launch_pool_input(const AttentionPool& p, cudaStream_t stream) {
  const int64_t down = (p.wave_end - p.wave_begin + Tile::kRows - 1) / Tile::kRows;
  const int64_t across = (p.width + Tile::kColumns - 1) / Tile::kColumns;
  return launch(attention_pool_input_kernel<Tile>, dim3(unsigned(down * across)), dim3(Tile::kThreads), Tile::kSharedBytes, stream, p,
                int(across));
}

// ---- dweight -------------------------------------------------------------------------------------------------------------------------

// One tile of [halves * hidden_width, in_width], over split_rows rows of the wave; added to that of the waves before.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) attention_pool_weight_kernel(const __grid_constant__ AttentionPool p, int row_tiles) {
  using T = typename Tile::Element;
  extern __shared__ char shared_memory[];
  char* const shared = aligned_shared<Tile>(shared_memory);
  __shared__ RowWindow<Tile> window;
  const int64_t outputs = p.halves * p.hidden_width;
  const int64_t row0 = int64_t(blockIdx.x % row_tiles) * Tile::kRows, column0 = int64_t(blockIdx.x / row_tiles) * Tile::kColumns;
  const int64_t first = p.wave_begin + int64_t(blockIdx.y) * p.split_rows;
  const int64_t begin = first < p.wave_end ? first : p.wave_end, end = clamp(begin + p.split_rows, begin, p.wave_end);
  const char* dh = reinterpret_cast<const char*>(static_cast<const T*>(p.dh) + row0);

  const auto a_row = [&](int64_t row) { return dh + (row - p.wave_begin) * outputs * int64_t(sizeof(T)); };
  const auto b_row = [&](int64_t row) -> const char* {
    const auto [sequence, t] = place_of(p.batch, row, p.batch.length);
    const SequenceRows those = sequence_rows(p.batch, sequence);
    return exists(those, t) ? row_of_x<T>(p, sequence, those.first, t) + column0 * int64_t(sizeof(T)) : nullptr;
  };
  RowSums<Tile> sums;
  run_row_product(sums, begin, end, (outputs - row0) * int64_t(sizeof(T)), (p.in_width - column0) * int64_t(sizeof(T)), a_row, b_row,
                  static_cast<const char*>(p.dh), window, shared);
  float* const to = p.partials + int64_t(blockIdx.y) * outputs * p.in_width;
  sums.visit([&](int r, int c, float low, float high) {
    const int64_t row = row0 + r, column = column0 + c;
    if (row >= outputs || column >= p.in_width) return;
    float2* const at = reinterpret_cast<float2*>(to + row * p.in_width + column);
    const float2 before = p.wave_begin > 0 ? *at : make_float2(0.f, 0.f);
    *at = make_float2(before.x + low, before.y + high);
  });
}

template <class Tile>
cudaError_t launch_pool_weight(const AttentionPool& p, cudaStream_t stream) {
  const int64_t down = (p.halves * p.hidden_width + Tile::kRows - 1) / Tile::kRows;
  const int64_t across = (p.in_width + Tile::kColumns - 1) / Tile::kColumns;
  return launch(attention_pool_weight_kernel<Tile>, dim3(unsigned(down * across), unsigned(p.splits)), dim3(Tile::kThreads),
                Tile::kSharedBytes, stream, p, int(down));
}

}  // namespace pykernels::cuda
