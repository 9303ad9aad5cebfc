#include "attention_pool_call.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

namespace pykernels {
namespace {

// What a unit of work reads again from its own cache.
constexpr int64_t kPanelBytes = 256 << 10;

}  // namespace

AttentionPoolCall::AttentionPoolCall(const AttentionPoolInputs& in) {
  check(in, args);
  kernels = PYKERNELS_OF_TIER(tier_for(dtype), attention_pool_kernels)(dtype, dtype == Dtype::float32 && float32_allows_bf16());
  sequences = sequences_of(x, in.mask, in.lengths, in.cu_seqlens, keep_);
  has_dead_rows = in.mask || in.lengths;
  args.sequences = sequences.data();
  args.x_row = x.stride(-2);
  args.x_column = x.size(-1) == 1 ? 1 : x.stride(-1);
  args.dh_half = (args.hidden + kernels->depth_unit - 1) / kernels->depth_unit * kernels->depth_unit;
  args.dh_row = (args.gated ? 2 : 1) * args.dh_half + 64 / kernels->panel_size;  // one cache line: rows at powers of two share cache sets
  cut_chunks();
}

// From the first live row of each sequence on, and of a size that depends on D alone, so that results do not move with padding.
void AttentionPoolCall::cut_chunks() {
  constexpr int64_t kMost = 64, kLeast = 32;
  const int64_t row_bytes = std::max<int64_t>(1, args.width * kernels->panel_size);
  const int64_t rows = std::clamp(kPanelBytes / row_bytes / kLeast * kLeast, kLeast, kMost);
  alone_.reserve(sequences.size());
  first_chunk.reserve(sequences.size() + 1);
  for (size_t s = 0; s < sequences.size(); s++) {
    const Sequence& sequence = sequences[s];
    first_chunk.push_back(static_cast<int64_t>(chunks.size()));
    int64_t row = 0;
    while (sequence.mask && row < sequence.live && !sequence.mask[row]) row++;
    for (; row < sequence.live; row += rows) {
      const int64_t n = std::min(rows, sequence.live - row);
      if (!sequence.mask || std::memchr(sequence.mask + row, 1, static_cast<size_t>(n)))
        chunks.push_back({static_cast<int64_t>(s), row, n});
    }
    alone_.push_back(static_cast<int64_t>(chunks.size()) - first_chunk.back() == 1);
    has_dead_rows |= sequence.live == 0;
  }
  first_chunk.push_back(static_cast<int64_t>(chunks.size()));
  args.alone = alone_.data();
}

int64_t AttentionPoolCall::live_rows() const {
  int64_t rows = 0;
  for (const Block& chunk : chunks) rows += chunk.rows;
  return rows;
}

int64_t AttentionPoolCall::unit_rows() const {
  constexpr int64_t kMost = 512;
  const int64_t fits = kPanelBytes / std::max<int64_t>(1, args.width * kernels->panel_size);
  return std::min(fits, kMost);
}

}  // namespace pykernels
