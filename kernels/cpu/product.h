// The products of all operators: one register tile of C = sum over taps of A_tap x B_tap.
//
//   A   rows of the activations as they lie in memory (or a gathered panel); a tap is a pointer and a row stride, so a shifted or dilated
//       view costs nothing and nothing like im2col is ever stored
//   B   packed once per call: for each tap [step][2][kStep][lanes][kUnit], two vectors ("halves") of output columns side by side
//   C   accumulators written to a small buffer [2][kRows][lanes] that stays in L1, where the caller's epilogue reads them
//
// Product<P> is the micro-kernel for panels of element type P (float, double, or bf16 where the tier multiplies bf16):
//   kRows   rows of one tile            kUnit   elements of the inner dimension that one lane multiplies (2 for bf16)
//   kStep   units of one step (16 for an AMX tile)    kRowPad   rows are read in groups of this many    kDepth = kUnit * kStep
#pragma once

#include "vec.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

template <class P>
struct Tap {
  const P* a;      // first row
  int64_t stride;  // elements from row to row
  int64_t b;       // where this tap's weights begin inside a packed column block
};

// Elements of P between the start of a tap's packed weights and lane 0 of inner element e, half h; lanes follow each other by kUnit.
template <class Product>
PYKERNELS_INLINE int64_t packed_offset(int64_t e, int half) {
  const int64_t unit = e / Product::kUnit, step = unit / Product::kStep;
  return (((step * 2 + half) * Product::kStep + unit % Product::kStep) * Product::kLanes) * Product::kUnit + e % Product::kUnit;
}

// float and double: broadcast one element of a row, multiply-add two vectors of B. bf16 with AVX512-BF16: the same with pairs.
template <class P>
struct VectorProduct {
  using Acc = Arithmetic<P>;
  static constexpr int kLanes = PYKERNELS_TIER::kLanes<Acc>;
  static constexpr int kUnit = sizeof(P) == 2 ? 2 : 1;
  static constexpr int kStep = 1;
  static constexpr int kRows =
      kVectorBytes == 64 ? 14 : 6;  // 2 * kRows accumulators, 2 vectors of B, 1 of A: 31 of 32 or 15 of 16 registers
  static constexpr int kRowPad = 1;
  static constexpr int kDepth = kUnit * kStep;
  static constexpr bool kOverlapsEpilogue = false;

  static void begin() {}
  static void end() {}

  static PYKERNELS_INLINE void multiply_add(Vec<Acc>& c0, Vec<Acc>& c1, const char* a, Vec<Acc> b0, Vec<Acc> b1) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(P) == 2) {
      int32_t pair;
      memcpy(&pair, a, 4);
      const __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
      c0 = (vfloat)_mm512_dpbf16_ps((__m512)c0, av, (__m512bh)b0);
      c1 = (vfloat)_mm512_dpbf16_ps((__m512)c1, av, (__m512bh)b1);
      return;
    }
#endif
    Acc scalar;
    memcpy(&scalar, a, sizeof scalar);
    const Vec<Acc> av = broadcast(scalar);
    c0 += av * b0;
    c1 += av * b1;
  }

  template <int R>
  static void tile(Acc* acc, const Tap<P>* taps, int64_t ntaps, int64_t row, int64_t depth, const P* packed) {
    Vec<Acc> c[R][2] = {};
    for (int64_t t = 0; t < ntaps; t++) {
      constexpr int kGroups = (R + 2) / 3;  // rows 3i, 3i+1, 3i+2 share a base: x86 addresses base + {0, 1, 2} * stride in one operand
      const int64_t stride = taps[t].stride * int64_t(sizeof(P));
      const char* base[kGroups];
      for (int i = 0; i < kGroups; i++) base[i] = reinterpret_cast<const char*>(taps[t].a) + (row + 3 * i) * stride;
      const Acc* b = reinterpret_cast<const Acc*>(packed + taps[t].b);
      for (int64_t u = 0; u < depth / kUnit; u++) {
        const Vec<Acc> b0 = load(b), b1 = load(b + kLanes);
        b += 2 * kLanes;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) multiply_add(c[r][0], c[r][1], base[r / 3] + (r % 3) * stride, b0, b1);
        for (int i = 0; i < kGroups; i++) base[i] += sizeof(P) * kUnit;
      }
    }
    for (int r = 0; r < R; r++) {
      store(acc + r * kLanes, c[r][0]);
      store(acc + (kRows + r) * kLanes, c[r][1]);
    }
  }

  // `between` is for tiers whose products leave the vector units idle.
  template <int R = kRows, class Between>
  static void run(Acc* acc, const Tap<P>* taps, int64_t ntaps, int64_t row, int64_t rows, int64_t depth, const P* packed,
                  Between& between) {
    if constexpr (R > 0) {
      if (rows == R)
        tile<R>(acc, taps, ntaps, row, depth, packed);
      else
        run<R - 1>(acc, taps, ntaps, row, rows, depth, packed, between);
    }
  }
};

#if defined(__AMX_BF16__)
// 32 rows x (16 + 16) columns: four accumulators, two tiles of A and two of B fill the eight tile registers. The tile unit leaves the
// vector units idle, so the epilogue of the previous tile runs between the steps of this one.
struct AmxProduct {
  using Acc = float;
  static constexpr int kLanes = 16;
  static constexpr int kUnit = 2;
  static constexpr int kStep = 16;
  static constexpr int kRows = 32;
  static constexpr int kRowPad = 16;
  static constexpr int kDepth = kUnit * kStep;
  static constexpr bool kOverlapsEpilogue = true;

  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  static void begin() {
    static const Config config;  // static storage: GCC 12 drops the stores to a local one before the load
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  template <bool Two, class Between>
  static void tile(float* acc, const Tap<bf16>* taps, int64_t ntaps, int64_t row, int64_t depth, const bf16* packed, Between& between) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < ntaps; t++) {
      const bf16 *a = taps[t].a + row * taps[t].stride, *b = packed + taps[t].b;
      const int64_t stride = taps[t].stride * int64_t(sizeof(bf16));
      for (int64_t s = 0; s < depth; s += kDepth) {
        _tile_loadd(4, a, stride);
        _tile_loadd(6, b, 64);
        if (Two) _tile_loadd(5, a + 16 * taps[t].stride, stride);
        _tile_loadd(7, b + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (Two) _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        if (Two) _tile_dpbf16ps(3, 5, 7);
        a += kDepth;
        b += 1024;
        between();
      }
    }
    _tile_stored(0, acc, 64);
    if (Two) _tile_stored(1, acc + 16 * kLanes, 64);
    _tile_stored(2, acc + kRows * kLanes, 64);
    if (Two) _tile_stored(3, acc + (kRows + 16) * kLanes, 64);
  }

  template <class Between>
  static void run(float* acc, const Tap<bf16>* taps, int64_t ntaps, int64_t row, int64_t rows, int64_t depth, const bf16* packed,
                  Between& between) {
    if (rows > 16)
      tile<true>(acc, taps, ntaps, row, depth, packed, between);
    else
      tile<false>(acc, taps, ntaps, row, depth, packed, between);
  }
};
#endif

template <class P>
struct ProductOf {
  using type = VectorProduct<P>;
};
#if defined(__AMX_BF16__)
template <>
struct ProductOf<bf16> {
  using type = AmxProduct;
};
#endif
template <class P>
using Product = typename ProductOf<P>::type;

// Rows [begin, end) of a tile, one by one unless the epilogue takes several.
template <class Epilogue>
PYKERNELS_INLINE void finish_rows(const Epilogue& epilogue, int64_t begin, int64_t end) {
  if constexpr (requires { epilogue.rows(begin, end); }) {
    epilogue.rows(begin, end);
  } else {
    for (int64_t i = begin; i < end; i++) epilogue.row(i);
  }
}

// Walks over rows [0, rows) x column blocks [begin, end) of one product (packed holds these), columns outside so that a block of weights
// serves all rows, and hands each finished tile to the epilogue: make(block, row, acc) returns an object whose row(i), or rows(i, end),
// finishes rows of the tile at `row`.
template <class P, class Make>
void for_each_tile(const Tap<P>* taps, int64_t ntaps, int64_t rows, int64_t depth, const P* packed, int64_t block_size, int64_t begin,
                   int64_t end, Make make) {
  using Pr = Product<P>;
  alignas(64) typename Pr::Acc acc[2][2 * Pr::kRows * Pr::kLanes];
  const int64_t tiles = (rows + Pr::kRows - 1) / Pr::kRows;
  using Epilogue = decltype(make(begin, rows, acc[0]));
  int current = 0;
  if constexpr (Pr::kOverlapsEpilogue) {
    const int64_t steps = ntaps * (depth / Pr::kDepth);
    struct Pending {
      Epilogue epilogue;
      int64_t next = 0, rows = 0, per_step = 1;
      PYKERNELS_INLINE void operator()() {
        const int64_t stop = min(rows, next + per_step);
        finish_rows(epilogue, next, stop);
        next = stop;
      }
    } pending{make(begin, 0, acc[0])};
    for (int64_t block = begin; block < end; block++) {
      for (int64_t row = 0; row < rows; row += Pr::kRows, current ^= 1) {
        const int64_t n = min<int64_t>(Pr::kRows, rows - row);
        Pr::run(acc[current], taps, ntaps, row, n, depth, packed + (block - begin) * block_size, pending);
        while (pending.next < pending.rows) pending();
        pending = Pending{make(block, row, acc[current]), 0, n, steps ? (n + steps - 1) / steps : n};
      }
    }
    while (pending.next < pending.rows) pending();
  } else {
    auto nothing = [] {};
    for (int64_t block = begin; block < end; block++) {
      for (int64_t tile = 0, row = 0; tile < tiles; tile++) {
        const int64_t n = (rows - row + tiles - tile - 1) / (tiles - tile);  // even heights: no tile of a single row at the end
        Pr::run(acc[current], taps, ntaps, row, n, depth, packed + (block - begin) * block_size, nothing);
        Epilogue epilogue = make(block, row, acc[current]);
        finish_rows(epilogue, 0, n);
        row += n;
      }
    }
  }
}

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Products = true;
#else
constexpr bool kHasBf16Products = false;
#endif

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
