// Backward of gated_conv1d for one dtype. Saved by forward: v and g. dh, the gradient of value and gate logit, exists once in memory; the
// products for dx and dweight read it.
#pragma once

#include "gated_conv_forward.cuh"
#include "row_product.cuh"

namespace pykernels::cuda {

// ---- dh, dcond, sums of dh -----------------------------------------------------------------------------------------------------------

constexpr int kGateThreads = 256;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kGateBlocks = 2;  // three would spill
#else
constexpr int kGateBlocks = 3;
#endif

// A thread has eight columns and every blockDim.y-th row of the block's sum_rows.
template <class T>
__global__ void __launch_bounds__(kGateThreads, kGateBlocks) gate_backward_kernel(const __grid_constant__ GatedConv p) {
  __shared__ float partial[kGateThreads][16 + 1];
  const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * 8;
  const int64_t begin = int64_t(blockIdx.x) * p.sum_rows, end = begin + p.sum_rows < p.out_rows ? begin + p.sum_rows : p.out_rows;
  const int n = int(clamp(p.c_out - column, 0, 8)), padded = int(clamp(p.out_width - column, 0, 8));
  float sums[2][8] = {};
  for (int64_t row = begin + threadIdx.y; row < end && padded > 0; row += blockDim.y) {
    const auto [sequence, t] = place_of(p.batch, row, p.out_length);
    const SequenceRows those = sequence_rows(p.batch, sequence);
    float dc[8] = {}, dz[8] = {};
    if (exists(those, t + p.shift)) {
      const int64_t at = row * p.c_out + column;
      float dy[8], v[8], g[8], x[8] = {}, f[8];
      load_eight(dy, static_cast<const T*>(p.dy) + at, n, p.wide);
      load_eight(v, static_cast<const T*>(p.saved_value) + at, n, p.wide);
      load_eight(g, static_cast<const T*>(p.saved_gate) + at, n, p.wide);
      if (p.residual == Residual::highway) load_eight(x, row_of_x<T>(p, sequence, those.first, t + p.shift) + column, n, p.wide);
      if (p.random != GateRandom::none) random_factors(f, p, row, column);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        dc[i] = dy[i] * g[i];
        if (p.value_act == ValueAct::tanh) dc[i] *= 1.f - v[i] * v[i];
        dz[i] = dy[i] * (v[i] - x[i]) * (g[i] * (1.f - g[i]));
        if (p.random != GateRandom::none) dz[i] *= f[i];
        if (i >= n) dc[i] = dz[i] = 0.f;
        sums[0][i] += dc[i];
        sums[1][i] += dz[i];
      }
    }
    T* dh = static_cast<T*>(p.dh) + row * 2 * p.out_width + column;
    store_eight(dh, dc, padded, padded == 8);
    store_eight(dh + p.out_width, dz, padded, padded == 8);
    if (p.value_dcond && p.cond_per_row) {
      store_eight(static_cast<T*>(p.value_dcond) + row * 2 * p.c_out + column, dc, n, p.wide);
      store_eight(static_cast<T*>(p.gate_dcond) + row * 2 * p.c_out + column, dz, n, p.wide);
    }
  }
  float (&mine)[17] = partial[threadIdx.y * blockDim.x + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 16; i++) mine[i] = sums[i / 8][i % 8];
  __syncthreads();
  // One thread for each of the block's 16 x blockDim.x sums, in the order of threadIdx.y.
  for (int index = threadIdx.y * blockDim.x + threadIdx.x; index < 16 * int(blockDim.x); index += kGateThreads) {
    const int group = index / 16, i = index % 16;
    float sum = 0.f;
    for (int y = 0; y < int(blockDim.y); y++) sum += partial[y * blockDim.x + group][i];
    const int64_t to = (int64_t(blockIdx.y) * blockDim.x + group) * 8 + i % 8;
    if (to < p.out_width) p.sums[(int64_t(blockIdx.x) * 2 + i / 8) * p.out_width + to] = sum;
  }
}

constexpr int kSumLanes = 32, kSumRows = 16;

// The sum over threadIdx.y, in its order, for the threads of row 0.
__device__ __forceinline__ float sum_over_y(float mine) {
  __shared__ float partial[kSumRows][kSumLanes];
  partial[threadIdx.y][threadIdx.x] = mine;
  __syncthreads();
  float sum = 0.f;
  if (threadIdx.y == 0) {
    for (int y = 0; y < kSumRows; y++) sum += partial[y][threadIdx.x];
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kSumLanes* kSumRows) bias_kernel(const __grid_constant__ GatedConv p) {
  const int64_t column = int64_t(blockIdx.x) * kSumLanes + threadIdx.x;
  const int half = blockIdx.y;
  float sum = 0.f;
  if (column < p.c_out) {
    for (int64_t block = threadIdx.y; block < p.sum_blocks; block += kSumRows) sum += p.sums[(block * 2 + half) * p.out_width + column];
  }
  sum = sum_over_y(sum);
  T* to = static_cast<T*>(half ? p.gate_dbias : p.value_dbias);
  if (threadIdx.y == 0 && column < p.c_out && to) to[column] = from_float<T>(sum);
}

// dcond of a cond of one row per sequence.
template <class T>
__global__ void __launch_bounds__(kSumLanes* kSumRows) sequence_cond_kernel(const __grid_constant__ GatedConv p) {
  const int64_t column = int64_t(blockIdx.y) * kSumLanes + threadIdx.x;
  const int half = blockIdx.z;
  const SequenceRows those = sequence_rows(p.batch, blockIdx.x);
  const int64_t first = p.batch.packed ? those.first : blockIdx.x * p.out_length;
  const int64_t rows = p.batch.packed ? those.live : clamp(those.live - p.shift, 0, p.out_length);
  float sum = 0.f;
  if (column < p.c_out) {
    const T* dh = static_cast<const T*>(p.dh) + half * p.out_width + column;
    for (int64_t row = threadIdx.y; row < rows; row += kSumRows) sum += to_float(dh[(first + row) * 2 * p.out_width]);
  }
  sum = sum_over_y(sum);
  T* to = static_cast<T*>(half ? p.gate_dcond : p.value_dcond);
  if (threadIdx.y == 0 && column < p.c_out) to[blockIdx.x * 2 * p.c_out + column] = from_float<T>(sum);
}

template <class T>
cudaError_t launch_backward_gate(const GatedConv& p, cudaStream_t stream) {
  const int64_t groups = (p.out_width + 7) / 8;
  int lanes = 1;
  while (lanes < 32 && lanes < groups) lanes *= 2;
  const dim3 block(lanes, kGateThreads / lanes), grid(unsigned(p.sum_blocks), unsigned((groups + lanes - 1) / lanes));
  cudaError_t error = launch(gate_backward_kernel<T>, grid, block, 0, stream, p);
  const dim3 sum_block(kSumLanes, kSumRows);
  const auto columns = unsigned((p.c_out + kSumLanes - 1) / kSumLanes);
  if (error == cudaSuccess && (p.value_dbias || p.gate_dbias)) error = launch(bias_kernel<T>, dim3(columns, 2), sum_block, 0, stream, p);
  if (error == cudaSuccess && p.value_dcond && !p.cond_per_row) {
    error = launch(sequence_cond_kernel<T>, dim3(unsigned(p.batch.sequences), columns, 2), sum_block, 0, stream, p);
  }
  return error;
}

// ---- dx ------------------------------------------------------------------------------------------------------------------------------

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) gated_conv_input_kernel(const __grid_constant__ GatedConv p, int column_tiles) {
  using T = typename Tile::Element;
  extern __shared__ char shared_memory[];
  char* const shared = aligned_shared<Tile>(shared_memory);
  __shared__ TapRow rows[Tile::kRows];
  const int64_t row0 = int64_t(blockIdx.x / column_tiles) * Tile::kRows;
  const int64_t column0 = int64_t(blockIdx.x % column_tiles) * Tile::kColumns;
  const int64_t dh_row = 2 * p.out_width;

  bool live = false;
  for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) {
    TapRow place{nullptr, nullptr, 0, 0, -1};
    if (row0 + r < p.batch.rows) {
      const auto [sequence, t] = place_of(p.batch, row0 + r, p.batch.length);
      const SequenceRows those = sequence_rows(p.batch, sequence);
      const int64_t first = p.batch.packed ? those.first : sequence * p.out_length;
      if (exists(those, t)) {
        const int64_t outputs = clamp(those.live - p.shift, 0, p.batch.packed ? those.live : p.out_length);
        place = {reinterpret_cast<const char*>(static_cast<const T*>(p.dh) + first * dh_row), nullptr, t, int(outputs), sequence};
      }
    }
    live |= place.live > 0;
    rows[r] = place;
  }
  const bool any = __syncthreads_or(live);

  const bool wide = p.c_in % 8 == 0;
  const auto use = [&](int r, int column, float (&v)[1][8]) {
    const int64_t row = row0 + r, input = column0 + column;
    if (row >= p.batch.rows || input >= p.c_in) return;
    const TapRow& place = rows[r];
    const int64_t t = place.t - p.shift;  // of the output row that this row of x is blended into
    const int n = int(p.c_in - input < 8 ? p.c_in - input : 8);
    float (&out)[8] = v[0];
    if (place.index < 0) {
#pragma unroll
      for (int i = 0; i < 8; i++) out[i] = 0.f;
    } else if (p.residual != Residual::none && t >= 0 && t < place.live) {
      const int64_t out_row = row - place.t - (p.batch.packed ? 0 : place.index * (p.batch.length - p.out_length)) + t;
      const int64_t at = out_row * p.c_out + input;
      float dy[8], g[8];
      load_eight(dy, static_cast<const T*>(p.dy) + at, n, p.wide);
      if (p.residual == Residual::highway) load_eight(g, static_cast<const T*>(p.saved_gate) + at, n, p.wide);
#pragma unroll
      for (int i = 0; i < 8; i++) out[i] += p.residual == Residual::highway ? dy[i] * (1.f - g[i]) : dy[i];
    }
    store_eight(static_cast<T*>(p.dx) + row * p.c_in + input, out, n, wide);
  };

  Accumulators<Tile> sums;
  if (any) {
    const int64_t width = dh_row * int64_t(sizeof(T)), packed_columns = (p.c_in + 31) / 32 * 32;
    TapSource<Tile> source(rows, width, p.left, -p.dilation, p.taps,
                           static_cast<const char*>(p.packed_transposed) + column0 * p.taps * width, packed_columns - column0, width);
    run_product(sums, source, TapSource<Tile>::steps(p.taps, width), shared);
  } else {
    sums.clear();
  }
  visit_sums<1>(sums, shared, use);
}

template <class Tile>
cudaError_t launch_backward_input(const GatedConv& p, cudaStream_t stream) {
  const int64_t down = (p.batch.rows + Tile::kRows - 1) / Tile::kRows, across = (p.c_in + Tile::kColumns - 1) / Tile::kColumns;
  return launch(gated_conv_input_kernel<Tile>, dim3(unsigned(down * across)), dim3(Tile::kThreads), Tile::kSharedBytes, stream, p,
                int(across));
}

// ---- dweight -------------------------------------------------------------------------------------------------------------------------

// One tile of [2 out_width, in_width] of one tap, over split_rows rows.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    gated_conv_weight_kernel(const __grid_constant__ GatedConv p, int row_tiles, int column_tiles) {
  using T = typename Tile::Element;
  extern __shared__ char shared_memory[];
  char* const shared = aligned_shared<Tile>(shared_memory);
  __shared__ RowWindow<Tile> window;
  const int64_t outputs = 2 * p.out_width;
  const int64_t row0 = int64_t(blockIdx.x % row_tiles) * Tile::kRows;
  const int64_t column0 = int64_t(blockIdx.x / row_tiles % column_tiles) * Tile::kColumns, tap = blockIdx.x / row_tiles / column_tiles;
  const int64_t begin = int64_t(blockIdx.y) * p.split_rows, end = begin + p.split_rows < p.out_rows ? begin + p.split_rows : p.out_rows;
  const char* dh = reinterpret_cast<const char*>(static_cast<const T*>(p.dh) + row0);

  const auto a_row = [&](int64_t row) { return dh + row * outputs * int64_t(sizeof(T)); };
  const auto b_row = [&](int64_t row) -> const char* {
    const auto [sequence, t] = place_of(p.batch, row, p.out_length);
    const SequenceRows those = sequence_rows(p.batch, sequence);
    const int64_t read = t + tap * p.dilation - p.left;
    if (!exists(those, t + p.shift) || !exists(those, read)) return nullptr;
    return reinterpret_cast<const char*>(row_of_x<T>(p, sequence, those.first, read) + column0);
  };
  RowSums<Tile> sums;
  run_row_product(sums, begin, end, (outputs - row0) * int64_t(sizeof(T)), (p.in_width - column0) * int64_t(sizeof(T)), a_row, b_row,
                  static_cast<const char*>(p.dh), window, shared);
  float* to = p.partials + (int64_t(blockIdx.y) * p.taps + tap) * outputs * p.in_width;
  sums.visit([&](int r, int c, float low, float high) {
    const int64_t row = row0 + r, column = column0 + c;
    if (row < outputs && column < p.in_width) *reinterpret_cast<float2*>(to + row * p.in_width + column) = make_float2(low, high);
  });
}

// dweight [c_out, c_in, taps] of both halves: the sum of the partials in their order.
template <class T>
__global__ void __launch_bounds__(256) weight_sum_kernel(const __grid_constant__ GatedConv p) {
  const int64_t outputs = 2 * p.out_width, elements = p.taps * outputs * p.in_width;
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= elements) return;
  const int64_t column = index % p.in_width, row = index / p.in_width % outputs, tap = index / p.in_width / outputs;
  const bool gate = row >= p.out_width;
  const int64_t output = gate ? row - p.out_width : row;
  T* to = static_cast<T*>(gate ? p.gate_dweight : p.value_dweight);
  if (column >= p.c_in || output >= p.c_out || !to) return;
  float sum = 0.f;
  for (int64_t split = 0; split < p.splits; split++) sum += p.partials[split * elements + index];
  to[(output * p.c_in + column) * p.taps + tap] = from_float<T>(sum);
}

template <class Tile>
cudaError_t launch_backward_weight(const GatedConv& p, cudaStream_t stream) {
  const int64_t outputs = 2 * p.out_width, down = (outputs + Tile::kRows - 1) / Tile::kRows;
  const int64_t across = (p.in_width + Tile::kColumns - 1) / Tile::kColumns;
  cudaError_t error = launch(gated_conv_weight_kernel<Tile>, dim3(unsigned(down * across * p.taps), unsigned(p.splits)),
                             dim3(Tile::kThreads), Tile::kSharedBytes, stream, p, int(down), int(across));
  if (error != cudaSuccess) return error;
  const int64_t elements = p.taps * outputs * p.in_width;
  return launch(weight_sum_kernel<typename Tile::Element>, dim3(unsigned((elements + 255) / 256)), dim3(256), 0, stream, p);
}

}  // namespace pykernels::cuda
