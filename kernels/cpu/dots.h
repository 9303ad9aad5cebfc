// Products of a few rows with a few others, both as they lie in memory with the inner dimension contiguous: nothing is packed.
//
//   dots   out[i][j] = sum over e of x[i][e] w[j][e]        vectors along e, W sums at a time, which one transpose turns into a vector
//   outer  out[i][c] += sum over r of s[r][i] x[r][c]       vectors along c, for sums over many rows r
//
// A low-rank factor has a handful of rows. Register tiles of Product<P> have two vectors of columns and would compute mostly padding.
#pragma once

#include "vec.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

// How one step along e multiplies and adds: vectors of the arithmetic type.
template <class C>
struct Step {
  using Acc = C;
  using Operand = Vec<C>;
  static constexpr int64_t kElements = kLanes<C>;

  template <class T>
  static PYKERNELS_INLINE Operand load(const T* p, int64_t n) {
    return load_columns(p, n);
  }
  static PYKERNELS_INLINE void multiply_add(Vec<C>& sum, Operand x, Operand w) { sum += x * w; }
};

#if defined(__AVX512BF16__)
// Pairs of bf16, as many as lanes.
struct PairStep {
  using Acc = float;
  using Operand = __m512bh;
  static constexpr int64_t kElements = 32;

  static PYKERNELS_INLINE Operand load(const bf16* p, int64_t n) {
    const __m512i v = n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
    return (Operand)v;
  }
  static PYKERNELS_INLINE void multiply_add(vfloat& sum, Operand x, Operand w) { sum = (vfloat)_mm512_dpbf16_ps((__m512)sum, x, w); }
};
#endif

// Lane i * kOutputs + j holds the sum of rows x[i] and w[j]; kRows * kOutputs sums fill a vector. change(i, e, x) may alter an operand of
// x.
template <class S, int kOutputs, class X, class Wt, class Change>
PYKERNELS_INLINE Vec<typename S::Acc> dots_tile(const X* const* x, const Wt* const* w, int64_t n, Change change) {
  using C = typename S::Acc;
  constexpr int W = kLanes<C>, kRows = W / kOutputs;
  Vec<C> sum[W] = {};
  const auto step = [&](int64_t e, int64_t count) {
    typename S::Operand of_w[kOutputs];
    for (int j = 0; j < kOutputs; j++) of_w[j] = S::load(w[j] + e, count);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      const typename S::Operand of_x = change(i, e, S::load(x[i] + e, count));
#pragma GCC unroll 16
      for (int j = 0; j < kOutputs; j++) S::multiply_add(sum[i * kOutputs + j], of_x, of_w[j]);
    }
  };
  int64_t e = 0;
  for (; e + S::kElements <= n; e += S::kElements) step(e, S::kElements);
  if (e < n) step(e, n - e);
  transpose(sum);
  for (int width = W / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) sum[i] += sum[i + width];
  }
  return sum[0];
}

// out[i * out_row + j] for rows [0, rows) of x and [0, outputs) of w: x_row(i) and w_row(j) say where they begin. change as above, with the
// row as i. Each sum is taken in the same order whatever rows and outputs are computed with it.
template <class S, class XRow, class WRow, class Change>
void dots(typename S::Acc* out, int64_t out_row, int64_t rows, int64_t outputs, int64_t n, XRow x_row, WRow w_row, Change change) {
  using C = typename S::Acc;
  constexpr int W = kLanes<C>;
  const auto block = [&]<int kOutputs>(int64_t first) {
    constexpr int kRows = W / kOutputs;
    decltype(w_row(0)) w[kOutputs];
    for (int j = 0; j < kOutputs; j++) w[j] = w_row(first + j);
    for (int64_t row = 0; row < rows; row += kRows) {
      decltype(x_row(0)) x[kRows];
      for (int i = 0; i < kRows; i++) x[i] = x_row(min<int64_t>(row + i, rows - 1));
      const Vec<C> sums = dots_tile<S, kOutputs>(
          x, w, n, [&](int i, int64_t e, typename S::Operand v) { return change(min<int64_t>(row + i, rows - 1), e, v); });
      const int64_t present = min<int64_t>(kRows, rows - row);
      for (int64_t i = 0; i < present; i++) {
        for (int j = 0; j < kOutputs; j++) out[(row + i) * out_row + first + j] = sums[i * kOutputs + j];
      }
    }
  };
  for (int64_t first = 0; first < outputs;) {
    const int64_t left = outputs - first;
    if (left >= W && rows == 1) {
      block.template operator()<W>(first);
      first += W;
    } else if (W >= 16 && left >= W / 2) {
      block.template operator()<(W >= 2 ? W / 2 : 1)>(first);
      first += W / 2;
    } else if (left >= 4 && W >= 4) {
      block.template operator()<(W >= 4 ? 4 : 1)>(first);
      first += 4;
    } else {
      block.template operator()<1>(first);
      first++;
    }
  }
}

// out[i * out_row + c] += sum over r in [0, count) of s_row(r)[i] * x, for i in [0, rows) and c in [0, columns). load_x(r, c, n) is a
// vector of row r from column c on, of which n exist.
template <class C, class SRow, class Load>
void outer(C* out, int64_t out_row, int64_t rows, int64_t columns, int64_t count, SRow s_row, Load load_x) {
  constexpr int W = kLanes<C>, kSums = kVectorBytes == 64 ? 16 : 8;
  const auto tile = [&]<int kRows, int kVectors>(int64_t first, int64_t c) {
    Vec<C> sum[kRows][kVectors];
    const auto at = [&](int i, int v) { return out + (first + i) * out_row + c + v * W; };
    const auto present = [&](int v) { return kVectors > 1 ? W : columns - c - v * W; };
    for (int i = 0; i < kRows; i++) {
      for (int v = 0; v < kVectors; v++) sum[i][v] = load_columns(at(i, v), present(v));
    }
    for (int64_t r = 0; r < count; r++) {
      const C* s = s_row(r) + first;
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) {
        const Vec<C> x = load_x(r, c + v * W, present(v));
        for (int i = 0; i < kRows; i++) sum[i][v] += s[i] * x;
      }
    }
    for (int i = 0; i < kRows; i++) {
      for (int v = 0; v < kVectors; v++) store_columns(at(i, v), sum[i][v], present(v));
    }
  };
  const auto block = [&]<int kRows>(int64_t first) {
    constexpr int kVectors = kSums / kRows;
    int64_t c = 0;
    for (; c + kVectors * W <= columns; c += kVectors * W) tile.template operator()<kRows, kVectors>(first, c);
    for (; c < columns; c += W) tile.template operator()<kRows, 1>(first, c);
  };
  int64_t first = 0;
  for (; first + kSums / 2 <= rows; first += kSums / 2) block.template operator()<kSums / 2>(first);
  for (; first + 2 <= rows; first += 2) block.template operator()<2>(first);
  if (first < rows) block.template operator()<1>(first);
}

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
