// What the CUDA kernels of all operators on sequences are told about the batch. Lengths and boundaries stay on the device, so that no call
// waits for it; what lies outside of the tensors there is cut off.
#pragma once

#include <cstdint>

namespace pykernels::cuda {

struct Batch {
  int64_t sequences;
  int64_t length;      // x rows of each sequence of a padded batch; 0 for packed rows
  int64_t rows;        // x rows in all
  const void* bounds;  // lengths [sequences]; cu_seqlens [sequences + 1] of packed rows; or null
  bool wide_bounds;    // they are int64, else int32
  bool packed;
  const uint8_t* mask;             // [sequences, length] or null
  const int32_t* sequence_of_row;  // packed rows only
};

}  // namespace pykernels::cuda
