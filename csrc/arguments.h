// Checks that operators share: TypeError for types and dtypes, ValueError for values, each with the argument's name, what was expected and
// what came; and the batch as the kernels see it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "blocks.h"
#include "cpu_tier.h"

namespace pykernels {

using OptionalTensor = std::optional<at::Tensor>;

template <class Enum>
Enum choose(const char* name, std::string_view came, std::initializer_list<std::pair<std::string_view, Enum>> choices) {
  std::string wanted;
  for (const auto& [text, value] : choices) {
    if (came == text) return value;
    wanted += (wanted.empty() ? "" : ", ") + std::string("'") + std::string(text) + "'";
  }
  TORCH_CHECK_VALUE(false, name, ": expected one of ", wanted, ", got '", came, "'");
}

// The dtype of x, which is checked, and the tier that serves it: float64 is for numerical checks, and has the generic one alone.
Dtype dtype_of(const at::Tensor& x);
inline CpuTier tier_for(Dtype dtype) { return dtype == Dtype::float64 ? CpuTier::generic : cpu_tier(); }

// dtype and device of x, where the tensor is there.
void check_like(const char* name, const OptionalTensor& t, const at::Tensor& x);
void check_shape(const char* name, const OptionalTensor& t, at::IntArrayRef shape);
// int32 or int64 [count]; count < 0: of any length.
void check_indices(const char* name, const at::Tensor& t, int64_t count);
// dtype and shape of a mask of x [B, L, ...].
void check_mask(const at::Tensor& mask, const at::Tensor& x);
void check_one_of(const OptionalTensor& mask, const OptionalTensor& lengths, const OptionalTensor& cu_seqlens);

// float32 tensors may be multiplied in bf16 where PyTorch's own setting says so; "high" means float32 here.
bool float32_allows_bf16();

// The sequences of x [B, L, ...] with a mask [B, L] or lengths [B], or of packed rows [T, ...] with cu_seqlens [B + 1]; output rows are x
// rows. Copies that the sequences point into are added to keep.
std::vector<Sequence> sequences_of(const at::Tensor& x, const OptionalTensor& mask, const OptionalTensor& lengths,
                                   const OptionalTensor& cu_seqlens, std::vector<at::Tensor>& keep);

}  // namespace pykernels
