// ChildTuning's optimizer steps on CUDA devices: what csrc/cuda/child_update.cpp calls. kernels/child_update_form.h has the formulas.
//
// All tensors of a launch are told of in its parameters, so that a step copies nothing to the device, waits for nothing and can be captured
// in a graph. Tensors are cut into chunks, one for each block; the sums of squares and of selected bits are taken chunk by chunk in a fixed
// order. Every function puts kernels on the stream and returns the first error.
#pragma once

#include <cuda_runtime_api.h>

#include "../child_update_form.h"
#include "../dtype.h"

namespace pykernels::cuda {

constexpr int kChildTensors = 224;      // of a launch: parameters have room for 32764 bytes
constexpr int64_t kChildChunk = 16384;  // elements of a block

struct ChildSlice : ChildTensor {
  int64_t elements;
  int64_t moment_elements;  // there are no more, whatever the mask selects
  int64_t first_chunk;      // number of its first chunk in this launch
  bool wide;                // p, g and dense moments are aligned to 16 bytes
};

struct ChildLaunch {
  ChildArgs args;
  Dtype dtype;
  bool sgd;
  int32_t count;             // tensors
  int64_t chunks;            // of all of them
  const double* square_sum;  // of all gradients, or null; then
  double max_grad_norm;
  double norm_factor;  // what the root of square_sum is multiplied with
  int64_t* selected;   // [chunks] for compact moments: how many elements of the tensor are selected before each chunk; or null
  double* partials;    // [chunks] of a sum of squares
  ChildSlice tensors[kChildTensors];
};
static_assert(sizeof(ChildLaunch) <= 32764);

extern "C" {

// Fills `selected` from the masks.
cudaError_t pykernels_cuda_child_update_count(const ChildLaunch*, cudaStream_t);
cudaError_t pykernels_cuda_child_update(const ChildLaunch*, cudaStream_t);
// Fills `partials` from g; the second adds up count of them.
cudaError_t pykernels_cuda_child_update_squares(const ChildLaunch*, cudaStream_t);
cudaError_t pykernels_cuda_child_update_sum(const double* partials, int64_t count, double* sum, cudaStream_t);

}  // extern "C"

}  // namespace pykernels::cuda
