// The 16-bit draws of rows of activations, for tests against the specification in pykernels/random_bits.py.
#pragma once

#include <cstdint>

namespace pykernels {

// draws[r * n + c] for rows [first, last): element r * 8 * ceil(n / 8) + c; scratch holds 8 * ceil(n / 8) + kDrawsScratch draws.
constexpr int64_t kDrawsScratch = 128;
using RandomBits = void (*)(int32_t* draws, uint64_t seed, int64_t first, int64_t last, int64_t n, uint32_t stream, uint32_t step,
                            uint16_t* scratch);

}  // namespace pykernels
