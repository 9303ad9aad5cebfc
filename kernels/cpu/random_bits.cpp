#include "random_bits.h"

#include "philox.h"

namespace pykernels::PYKERNELS_TIER {

static_assert(kDrawsPadding <= kDrawsScratch);

extern const RandomBits random_bits = [](int32_t* draws, uint64_t seed, int64_t first, int64_t last, int64_t n, uint32_t stream,
                                         uint32_t step, uint16_t* scratch) {
  const int64_t calls = (n + 7) / 8;
  for (int64_t r = first; r < last; r++) {
    philox_draws(scratch, seed, uint64_t(r * calls), calls, stream, step);
    for (int64_t c = 0; c < n; c++) draws[r * n + c] = scratch[c];
  }
};

}  // namespace pykernels::PYKERNELS_TIER
