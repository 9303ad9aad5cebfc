#include "product_work.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "parallel.h"

namespace pykernels {

namespace {

std::vector<Block> cut(const std::vector<Sequence>& sequences, int64_t Sequence::* count, int64_t rows) {
  std::vector<Block> blocks;
  for (size_t s = 0; s < sequences.size(); s++) {
    const int64_t total = sequences[s].*count, pieces = (total + rows - 1) / rows;
    for (int64_t i = 0, first = 0; i < pieces; i++) {
      const int64_t n = (total - first + pieces - i - 1) / (pieces - i);  // even pieces: no short one at the end
      blocks.push_back({static_cast<int64_t>(s), first, n});
      first += n;
    }
  }
  return blocks;
}

}  // namespace

Work::Work(const std::vector<Sequence>& sequences, int64_t Sequence::* count, int64_t rows, int64_t group)
    : Work(cut(sequences, count, rows), group) {}

Work::Work(std::vector<Block> blocks, int64_t group) : blocks_(std::move(blocks)) {
  for (const Block& block : blocks_) {
    if (!units_.empty() && units_.back().rows + block.rows <= group) {
      units_.back().count++;
      units_.back().rows += block.rows;
    } else {
      units_.push_back({&block, 1, block.rows});
    }
    max_rows_ = std::max(max_rows_, units_.back().rows);
  }
}

void pack_all(const ProductWork& product, void* packed) {
  parallel_items(product.columns, 0,
                 [&](int64_t block, void*) { product.pack(static_cast<char*>(packed) + block * product.packed_bytes, block, block + 1); });
}

namespace {

// Enough shares that threads end together.
int64_t shares() { return 2 * at::get_num_threads(); }

}  // namespace

bool runs_by_columns(const ProductWork& product, const Work& work) {
  constexpr int64_t kActivationBytes = 1 << 20;  // what every thread can read again from its own cache
  constexpr int64_t kSharedBytes = 8 << 20;      // and from the cache that threads share
  if (work.size() < shares()) return true;
  const bool heavy_weights = product.columns * product.packed_bytes > product.activation_bytes && product.activation_bytes <= kSharedBytes;
  return product.columns >= shares() && (heavy_weights || product.activation_bytes <= kActivationBytes);
}

void run_product(const ProductWork& product, const Work& work, const void* prepacked) {
  constexpr int64_t kPackedBytes = 512 << 10;   // packed at a time, to be read again from a thread's own cache
  constexpr int64_t kPreparedBytes = 64 << 20;  // of all rows
  const int64_t unit_bytes = (product.prepared_bytes + 63) / 64 * 64;
  const int64_t wanted = shares(), columns = product.columns;
  const auto block_of = [&](const void* packed, int64_t block) { return static_cast<const char*>(packed) + block * product.packed_bytes; };
  if (runs_by_columns(product, work)) {
    const int64_t items = columns % wanted == 0 ? wanted : std::min(columns, 2 * wanted);  // uneven shares are made smaller
    const int64_t per_item = (columns + items - 1) / std::max<int64_t>(1, items);
    const int64_t group = std::clamp<int64_t>(kPackedBytes / std::max<int64_t>(1, product.packed_bytes), 1, std::max<int64_t>(1, per_item));
    // Before all shares where each would prepare them again and again; else by each, in memory that its cache has already.
    const bool once = per_item > group && work.size() * unit_bytes <= kPreparedBytes;
    const at::Tensor all_prepared = at::empty({once ? work.size() * unit_bytes : 0}, at::kByte);
    const auto of_unit = [&](int64_t unit) { return static_cast<char*>(all_prepared.mutable_data_ptr()) + unit * unit_bytes; };
    if (once) parallel_items(work.size(), 0, [&](int64_t unit, void*) { product.prepare(work[unit], of_unit(unit)); });
    parallel_items(items, (once ? 0 : unit_bytes) + (prepacked ? 0 : group * product.packed_bytes), [&](int64_t item, void* scratch) {
      void* own = static_cast<char*>(scratch) + (once ? 0 : unit_bytes);
      const int64_t last = columns * (item + 1) / items;
      for (int64_t begin = columns * item / items; begin < last; begin += group) {
        const int64_t end = std::min(last, begin + group);
        if (!prepacked) product.pack(own, begin, end);
        const void* packed = prepacked ? block_of(prepacked, begin) : own;
        for (int64_t unit = 0; unit < work.size(); unit++) {
          if (!once) product.prepare(work[unit], scratch);
          product.run(packed, work[unit], begin, end, once ? of_unit(unit) : scratch);
        }
      }
    });
    return;
  }
  at::Tensor buffer;
  if (!prepacked) {
    buffer = at::empty({columns * product.packed_bytes}, at::kByte);
    pack_all(product, buffer.mutable_data_ptr());
    prepacked = buffer.const_data_ptr();
  }
  parallel_items(work.size(), unit_bytes, [&](int64_t item, void* prepared) {
    product.prepare(work[item], prepared);
    product.run(prepacked, work[item], 0, columns, prepared);
  });
}

int64_t partial_sums(const WeightGradient& gradient, int64_t units) {
  constexpr int64_t kPartials = 16, kPartialBytes = 32 << 20, kUnitsPerPartial = 4;
  const int64_t most = std::min({kPartials, kPartialBytes / gradient.partial_bytes, units / kUnitsPerPartial});
  int64_t partials = 1;
  while (2 * partials <= most) partials *= 2;  // a power of two divides evenly among threads
  return partials;
}

void run_weight_gradient(const WeightGradient& gradient, const Work& work, int64_t scratch_bytes, int64_t partials, bool add, void* to) {
  // Each split transposes dh for itself: no more of them than threads need.
  const int64_t columns = gradient.columns, threads = at::get_num_threads();
  const int64_t splits = std::min(columns, (threads + partials - 1) / partials);
  parallel_items(partials * splits, scratch_bytes, [&](int64_t item, void* scratch) {
    const int64_t p = item / splits, split = item % splits;
    const int64_t first = work.size() * p / partials;
    for (int64_t unit = first; unit < work.size() * (p + 1) / partials; unit++) {
      gradient.run(work[unit], static_cast<char*>(to) + p * gradient.partial_bytes, add || unit > first, columns * split / splits,
                   columns * (split + 1) / splits, scratch);
    }
  });
}

}  // namespace pykernels
