// Weights [outputs, channels, taps] packed as the B of a product, either way round, and the partial sums of their gradient.
#pragma once

#include "interleave.h"
#include "panel.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

// `outputs` rows of c_in * taps elements as one half of a column block: [tap][packed], tap_size apart, by W x W transposes of weights that
// are read in order.
template <class T, class P>
void pack_outputs(P* to, int half, const T* from, int64_t outputs, int64_t c_in, int64_t taps, int64_t tap_size) {
  constexpr int W = Product<P>::kLanes;
  const int64_t row = c_in * taps;
  int64_t channel = 0, tap = 0;
  for (int64_t j = 0; j < row; j += W) {
    const int64_t n = min<int64_t>(W, row - j);
    Vec<Arithmetic<P>> v[W] = {};
    for (int64_t i = 0; i < outputs; i++) v[i] = load_columns(from + i * row + j, n);
    transpose(v);
    for (int64_t i = 0; i < n; i++) {
      put_packed(to + tap * tap_size, channel, half, v[i]);
      if (++tap == taps) tap = 0, channel++;
    }
  }
}

// ---- roles exchanged: columns are those of x, the inner dimension is that of the outputs ---------------------------------------------

template <class P>
constexpr int64_t kBlockColumns = 2 * Product<P>::kLanes;

template <class P>
int64_t x_column_blocks(int64_t c_in) {
  return (c_in + kBlockColumns<P> - 1) / kBlockColumns<P>;
}

// One column block, two vectors side by side. weights(e) is [c_in, taps] of inner element e, null for one of the padding.
template <class T, class P, class WeightsOf>
void pack_inputs(P* to, int64_t block, int64_t depth, int64_t c_in, int64_t taps, const Interleaved<Arithmetic<P>>& of_taps,
                 WeightsOf weights) {
  constexpr int W = Product<P>::kLanes;
  const int64_t tap_size = tap_weights<P>(depth);
  for (int half = 0; half < 2; half++) {
    const int64_t column = block * kBlockColumns<P> + half * W, n = max<int64_t>(0, min<int64_t>(W, c_in - column));
    const auto lanes = [&](const T* from, int64_t tap) { return of_taps.load(from ? from + column * taps : from, tap, from ? n : 0); };
    for (int64_t e = 0; e + 1 < depth; e += 2) {
      const T *even = weights(e), *odd = weights(e + 1);
      for (int64_t tap = 0; tap < taps; tap++) put_packed_pair(to + tap * tap_size, e, half, lanes(even, tap), lanes(odd, tap));
    }
    if (depth % 2) {
      for (int64_t tap = 0; tap < taps; tap++) put_packed(to + tap * tap_size, depth - 1, half, lanes(weights(depth - 1), tap));
    }
  }
}

// ---- weight gradient: dh^T x, with the rows of the batch as the inner dimension ------------------------------------------------------

template <class P>
int64_t transposed_stride(int64_t depth) {
  return depth + kRowSkew<P>;
}

// Rows of dh, `dh_row` apart, become columns [e, e + rows) of dh^T.
template <class P>
void transpose_dh(P* to, int64_t stride, int64_t e, const P* dh, int64_t dh_row, int64_t rows, int64_t outputs) {
  gather_transposed(to + e, stride, Rows<P>{dh, 1, dh_row, rows, outputs, nullptr}, 0, outputs);
}

// Zeros in columns [rows, depth) of dh^T.
template <class P>
void zero_dh_tail(P* dh, int64_t stride, int64_t rows, int64_t depth, int64_t outputs) {
  for (int64_t i = 0; i < outputs && depth > rows; i++) memset(dh + i * stride + rows, 0, size_t(depth - rows) * sizeof(P));
}

// Columns [column, column + 2 vectors) of `rows` rows of x, packed as inner elements e, e + 1, ... of B. row(i) is a row's first column, or
// null for zeros. Returns the next inner element.
template <class P, class RowOf>
int64_t pack_rows(P* to, int64_t e, int64_t rows, int64_t column, int64_t columns, RowOf row) {
  using C = Arithmetic<P>;
  constexpr int W = Product<P>::kLanes;
  for (int64_t r = 0; r < rows;) {
    const auto first = row(r);
    // Two rows at a time where they make a pair: one store instead of two and a load.
    const bool pair = Product<P>::kUnit == 2 && e % 2 == 0 && r + 1 < rows;
    const auto second = pair ? row(r + 1) : nullptr;
    for (int half = 0; half < 2; half++) {
      const int64_t at = column + half * W, n = columns - at;
      const Vec<C> low = first && n > 0 ? load_columns(first + at, n) : Vec<C>{};
      if (pair)
        put_packed_pair(to, e, half, low, second && n > 0 ? load_columns(second + at, n) : Vec<C>{});
      else
        put_packed(to, e, half, low);
    }
    r += pair ? 2 : 1;
    e += pair ? 2 : 1;
  }
  return e;
}

// A tile of dh^T x, written to or added to a partial sum [outputs, 2 vectors].
template <class C>
struct WeightTile {
  const C* acc;
  int64_t half_stride;
  C* partial;
  bool add;

  PYKERNELS_INLINE void row(int64_t r) const {
    constexpr int W = kLanes<C>;
    for (int half = 0; half < 2; half++) {
      C* to = partial + r * 2 * W + half * W;
      const Vec<C> sum = load(acc + half * half_stride + r * W);
      store(to, add ? load(to) + sum : sum);
    }
  }
};

// dh^T [outputs, depth] times one packed column block of x.
template <class P>
void weight_product(const P* dh, int64_t stride, int64_t outputs, int64_t depth, const P* packed_x, Arithmetic<P>* partial, bool add) {
  using C = Arithmetic<P>;
  const Tap<P> all{dh, stride, 0};
  for_each_tile(&all, 1, outputs, depth, packed_x, 0, 0, 1, [&](int64_t, int64_t row, const C* acc) {
    return WeightTile<C>{acc, Product<P>::kRows * Product<P>::kLanes, partial + row * kBlockColumns<P>, add};
  });
}

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
