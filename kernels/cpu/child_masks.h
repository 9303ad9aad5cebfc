// The bits and draws of a stretch of a parameter, and vectors of elements that bits select.
#pragma once

#include "child_update.h"
#include "philox.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

constexpr int64_t kBitPadding = 8;  // bytes that may be read or written behind bits
constexpr int64_t kMostBits = 512;  // elements of one call of the functions below

// Calls use(at, element, length) for the pieces of local elements [first, first + count) that are adjacent in the whole tensor.
template <class Use>
PYKERNELS_INLINE void in_runs(const ChildTensor& t, int64_t first, int64_t count, Use use) {
  if (!t.runs) return use(int64_t(0), uint64_t(first), count);
  for (int64_t at = 0, length; at < count; at += length) {
    const ElementRun& run = t.runs[(first + at) / t.run_elements];
    const int64_t in = (first + at) % t.run_elements, column = in % run.length;
    length = min(min(count - at, run.length - column), t.run_elements - in);
    use(at, uint64_t(run.start + in / run.length * run.stride + column), length);
  }
}

// Bits [0, count) at any place of `to`, whose later bits are zero, from any place of `from`.
inline void append_bits(uint8_t* to, int64_t at, const uint8_t* from, int64_t offset, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    const int64_t left = min<int64_t>(8, count - i);
    uint32_t bits = from[(offset + i) / 8];
    if (offset % 8 + left > 8) bits |= uint32_t(from[(offset + i) / 8 + 1]) << 8;
    bits = bits >> offset % 8 & ((1u << left) - 1);
    const uint32_t placed = bits << (at + i) % 8;
    to[(at + i) / 8] |= uint8_t(placed);
    if (placed > 0xff) to[(at + i) / 8 + 1] |= uint8_t(placed >> 8);
  }
}

// bits[0, count) of elements [first, first + count), at most kMostBits. What is behind them in the last byte may be set.
inline void drawn_bits(uint8_t* bits, const ChildArgs& args, const ChildTensor& t, int64_t first, int64_t count) {
  if (!t.runs) {
    philox_keep_bits(bits, args.seed, uint64_t(first) / 8, (count + 7) / 8, args.threshold, t.stream, t.step);
  } else {
    memset(bits, 0, size_t((count + 7) / 8 + kBitPadding));
    in_runs(t, first, count, [&](int64_t at, uint64_t element, int64_t length) {
      uint8_t drawn[kMostBits / 8 + kBitPadding];
      const int64_t offset = int64_t(element % 8);
      philox_keep_bits(drawn, args.seed, element / 8, (offset + length + 7) / 8, args.threshold, t.stream, t.step);
      append_bits(bits, at, drawn, offset, length);
    });
  }
}

// Random 16-bit numbers of stochastic rounding, count of them; writes kDrawsPadding more at most.
inline void rounding_draws(uint16_t* draws, const ChildArgs& args, const ChildTensor& t, int64_t first, int64_t count) {
  const uint32_t stream = t.stream | 0x80000000u;
  if (!t.runs) return philox_draws(draws, args.seed, uint64_t(first) / 8, (count + 7) / 8, stream, t.step);
  in_runs(t, first, count, [&](int64_t at, uint64_t element, int64_t length) {
    uint16_t drawn[kMostBits + 16 + kDrawsPadding];
    const int64_t offset = int64_t(element % 8);
    philox_draws(drawn, args.seed, element / 8, (offset + length + 7) / 8, stream, t.step);
    memcpy(draws + at, drawn + offset, size_t(length) * sizeof *draws);
  });
}

// Stored bits, with zeros from count to the next multiple of 64.
inline void stored_bits(uint8_t* bits, const uint8_t* mask, int64_t first, int64_t count) {
  const int64_t bytes = (count + 7) / 8;
  memcpy(bits, mask + first / 8, size_t(bytes));
  memset(bits + bytes, 0, kBitPadding);
}

inline void clear_behind(uint8_t* bits, int64_t count) {
  if (count % 8) bits[count / 8] &= uint8_t((1u << count % 8) - 1);
}

PYKERNELS_INLINE int64_t set_bits(const uint8_t* mask, int64_t count) {
  int64_t sum = 0, i = 0;
  for (; i + 64 <= count; i += 64) {
    uint64_t word;
    memcpy(&word, mask + i / 8, sizeof word);
    sum += __builtin_popcountll(word);
  }
  for (; i < count; i += 8) {
    const int64_t left = min<int64_t>(8, count - i);
    sum += __builtin_popcount(mask[i / 8] & ((1u << left) - 1));
  }
  return sum;
}

// packed[0, ...) = the selected of v, those of one vector at a time; writes a whole vector. Returns how many.
// expand: the other way round, zeros elsewhere.
#if defined(__AVX512F__)
PYKERNELS_INLINE __mmask16 sixteen_bits(const uint8_t* bits, int64_t column) {
  uint16_t word;
  memcpy(&word, bits + column / 8, sizeof word);
  return word;
}

PYKERNELS_INLINE int64_t compress(float* packed, vfloat v, const uint8_t* bits, int64_t column) {
  const __mmask16 mask = sixteen_bits(bits, column);
  store(packed, (vfloat)_mm512_maskz_compress_ps(mask, (__m512)v));
  return __builtin_popcount(mask);
}

PYKERNELS_INLINE int64_t expand(vfloat& v, const float* packed, const uint8_t* bits, int64_t column) {
  const __mmask16 mask = sixteen_bits(bits, column);
  v = (vfloat)_mm512_maskz_expand_ps(mask, (__m512)load(packed));
  return __builtin_popcount(mask);
}
#else
template <class C>
PYKERNELS_INLINE uint32_t lane_bits(const uint8_t* bits, int64_t column) {
  return bits[column / 8] >> column % 8 & ((1u << kLanes<C>)-1);
}

template <class C>
PYKERNELS_INLINE int64_t compress(C* packed, Vec<C> v, const uint8_t* bits, int64_t column) {
  C lanes[kLanes<C>];
  store(lanes, v);
  int64_t n = 0;
  for (uint32_t word = lane_bits<C>(bits, column); word; word &= word - 1) packed[n++] = lanes[__builtin_ctz(word)];
  return n;
}

template <class C>
PYKERNELS_INLINE int64_t expand(Vec<C>& v, const C* packed, const uint8_t* bits, int64_t column) {
  C lanes[kLanes<C>] = {};
  int64_t n = 0;
  for (uint32_t word = lane_bits<C>(bits, column); word; word &= word - 1) lanes[__builtin_ctz(word)] = packed[n++];
  v = load(lanes);
  return n;
}
#endif

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
