// What forward and backward of gated_conv1d share: views of the arguments in the types of one instantiation.
#pragma once

#include "gated_conv.h"
#include "panel.h"
#include "philox.h"
#include "scratch.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

// Shrinks a block to the rows from its first to its last one that is below `live` and not masked. Row r has mask byte r + shift.
PYKERNELS_INLINE void trim(Block& block, const GatedConvArgs& args, int64_t live, int64_t shift) {
  const uint8_t* mask = args.sequences[block.sequence].mask;
  int64_t first = block.first, last = max(first, min(first + block.rows, live));
  while (mask && first < last && !mask[first + shift]) first++;
  while (mask && first < last && !mask[last - 1 + shift]) last--;
  block.first = first;
  block.rows = last - first;
}

template <class T>
Rows<T> x_rows(const GatedConvArgs& args, const Sequence& sequence) {
  return {static_cast<const T*>(sequence.x), args.x_row, args.x_column, args.c_in, sequence.live, sequence.mask};
}

// The taps of all rows of some blocks. rows_of(sequence) is what they read; tap k of a block begins at its first row + offset + k * step.
template <class P, class RowsOf>
int64_t taps_of(Tap<P>* taps, P* panel, const GatedConvArgs& args, const Blocks& blocks, int64_t offset, int64_t step, int64_t width,
                RowsOf rows_of) {
  if (blocks.count == 1) {
    const Block& block = blocks.data[0];
    return make_taps(taps, panel, rows_of(args.sequences[block.sequence]), block.first + offset, step, args.taps, block.rows, width,
                     tap_weights<P>(width));
  }
  const int64_t read = round_up(blocks.rows, Product<P>::kRowPad), stride = panel_stride<P>(width);
  for (int64_t k = 0; k < args.taps; k++) {
    taps[k] = {panel, stride, k * tap_weights<P>(width)};
    for (int64_t i = 0; i < blocks.count; i++) {
      const Block& block = blocks.data[i];
      gather_rows(panel, stride, width, rows_of(args.sequences[block.sequence]), block.first + offset + k * step, block.rows);
      panel += block.rows * stride;
    }
    memset(panel, 0, size_t((read - blocks.rows) * stride) * sizeof(P));
    panel += (read - blocks.rows) * stride;
  }
  return args.taps;
}
template <class P>
int64_t panel_elements(const GatedConvArgs& args, int64_t rows, int64_t width) {
  return args.taps * round_up(rows, Product<P>::kRowPad) * panel_stride<P>(width);
}

// Rows of x that the blend adds, at distance `stride`: in place where they lie as the blend reads them, else gathered into panel [rows,
// c_in].
template <class T>
const T* residual_rows(T* panel, int64_t& stride, const GatedConvArgs& args, const Blocks& blocks) {
  if (blocks.count == 1 && args.x_column == 1) {
    stride = args.x_row;
    return x_rows<T>(args, args.sequences[blocks.data[0].sequence]).data + (blocks.data[0].first + args.shift) * stride;
  }
  stride = args.c_in;
  T* to = panel;
  for (int64_t i = 0; i < blocks.count; i++) {
    const Block& block = blocks.data[i];
    gather_rows(to, args.c_in, args.c_in, x_rows<T>(args, args.sequences[block.sequence]), block.first + args.shift, block.rows);
    to += block.rows * args.c_in;
  }
  return panel;
}

// What the gate logits are multiplied with: a vector of factors from as many draws. The draws of output rows lie one behind the other,
// `row` of them each, the last vector's rest included.
template <class C>
struct RandomFactors {
  typedef typename VecOf<uint16_t, kLanes<C> * 2>::type Draws;
  typedef typename VecOf<float, kLanes<C> * 4>::type Floats;

  const uint16_t* draws = nullptr;  // null: no factors
  int64_t row;
  GateRandom random;
  float threshold, scale;

  static int64_t row_draws(const GatedConvArgs& args) { return round_up(args.c_out, 8); }
  static int64_t scratch(const GatedConvArgs& args, int64_t rows) {
    return args.random == GateRandom::none ? 0 : Scratch::bytes<uint16_t>(rows * row_draws(args) + kDrawsPadding + kLanes<C>);
  }

  RandomFactors(const GatedConvArgs& args, int64_t first, int64_t rows, Scratch& memory)
      : row(row_draws(args)), random(args.random), threshold(float(args.keep_threshold)), scale(args.random_scale) {
    if (random == GateRandom::none) return;
    uint16_t* to = memory.take<uint16_t>(rows * row + kDrawsPadding + kLanes<C>);
    philox_draws(to, args.seed, uint64_t(first) * uint64_t(row / 8), rows * row / 8, 0, 0);
    draws = to;
  }
  RandomFactors() = default;

  PYKERNELS_INLINE Vec<C> at(int64_t r, int64_t column) const {
    Draws drawn;
    memcpy(&drawn, draws + r * row + column, sizeof drawn);
    const Floats u = __builtin_convertvector(drawn, Floats);  // exact, like 2 u + 1
    const Floats f =
        random == GateRandom::dropout ? (u < threshold ? Floats{} + scale : Floats{}) : scale * ((u * 2.f + 1.f) / 65536.f - 1.f);
    return random == GateRandom::dropout ? __builtin_convertvector(f, Vec<C>) : C(1) + __builtin_convertvector(f, Vec<C>);
  }
};

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
