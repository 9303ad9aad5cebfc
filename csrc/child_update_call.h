// One step of a ChildTuning optimizer as the CPU kernels see it.
#pragma once

#include <vector>

#include "child_update.h"
#include "child_update_arguments.h"

namespace pykernels {

class ChildCall : public ChildArguments {
 public:
  explicit ChildCall(const ChildInputs& inputs);

  // Moments number `which` of each tensor, 0 or 1: contiguous, for all its elements or for the selected ones.
  void set_moments(const char* name, at::TensorList moments, int which);
  void run(ChildKernels::Update update, at::TensorList changed);

  const ChildKernels* kernels;

 private:
  struct Unit {
    size_t tensor;
    int64_t first, count, selected;
  };

  void count_selected();

  std::vector<Unit> units_;
  std::vector<int64_t> selected_;  // of each tensor with a mask
};

// Sum of squares of all elements, summed in the same order whatever the number of threads.
double child_square_sum(at::TensorList grads);

}  // namespace pykernels
