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

// draws[8 * i + j], j = 0..7: the eight 16-bit draws of counter (first + i, stream, step), i in [0, calls), in the order of a little-endian
// memory. Writes kDrawsPadding more at most.
constexpr int64_t kDrawsPadding = 8 * (kLanes<float> - 1);
void philox_draws(uint16_t* draws, uint64_t seed, uint64_t first, int64_t calls, uint32_t stream, uint32_t step) {
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
    store_words(draws + 8 * done, c0, c1, c2, c3);
  }
}

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
