#include "gated_conv_call.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "arguments.h"

namespace pykernels {

GatedConvCall::GatedConvCall(const GatedConvInputs& in) {
  check(in, args);
  kernels = PYKERNELS_OF_TIER(tier_for(dtype), gated_conv_kernels)(dtype, dtype == Dtype::float32 && float32_allows_bf16());
  lay_out_sequences(in);
  set_random(in, args);
  args.sequences = sequences.data();
  args.dh_half = (args.c_out + kernels->depth_unit - 1) / kernels->depth_unit * kernels->depth_unit;
  args.dh_row = 2 * args.dh_half + 64 / kernels->panel_size;  // one cache line: rows at powers of two share cache sets
}

void GatedConvCall::lay_out_sequences(const GatedConvInputs& in) {
  args.x_row = x.stride(-2);
  args.x_column = x.size(-1) == 1 ? 1 : x.stride(-1);
  sequences = sequences_of(x, in.mask, in.lengths, in.cu_seqlens, keep_);
  if (args.shift == 0) return;
  const int64_t out_length = out_shape[1];
  for (Sequence& s : sequences) {
    s.live_out = std::clamp<int64_t>(s.live - args.shift, 0, out_length);
    s.out_row = s.index * out_length;
    s.out_rows = out_length;
  }
}

int64_t GatedConvCall::block_rows(int64_t total_rows, int64_t channels) const {
  constexpr int64_t kPanelBytes = 128 << 10, kBlocksPerThread = 4;
  const int64_t tile = kernels->row_tile;
  const int64_t fits = kPanelBytes / std::max<int64_t>(1, channels * kernels->panel_size);
  const int64_t shares = total_rows / (kBlocksPerThread * at::get_num_threads());
  return std::max(tile, std::min({fits, shares, 16 * tile}) / tile * tile);
}

}  // namespace pykernels
