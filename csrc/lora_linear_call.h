// One call of lora_linear: its arguments checked, and seen as the CPU kernels see them. Shared by forward and backward.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "arguments.h"
#include "lora_linear.h"
#include "product_work.h"

namespace pykernels {

// The arguments that forward and backward have in common, in the order of their schemas.
struct LoraLinearInputs {
  const at::Tensor &x, &weight, &lora_a, &lora_b;
  const OptionalTensor &bias, &scales, &adapter_index, &seed;
  double scale, dropout;
};

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Those of several projections of one x.
struct StackedInputs {
  const at::Tensor& x;
  at::TensorList weights, lora_a, lora_b;
  const OptionalTensors& biases;
  const OptionalTensor& seed;
  at::ArrayRef<double> scales;
  double dropout;
};

class LoraLinearCall {
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
  at::ScalarType sum_type;
  std::vector<int64_t> out_shape;

 private:
  void check_shapes(const LoraLinearInputs& in);
  void set_adapters(const LoraLinearInputs& in);
  void set_dropout(const LoraLinearInputs& in);

  std::vector<at::Tensor> keep_;  // what args points into
  std::vector<double> scales_;
};

// A call for each projection; number i has stream i of the random bits.
std::vector<LoraLinearCall> stacked_calls(const StackedInputs& inputs);

// Where a tensor's elements are; somewhere, not null, where it has none: kernels may add offsets to it.
void* elements_of(const at::Tensor& t);

// A tensor's rows [rows, columns] with adjacent columns: a view where there is one.
at::Tensor rows_of(const at::Tensor& t, int64_t columns);

// Runs run(begin, end, scratch) over shares of a few rows' outputs; scratch_of(rows, depth, outputs of a share) is what each needs.
void few_rows(int64_t (*scratch_of)(int64_t, int64_t, int64_t), int64_t rows, int64_t depth, int64_t outputs,
              const std::function<void(int64_t begin, int64_t end, void* scratch)>& run);

// Rows that share a few sets of a cache, a power of two apart, copied to where they do not; others as they are.
at::Tensor spread_rows(const at::Tensor& rows);

}  // namespace pykernels
