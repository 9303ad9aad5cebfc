// Philox4x32-10 (Salmon et al. 2011), many counters at a time. pykernels/random_bits.py is the specification.
#pragma once

#include "vec.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

PYKERNELS_INLINE void multiply_wide(vuint a, uint32_t m, vuint& high, vuint& low) {
  low = a * m;
#if defined(__AVX512F__)
  const __m512i mv = _mm512_set1_epi32(int(m)), av = (__m512i)a;
  const __m512i even = _mm512_mul_epu32(av, mv), odd = _mm512_mul_epu32(_mm512_srli_epi64(av, 32), mv);
  high = (vuint)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i mv = _mm256_set1_epi32(int(m)), av = (__m256i)a;
  const __m256i even = _mm256_mul_epu32(av, mv), odd = _mm256_mul_epu32(_mm256_srli_epi64(av, 32), mv);
  high = (vuint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
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

// Calls use(done, c0, c1, c2, c3) with the words of counters (first + done + lane, stream, step), for done = 0, W, ... below calls.
template <class Use>
PYKERNELS_INLINE void philox_words(uint64_t seed, uint64_t first, int64_t calls, uint32_t stream, uint32_t step, Use use) {
  constexpr int W = kLanes<float>;
  vuint lane;
  for (int i = 0; i < W; i++) lane[i] = uint32_t(i);
  for (int64_t done = 0; done < calls; done += W) {
    const uint64_t base = first + uint64_t(done);
    vuint c0 = lane + uint32_t(base);
    vuint c1 = vuint{} + uint32_t(base >> 32);
    c1 += (c0 < uint32_t(base)) ? vuint{} + 1 : vuint{};
    vuint c2 = vuint{} + stream, c3 = vuint{} + step;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
      vuint h0, l0, h1, l1;
      multiply_wide(c0, 0xD2511F53u, h0, l0);
      multiply_wide(c2, 0xCD9E8D57u, h1, l1);
      c0 = h1 ^ c1 ^ k0;
      c1 = l1;
      c2 = h0 ^ c3 ^ k1;
      c3 = l0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    use(done, c0, c1, c2, c3);
  }
}

// draws[8 * i + j], j = 0..7: the eight 16-bit draws of counter (first + i, stream, step), i in [0, calls), in the order of a little-endian
// memory. Writes kDrawsPadding more at most.
constexpr int64_t kDrawsPadding = 8 * (kLanes<float> - 1);
inline void philox_draws(uint16_t* draws, uint64_t seed, uint64_t first, int64_t calls, uint32_t stream, uint32_t step) {
  philox_words(seed, first, calls, stream, step,
               [&](int64_t done, vuint c0, vuint c1, vuint c2, vuint c3) { store_words(draws + 8 * done, c0, c1, c2, c3); });
}

// Bit j of bytes[i]: draw j of counter (first + i, stream, step) is below the threshold, so that dropout keeps the element.
inline void philox_keep_bits(uint8_t* bytes, uint64_t seed, uint64_t first, int64_t calls, uint32_t threshold, uint32_t stream,
                             uint32_t step) {
  philox_words(seed, first, calls, stream, step, [&](int64_t done, vuint c0, vuint c1, vuint c2, vuint c3) {
    const vuint words[4] = {c0, c1, c2, c3};
    vuint kept{};
    for (uint32_t w = 0; w < 4; w++) {
      kept |= (words[w] & 0xffffu) < threshold ? vuint{} + (1u << 2 * w) : vuint{};
      kept |= (words[w] >> 16) < threshold ? vuint{} + (2u << 2 * w) : vuint{};
    }
    const auto narrow = __builtin_convertvector(kept, VecOf<uint8_t, kLanes<float>>::type);
    memcpy(bytes + done, &narrow, size_t(min<int64_t>(kLanes<float>, calls - done)));
  });
}

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
