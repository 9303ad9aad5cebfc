// Philox4x32-10 (Salmon et al. 2011), many counters at a time. pykernels/random_bits.py is the specification.
#pragma once

#include "vec.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

PYKERNELS_INLINE void multiply_wide(vuint a, uint32_t m, vuint& high, vuint& low) {
  // Both halves of the products of even and odd lanes: a third multiplication for the low one would cost more than a shift and a blend.
#if defined(__AVX512F__)
  const __m512i mv = _mm512_set1_epi32(int(m)), av = (__m512i)a;
  const __m512i even = _mm512_mul_epu32(av, mv), odd = _mm512_mul_epu32(_mm512_srli_epi64(av, 32), mv);
  high = (vuint)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = (vuint)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i mv = _mm256_set1_epi32(int(m)), av = (__m256i)a;
  const __m256i even = _mm256_mul_epu32(av, mv), odd = _mm256_mul_epu32(_mm256_srli_epi64(av, 32), mv);
  high = (vuint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (vuint)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  low = a * m;
  for (int i = 0; i < kLanes<float>; i++) high[i] = uint32_t((uint64_t(a[i]) * m) >> 32);
#endif
}

// The words of counters 0 ... W - 1 side by side, 16 bytes a counter: two rounds of interleaving.
PYKERNELS_INLINE void store_words(uint16_t* draws, vuint c0, vuint c1, vuint c2, vuint c3) {
  constexpr int W = kLanes<float>;
#pragma GCC unroll 4
  for (int part = 0; part < 4; part++) {  // counters [part * W / 4, (part + 1) * W / 4)
    vint pairs, quads;
    for (int l = 0; l < W; l++) {
      pairs[l] = part * W / 4 + l / 2 % (W / 4) + l % 2 * W;
      quads[l] = l / 4 * 2 + l % 2 + l / 2 % 2 * W;
    }
    const vuint words = __builtin_shuffle(__builtin_shuffle(c0, c1, pairs), __builtin_shuffle(c2, c3, pairs), quads);
    memcpy(draws + part * 2 * W, &words, sizeof words);
  }
}

// Ten rounds for kVectors vectors of counters, side by side: each round waits for its own multiplications.
template <int kVectors>
PYKERNELS_INLINE void philox_rounds(vuint (&c)[kVectors][4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      vuint h0, l0, h1, l1;
      multiply_wide(c[v][0], 0xD2511F53u, h0, l0);
      multiply_wide(c[v][2], 0xCD9E8D57u, h1, l1);
      c[v][0] = h1 ^ c[v][1] ^ k0;
      c[v][1] = l1;
      c[v][2] = h0 ^ c[v][3] ^ k1;
      c[v][3] = l0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Calls use(done, words) with the four words of counters (first + done + lane, stream, step), for done = 0, W, ... below calls.
template <class Use>
PYKERNELS_INLINE void philox_words(uint64_t seed, uint64_t first, int64_t calls, uint32_t stream, uint32_t step, Use use) {
  constexpr int W = kLanes<float>;
  vuint lane;
  for (int i = 0; i < W; i++) lane[i] = uint32_t(i);
  const auto draw = [&]<int kVectors>(int64_t done) {
    vuint c[kVectors][4];
    for (int v = 0; v < kVectors; v++) {
      const uint64_t base = first + uint64_t(done + v * W);
      c[v][0] = lane + uint32_t(base);
      c[v][1] = vuint{} + uint32_t(base >> 32);
      c[v][1] += (c[v][0] < uint32_t(base)) ? vuint{} + 1 : vuint{};
      c[v][2] = vuint{} + stream;
      c[v][3] = vuint{} + step;
    }
    philox_rounds(c, seed);
    for (int v = 0; v < kVectors; v++) use(done + v * W, c[v]);
  };
  int64_t done = 0;
  for (; done + W < calls; done += 2 * W) draw.template operator()<2>(done);
  if (done < calls) draw.template operator()<1>(done);
}

// draws[8 * i + j], j = 0..7: the eight 16-bit draws of counter (first + i, stream, step), i in [0, calls), in the order of a little-endian
// memory. Writes kDrawsPadding more at most.
constexpr int64_t kDrawsPadding = 8 * (kLanes<float> - 1);
inline void philox_draws(uint16_t* draws, uint64_t seed, uint64_t first, int64_t calls, uint32_t stream, uint32_t step) {
  philox_words(seed, first, calls, stream, step,
               [&](int64_t done, const vuint(&c)[4]) { store_words(draws + 8 * done, c[0], c[1], c[2], c[3]); });
}

// Bit j of bytes[i]: draw j of counter (first + i, stream, step) is below the threshold, so that dropout keeps the element.
#if defined(__AVX512BW__)
// The four bits of each counter, spread to the low halves of bytes.
PYKERNELS_INLINE uint64_t nibbles(uint32_t bits) {
  uint64_t v = bits;
  v = (v | v << 16) & 0x0000ffff0000ffffu;
  v = (v | v << 8) & 0x00ff00ff00ff00ffu;
  return (v | v << 4) & 0x0f0f0f0f0f0f0f0fu;
}

// Eight counters a vector, a word in the low half of each 64-bit lane: a product leaves both of its halves where the next round wants them,
// and what the upper halves hold is never read. Two thirds of the instructions of philox_rounds; kGroups vectors hide their latency.
template <int kGroups>
PYKERNELS_INLINE void philox_keep_groups(uint64_t (&bytes)[kGroups], uint64_t seed, uint64_t first, uint32_t threshold, uint32_t stream,
                                         uint32_t step) {
  __m512i c[kGroups][4];
  const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int g = 0; g < kGroups; g++) {
    c[g][0] = _mm512_add_epi64(_mm512_set1_epi64(int64_t(first) + 8 * g), lanes);
    c[g][1] = _mm512_srli_epi64(c[g][0], 32);
    c[g][2] = _mm512_set1_epi64(stream);
    c[g][3] = _mm512_set1_epi64(step);
  }
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53u), m1 = _mm512_set1_epi64(0xCD9E8D57u);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; g++) {
      const __m512i p0 = _mm512_mul_epu32(c[g][0], m0), p1 = _mm512_mul_epu32(c[g][2], m1);
      c[g][0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c[g][1], key0, 0x96);
      c[g][2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c[g][3], key1, 0x96);
      c[g][1] = p1;
      c[g][3] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m512i most = _mm512_set1_epi16(short(threshold - 1));
  for (int g = 0; g < kGroups; g++) {
    // Words 0 and 1 are the draws 0 to 3 of a counter, 2 and 3 the draws 4 to 7.
    const __m512i low = _mm512_mask_blend_epi32(0xaaaa, c[g][0], _mm512_slli_epi64(c[g][1], 32));
    const __m512i high = _mm512_mask_blend_epi32(0xaaaa, c[g][2], _mm512_slli_epi64(c[g][3], 32));
    bytes[g] = nibbles(_mm512_cmple_epu16_mask(low, most)) | nibbles(_mm512_cmple_epu16_mask(high, most)) << 4;
  }
}

inline void philox_keep_bits(uint8_t* bytes, uint64_t seed, uint64_t first, int64_t calls, uint32_t threshold, uint32_t stream,
                             uint32_t step) {
  constexpr int kGroups = 4;
  for (int64_t done = 0; done < calls; done += 8 * kGroups) {
    uint64_t words[kGroups];
    philox_keep_groups(words, seed, first + uint64_t(done), threshold, stream, step);
    memcpy(bytes + done, words, size_t(min<int64_t>(8 * kGroups, calls - done)));
  }
}
#else
inline void philox_keep_bits(uint8_t* bytes, uint64_t seed, uint64_t first, int64_t calls, uint32_t threshold, uint32_t stream,
                             uint32_t step) {
  philox_words(seed, first, calls, stream, step, [&](int64_t done, const vuint(&words)[4]) {
    vuint kept{};
    for (uint32_t w = 0; w < 4; w++) {
      kept |= (words[w] & 0xffffu) < threshold ? vuint{} + (1u << 2 * w) : vuint{};
      kept |= (words[w] >> 16) < threshold ? vuint{} + (2u << 2 * w) : vuint{};
    }
    const auto narrow = __builtin_convertvector(kept, VecOf<uint8_t, kLanes<float>>::type);
    memcpy(bytes + done, &narrow, size_t(min<int64_t>(kLanes<float>, calls - done)));
  });
}
#endif

// v where the bit of its column is set, else zeros. bits is a row's first byte; column is a multiple of the lanes. May read one byte more
// than there are columns.
template <class C>
PYKERNELS_INLINE Vec<C> keep_columns(Vec<C> v, const uint8_t* bits, int64_t column) {
  constexpr int W = kLanes<C>;
  using Lanes = typename ShuffleIndex<Vec<C>>::type;
  uint16_t word = bits[column / 8];
  if constexpr (W > 8) {
    memcpy(&word, bits + column / 8, sizeof word);
  } else {
    word >>= column % 8;
  }
  Lanes bit;
  for (int i = 0; i < W; i++) bit[i] = 1 << i;
  return ((Lanes{} + word) & bit) != 0 ? v : Vec<C>{};
}

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
