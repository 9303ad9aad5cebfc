// One call of lora_linear: its arguments checked, and seen as the CPU kernels see them. Shared by forward and backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "lora_linear.h"
#include "lora_linear_arguments.h"
#include "product_work.h"

namespace pykernels {

class LoraLinearCall : public LoraLinearArguments {
 public:
  // Throws TypeError / ValueError with the argument's name, what was wanted and what came. stream: of the random bits.
  explicit LoraLinearCall(const LoraLinearInputs& inputs, uint32_t stream = 0);

  int64_t keep_bytes() const { return args.keep_threshold ? args.rows * args.keep_row + 1 : 0; }
  // Units of so many rows for the low-rank passes: their sums depend on it, and it depends on sizes alone.
  Work low_rank_work(int64_t rows = 64) const;
  // Units for a product.
  Work product_work() const;

  const LoraLinearKernels* kernels;
  LoraLinearArgs args{};
  LoraAdapters adapters{};
  at::Tensor x;  // [rows, in], columns adjacent

 private:
  void set_adapters(const LoraLinearInputs& in);

  std::vector<double> scales_;
};

// A call for each projection; number i has stream i of the random bits.
std::vector<LoraLinearCall> stacked_calls(const StackedInputs& inputs);

// Where a tensor's elements are; somewhere, not null, where it has none: kernels may add offsets to it.
void* elements_of(const at::Tensor& t);

// Runs run(begin, end, scratch) over shares of a few rows' outputs; scratch_of(rows, depth, outputs of a share) is what each needs.
void few_rows(int64_t (*scratch_of)(int64_t, int64_t, int64_t), int64_t rows, int64_t depth, int64_t outputs,
              const std::function<void(int64_t begin, int64_t end, void* scratch)>& run);

}  // namespace pykernels
