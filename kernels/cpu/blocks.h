// What the kernels of all operators on sequences are told about the batch, and how its rows are cut into work.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace pykernels {

// One sequence of the batch. Rows are counted in the flattened tensors [rows, channels] of outputs and gradients.
struct Sequence {
  const void* x;        // its first row
  const uint8_t* mask;  // one byte for each of its x rows, or null
  int64_t live;         // x rows that exist; the other in_rows - live are padding
  int64_t live_out;     // output rows that are computed; the other out_rows - live_out are zero
  int64_t in_row, in_rows;
  int64_t out_row, out_rows;
  int64_t index;  // place in the batch
};

// Rows [first, first + rows) of a sequence: output rows, or x rows for the gradient of x.
struct Block {
  int64_t sequence, first, rows;
};

// The unit of work: one block, or several of one or more sequences.
struct Blocks {
  const Block* data;
  int64_t count, rows;
};

}  // namespace pykernels
