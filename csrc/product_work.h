// How a product of activations and packed weights is shared out among threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "blocks.h"

namespace pykernels {

// The rows of all sequences that `count` names (output rows, live ones, x rows), cut into blocks of at most `rows` and these into units of
// work. Units take in several blocks while they have no more than `group` rows together, so that batches of very short sequences fill the
// register tiles.
class Work {
 public:
  Work(const std::vector<Sequence>& sequences, int64_t Sequence::* count, int64_t rows, int64_t group);
  Work(std::vector<Block> blocks, int64_t group);

  int64_t size() const { return static_cast<int64_t>(units_.size()); }
  const Blocks& operator[](int64_t i) const { return units_[i]; }
  int64_t max_rows() const { return max_rows_; }

 private:
  std::vector<Block> blocks_;
  std::vector<Blocks> units_;
  int64_t max_rows_ = 0;
};

struct ProductWork {
  int64_t columns;           // column blocks
  int64_t packed_bytes;      // of one of them
  int64_t activation_bytes;  // of all rows
  int64_t prepared_bytes;    // of what all columns need of one unit's rows
  std::function<void(void* packed, int64_t begin, int64_t end)> pack;
  std::function<void(const Blocks&, void* prepared)> prepare;
  std::function<void(const void* packed, const Blocks&, int64_t begin, int64_t end, const void* prepared)> run;
};

void pack_all(const ProductWork& product, void* packed);

// Runs every unit with every column block. Many rows: threads take units, and all use one packed copy of the weights. Few rows, or more
// weights than rows: threads take columns, pack some at a time for themselves and run all rows, so that packed weights stay in a core's own
// cache. Every element is summed in the same order either way.
bool runs_by_columns(const ProductWork& product, const Work& work);
void run_product(const ProductWork& product, const Work& work, const void* prepacked);

// The gradient of a weight: sums over units of work, in `partials` sums that each take a fixed share of the units.
struct WeightGradient {
  int64_t columns;        // column blocks
  int64_t partial_bytes;  // of one partial sum
  std::function<void(const Blocks&, void* partial, bool add, int64_t begin, int64_t end, void* scratch)> run;
};

// How many partial sums that many units get. Depends on sizes alone.
int64_t partial_sums(const WeightGradient& gradient, int64_t units);

// Writes, or with `add` adds, the sums over all units of work to partials [partials, partial_bytes].
void run_weight_gradient(const WeightGradient& gradient, const Work& work, int64_t scratch_bytes, int64_t partials, bool add, void* to);

}  // namespace pykernels
