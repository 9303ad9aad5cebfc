// Work items over PyTorch's own threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

namespace pykernels {

// Calls work(item, scratch) for each item; every thread takes the next one when it is free, so that items of unequal size (padding, ragged
// batches) balance. Scratch is private to a thread and aligned to 64 bytes. Results must not depend on which thread runs an item.
template <class Work>
void parallel_items(int64_t items, int64_t scratch_bytes, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(items, at::in_parallel_region() ? 1 : at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<void, decltype(&std::free)> scratch(nullptr, &std::free);
    if (scratch_bytes > 0) {
      scratch.reset(std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64));
      TORCH_CHECK(scratch, "pykernels: out of memory (", scratch_bytes, " bytes of scratch for one thread)");
    }
    for (int64_t thread = begin; thread < end; thread++) {
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(item, scratch.get());
    }
  });
}

}  // namespace pykernels
