// One call of attention_pool: its arguments checked, and seen as the CPU kernels see them. Shared by forward and backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "attention_pool.h"
#include "attention_pool_arguments.h"

namespace pykernels {

class AttentionPoolCall : public AttentionPoolArguments {
 public:
  // Throws TypeError / ValueError with the argument's name, what was wanted and what came.
  explicit AttentionPoolCall(const AttentionPoolInputs& inputs);

  void check_saved(const AttentionPoolSaved& saved) { AttentionPoolArguments::check_saved(saved, args); }

  // How many live rows, and how many rows the units of a pass over them should have: their panel stays in L2 and all threads find work.
  int64_t live_rows() const;
  int64_t unit_rows() const;
  // Calls zero(first, count) for the runs of rows of a sequence that are in no chunk or masked.
  template <class Zero>
  void for_dead_rows(const Sequence& sequence, const Zero& zero) const {
    for (int64_t r = 0; r < sequence.in_rows;) {
      const auto dead = [&](int64_t i) { return i >= sequence.live || (sequence.mask && !sequence.mask[i]); };
      int64_t end = r;
      while (end < sequence.in_rows && dead(end)) end++;
      if (end > r) zero(r, end - r);
      while (end < sequence.in_rows && !dead(end)) end++;
      r = end;
    }
  }

  const AttentionPoolKernels* kernels;
  AttentionPoolArgs args{};
  std::vector<Sequence> sequences;
  std::vector<Block> chunks;         // of all sequences, in order
  std::vector<int64_t> first_chunk;  // of each sequence, and their number
  bool has_dead_rows = false;

 private:
  void cut_chunks();

  std::vector<uint8_t> alone_;
};

// Packed weights for a pass, in one buffer.
at::Tensor packed_weights(int64_t columns, int64_t bytes, const std::function<void(void* to, int64_t begin, int64_t end)>& pack);

}  // namespace pykernels
