// Philox4x32-10 (Salmon et al. 2011). pykernels/random_bits.py is the specification.
#pragma once

#include <cstdint>

namespace pykernels::cuda {

// The eight 16-bit draws of one counter.
struct Draws {
  uint32_t words[4];

  __device__ __forceinline__ uint32_t operator[](int i) const { return i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu; }
};

__device__ __forceinline__ Draws philox(uint64_t seed, uint64_t counter, uint32_t stream, uint32_t step) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = stream, c3 = step;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t h0 = __umulhi(c0, 0xD2511F53u), l0 = c0 * 0xD2511F53u;
    const uint32_t h1 = __umulhi(c2, 0xCD9E8D57u), l1 = c2 * 0xCD9E8D57u;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The draws of elements `column` ... `column` + 7 of a row of activations of width n; column is a multiple of 8.
__device__ __forceinline__ Draws activation_draws(uint64_t seed, int64_t row, int64_t n, int64_t column) {
  return philox(seed, uint64_t(row) * uint64_t((n + 7) / 8) + uint64_t(column / 8), 0, 0);
}

}  // namespace pykernels::cuda
