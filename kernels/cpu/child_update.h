// ChildTuning's optimizer steps on the CPU: what csrc/child_update.cpp calls. One table of functions for each tier and dtype.
#pragma once

#include "../child_update_form.h"
#include "blocks.h"
#include "tiers.h"

namespace pykernels {

struct ChildKernels {
  // Elements [first, first + count), first a multiple of kChildUnit. selected: how many compact moments lie before.
  using Update = void (*)(const ChildArgs&, const ChildTensor&, int64_t first, int64_t count, int64_t selected, void* scratch);
  Update adamw, sgd;
  int64_t scratch;  // bytes for a thread
  double (*square_sum)(const void* g, int64_t count);
  int64_t (*set_bits)(const uint8_t* mask, int64_t count);  // of the first count
};

constexpr int64_t kChildUnit = 65536;  // elements of a unit of work

PYKERNELS_IN_EVERY_TIER(const ChildKernels* child_kernels(Dtype dtype);)

}  // namespace pykernels
