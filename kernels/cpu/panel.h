// Panels: small copies in the layout and element type that the products read. They are made only where the tensor itself cannot be read in
// place: another dtype, another stride, rows outside the sequence, masked rows, a width that is no multiple of a step.
#pragma once

#include "product.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

// A strided matrix of storage type T. `live` rows exist, and of those only the ones whose mask byte is not zero; all others read as zero.
template <class T>
struct Rows {
  const T* data;
  int64_t row_stride, column_stride;
  int64_t columns;
  int64_t live;
  const uint8_t* mask;  // one byte per row, or null

  PYKERNELS_INLINE bool reads_zero(int64_t row) const { return row < 0 || row >= live || (mask && !mask[row]); }

  // True where no row in [first, first + n) reads as zero.
  bool all_live(int64_t first, int64_t n) const {
    if (first < 0 || first + n > live) return false;
    return !mask || n <= 0 || !memchr(mask + first, 0, size_t(n));
  }
};

// One contiguous row of T to P; `width` of P is filled, zeros behind the n elements.
template <class P, class T>
PYKERNELS_INLINE void convert_row(P* to, const T* from, int64_t n, int64_t width) {
  constexpr int W = kLanes<Arithmetic<P>>;
  if constexpr (__is_same(T, P)) {
    memcpy(to, from, size_t(n) * sizeof(P));
    memset(to + n, 0, size_t(width - n) * sizeof(P));
  } else {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store_n(to + i, load_n(from + i, n - i), n - i);
    memset(to + n, 0, size_t(width - n) * sizeof(P));
  }
}

// Lanes of two rows as pairs of a 16-bit P, the first row's low.
template <class P, class T>
PYKERNELS_INLINE vuint load_pairs(const T* low, const T* high) {
  static_assert(__is_same(T, P) || __is_same(P, bf16));
  const auto bits = [](const T* p) {
    if constexpr (__is_same(T, P)) {
      vhalf h;
      memcpy(&h, p, sizeof h);
      return __builtin_convertvector(h, vuint);
    } else {
      return __builtin_convertvector(narrow_bf16(load(p)), vuint);
    }
  };
  return bits(low) | (bits(high) << 16);
}

// W x W blocks from a matrix whose rows are adjacent in memory (a channels-first tensor seen as [L, C]).
template <class P, class T>
void gather_transposed(P* to, int64_t to_stride, const Rows<T>& x, int64_t first, int64_t n) {
  using C = Arithmetic<P>;
  constexpr int W = kLanes<C>;
  int64_t c = 0;
  if constexpr (sizeof(P) == 2) {  // pairs of columns: half the shuffles, whole vectors to store
    for (; c + 2 * W <= x.columns; c += 2 * W) {
      const auto column = [&](int64_t i) { return x.data + (c + i) * x.column_stride + first; };
      int64_t r = 0;
      for (; r + W <= n; r += W) {
        vuint v[W];
        for (int64_t i = 0; i < W; i++) v[i] = load_pairs<P>(column(2 * i) + r, column(2 * i + 1) + r);
        transpose(v);
        for (int64_t i = 0; i < W; i++) memcpy(to + (r + i) * to_stride + c, &v[i], sizeof v[i]);
      }
      for (; r < n; r++) {
        for (int64_t i = 0; i < 2 * W; i++) store_scalar(to + r * to_stride + c + i, load_scalar(column(i) + r));
      }
    }
  }
  for (; c < x.columns; c += W) {
    const int64_t nc = min<int64_t>(W, x.columns - c);
    for (int64_t r = 0; r < n; r += W) {
      const int64_t nr = min<int64_t>(W, n - r);
      Vec<C> v[W] = {};
      for (int64_t i = 0; i < nc; i++) {
        const T* from = x.data + (c + i) * x.column_stride + (first + r);
        v[i] = nr == W ? load(from) : load_n(from, nr);
      }
      transpose(v);
      for (int64_t i = 0; i < nr; i++) {
        P* row = to + (r + i) * to_stride + c;
        if (nc == W)
          store(row, v[i]);
        else
          store_n(row, v[i], nc);
      }
    }
  }
}

// Rows [first, first + n) of x as a panel of P with that row stride; `width` elements of each row are written, zeros behind x's columns.
template <class P, class T>
void gather_rows(P* to, int64_t stride, int64_t width, const Rows<T>& x, int64_t first, int64_t n) {
  const int64_t begin = max<int64_t>(0, -first), end = max(begin, min(n, x.live - first));
  if (x.column_stride == 1 || x.columns == 1) {
    for (int64_t r = begin; r < end; r++) {
      if (!x.mask || x.mask[first + r]) convert_row(to + r * stride, x.data + (first + r) * x.row_stride, x.columns, width);
    }
  } else {
    if (x.row_stride == 1) {
      gather_transposed(to + begin * stride, stride, x, first + begin, end - begin);
    } else {
      for (int64_t r = begin; r < end; r++) {
        const T* from = x.data + (first + r) * x.row_stride;
        for (int64_t c = 0; c < x.columns; c++) store_scalar(to + r * stride + c, load_scalar(from + c * x.column_stride));
      }
    }
    for (int64_t r = begin; r < end && width > x.columns; r++) {
      memset(to + r * stride + x.columns, 0, size_t(width - x.columns) * sizeof(P));
    }
  }
  for (int64_t r = 0; r < n; r++) {
    if (x.reads_zero(first + r)) memset(to + r * stride, 0, size_t(width) * sizeof(P));
  }
}

// Inner dimension of a panel, and elements of one tap's packed weights in a column block.
template <class P>
int64_t panel_width(int64_t columns) {
  return round_up(columns, Product<P>::kDepth);
}
template <class P>
int64_t tap_weights(int64_t depth) {
  return depth * 2 * Product<P>::kLanes;
}

// Rows at a distance of a large power of two share a few cache sets and evict each other inside one register tile. Panels are a cache line
// wider than that; a tensor with such rows is gathered into one.
template <class P>
constexpr int64_t kRowSkew = 64 / int64_t(sizeof(P));
template <class P>
PYKERNELS_INLINE bool rows_collide(int64_t stride) {
  return stride * int64_t(sizeof(P)) % 2048 == 0;
}
template <class P>
int64_t panel_stride(int64_t width) {
  return width + (rows_collide<P>(width) ? kRowSkew<P> : 0);
}

// The rows that each tap of a convolution reads for `rows` output rows: in place where they can be, else through `panel`, which holds
// ntaps * round_up(rows, kRowPad) rows of panel_stride(width). Tap k begins at row first + k * step; taps that lie wholly outside are left
// out. tap_weights is the distance between the taps' packed weights. Returns the number of taps.
template <class P, class T>
int64_t make_taps(Tap<P>* taps, P* panel, const Rows<T>& x, int64_t first, int64_t step, int64_t ntaps, int64_t rows, int64_t width,
                  int64_t tap_weights) {
  const int64_t read = round_up(rows, Product<P>::kRowPad), reach = step < 0 ? -step : step;
  const bool in_place = __is_same(T, P) && x.column_stride == 1 && x.columns == width && !rows_collide<P>(x.row_stride);
  const int64_t stride = panel_stride<P>(width);
  int64_t n = 0;
  if (!in_place && reach <= read) {  // the taps overlap: one panel serves them all
    const int64_t low = step < 0 ? first + (ntaps - 1) * step : first;
    gather_rows(panel, stride, width, x, low, read + (ntaps - 1) * reach);
    for (int64_t k = 0; k < ntaps; k++) taps[n++] = {panel + (first + k * step - low) * stride, stride, k * tap_weights};
    return n;
  }
  for (int64_t k = 0; k < ntaps; k++) {
    const int64_t start = first + k * step;
    if (start + rows <= 0 || start >= x.live) continue;
    if constexpr (__is_same(T, P)) {
      if (in_place && x.all_live(start, read)) {
        taps[n++] = {x.data + start * x.row_stride, x.row_stride, k * tap_weights};
        continue;
      }
    }
    gather_rows(panel, stride, width, x, start, read);
    taps[n++] = {panel, stride, k * tap_weights};
    panel += read * stride;
  }
  return n;
}

// ---- packing B -----------------------------------------------------------------------------------------------------------------------

// Puts one vector of columns, inner element e, where the product reads it. Elements come in ascending order: an even one of a pair
// overwrites both, its odd neighbour joins it.
template <class P>
PYKERNELS_INLINE void put_packed(P* packed, int64_t e, int half, Vec<Arithmetic<P>> v) {
  P* to = packed + packed_offset<Product<P>>(e & -int64_t(Product<P>::kUnit), half);
  if constexpr (sizeof(P) == 2) {
    vuint pairs = __builtin_convertvector(narrow_bf16(v), vuint);
    if (e & 1) {
      vuint even;
      memcpy(&even, to, sizeof even);
      pairs = (pairs << 16) | even;
    }
    memcpy(to, &pairs, sizeof pairs);
  } else {
    store(to, v);
  }
}

// Inner elements e (even) and e + 1 at once, for products of pairs.
template <class P>
PYKERNELS_INLINE void put_packed_pair(P* packed, int64_t e, int half, Vec<Arithmetic<P>> low, Vec<Arithmetic<P>> high) {
  if constexpr (sizeof(P) == 2) {
    const vuint pairs = __builtin_convertvector(narrow_bf16(low), vuint) | (__builtin_convertvector(narrow_bf16(high), vuint) << 16);
    memcpy(packed + packed_offset<Product<P>>(e, half), &pairs, sizeof pairs);
  } else {
    put_packed(packed, e, half, low);
    put_packed(packed, e + 1, half, high);
  }
}

// Zeros for inner elements [n, depth), both halves.
template <class P>
void zero_packed_tail(P* packed, int64_t n, int64_t depth) {
  for (int64_t e = n + n % Product<P>::kUnit; e < depth; e += Product<P>::kUnit) {
    put_packed(packed, e, 0, Vec<Arithmetic<P>>{});
    put_packed(packed, e, 1, Vec<Arithmetic<P>>{});
  }
}

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
