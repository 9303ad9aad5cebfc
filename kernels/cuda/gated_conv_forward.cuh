// Forward of gated_conv1d for one dtype.
#pragma once

#include "gated_conv.h"
#include "launch.cuh"
#include "philox.cuh"
#include "taps.cuh"
#include "wgmma.cuh"

namespace pykernels::cuda {

// What eight gate logits of one row are multiplied with.
__device__ __forceinline__ void random_factors(float (&f)[8], const GatedConv& p, int64_t row, int64_t column) {
  const Draws draws = activation_draws(p.seed, row, p.c_out, column);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t u = draws[i];
    // 2 u + 1 and its quotient are exact; the rounding of each step is that of the definition, so no fused multiplication and addition.
    f[i] = p.random == GateRandom::dropout ? (u < p.keep_threshold ? p.random_scale : 0.f)
                                           : __fadd_rn(1.f, __fmul_rn(p.random_scale, float(2 * u + 1) * (1.f / 65536.f) - 1.f));
  }
}

template <class T>
__device__ __forceinline__ const T* row_of_x(const GatedConv& p, int sequence, int64_t first, int64_t t) {
  return static_cast<const T*>(p.x) + (p.batch.packed ? (first + t) * p.x_row : sequence * p.x_sequence + t * p.x_row);
}

// v, g and y of eight columns of one row.
template <class T>
__device__ __forceinline__ void gate_eight(const GatedConv& p, const TapRow& place, int64_t row, int64_t column, int n, float (&c)[8],
                                           float (&z)[8]) {
  const int64_t at = row * p.c_out + column;
  float loaded[8];
  const auto add = [&](float (&to)[8], const void* from, int64_t offset) {
    if (!from) return;
    load_eight(loaded, static_cast<const T*>(from) + offset, n, p.wide);
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] += loaded[i];
  };
  add(c, p.value_bias, column);
  add(z, p.gate_bias, column);
  const int64_t cond = (p.cond_per_row ? row : place.index) * p.cond_row + column;
  add(c, p.value_cond, cond);
  add(z, p.gate_cond, cond);
  if (p.random != GateRandom::none) {
    random_factors(loaded, p, row, column);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] *= loaded[i];
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (p.value_act == ValueAct::tanh) c[i] = tanhf(c[i]);
    z[i] = sigmoid_to<T>(z[i]);
  }
  if (p.saved_value) {
    store_eight(static_cast<T*>(p.saved_value) + at, c, n, p.wide);
    store_eight(static_cast<T*>(p.saved_gate) + at, z, n, p.wide);
  }
  if (p.residual != Residual::none) {
    load_eight(loaded, reinterpret_cast<const T*>(place.sequence) + (place.t + p.shift) * p.x_row + column, n, p.wide);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float x = p.residual == Residual::none ? 0.f : loaded[i];
    c[i] = p.residual == Residual::highway ? x + z[i] * (c[i] - x) : x + z[i] * c[i];
  }
  store_eight(static_cast<T*>(p.y) + at, c, n, p.wide);
}

// Blocks of a multiprocessor that registers are held to; 0: as the compiler likes, which spills in small tiles of newer GPUs.
template <class Tile>
constexpr int blocks_for_registers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return Tile::kThreads == 128 && Tile::kRows <= 64 ? 4 : 0;
#else
  return 0;
#endif
}

// Tile columns are groups of 64: 32 values and the 32 gates of the same outputs.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, blocks_for_registers<Tile>())
    gated_conv_forward_kernel(const __grid_constant__ GatedConv p, int column_tiles) {
  using T = typename Tile::Element;
  extern __shared__ char shared_memory[];
  char* const shared = aligned_shared<Tile>(shared_memory);
  __shared__ TapRow rows[Tile::kRows];
  const int64_t row0 = int64_t(blockIdx.x / column_tiles) * Tile::kRows;
  const int64_t column0 = int64_t(blockIdx.x % column_tiles) * Tile::kColumns;

  bool live = false;
  for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) {
    TapRow place{nullptr, nullptr, 0, 0, 0};
    if (row0 + r < p.out_rows) {
      const auto [sequence, t] = place_of(p.batch, row0 + r, p.out_length);
      const SequenceRows those = sequence_rows(p.batch, sequence);
      place = {reinterpret_cast<const char*>(row_of_x<T>(p, sequence, those.first, 0)), those.mask, t, 0, sequence};
      if (exists(those, t + p.shift)) place.live = those.live;
    }
    live |= place.live > 0;
    rows[r] = place;
  }
  const bool any = __syncthreads_or(live);

  const auto use = [&](int r, int column, float (&v)[2][8]) {
    const int64_t row = row0 + r, output = column0 / 2 + column / 64 * 32 + column % 64;
    if (row >= p.out_rows || output >= p.c_out) return;
    const int n = int(p.c_out - output < 8 ? p.c_out - output : 8);
    if (rows[r].live) {
      gate_eight<T>(p, rows[r], row, output, n, v[0], v[1]);
    } else {
      const float zeros[8] = {};
      void* const results[] = {p.y, p.saved_value, p.saved_gate};
#pragma unroll
      for (void* result : results) {
        if (result) store_eight(static_cast<T*>(result) + row * p.c_out + output, zeros, n, p.wide);
      }
    }
  };

  Accumulators<Tile> sums;
  if (any) {
    const int64_t width = p.in_width * int64_t(sizeof(T)), packed_columns = (p.c_out + 31) / 32 * 64;
    TapSource<Tile> source(rows, p.x_row * int64_t(sizeof(T)), -p.left, p.dilation, p.taps,
                           static_cast<const char*>(p.packed) + column0 * p.taps * width, packed_columns - column0, width);
    run_product(sums, source, TapSource<Tile>::steps(p.taps, width), shared);
  } else {
    sums.clear();
  }
  visit_sums<2>(sums, shared, use);
}

template <class Tile>
cudaError_t launch_forward(const GatedConv& p, cudaStream_t stream) {
  const int64_t down = (p.out_rows + Tile::kRows - 1) / Tile::kRows;
  const int64_t across = ((p.c_out + 31) / 32 * 64 + Tile::kColumns - 1) / Tile::kColumns;
  return launch(gated_conv_forward_kernel<Tile>, dim3(unsigned(down * across)), dim3(Tile::kThreads), Tile::kSharedBytes, stream, p,
                int(across));
}

}  // namespace pykernels::cuda
