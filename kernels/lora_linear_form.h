// One call of lora_linear as the kernels of every device see it.
#pragma once

#include <cstdint>

namespace pykernels {

struct LoraLinearForm {
  int64_t rows, in, out, rank, adapters;

  // Dropout of what A is multiplied with: an element is kept iff its draw is below keep_threshold, which is 0 without dropout.
  uint64_t seed;
  uint32_t stream;
  uint32_t keep_threshold;
  double keep_scale;
};

}  // namespace pykernels
