// What forward and backward of attention_pool share: the live rows of some chunks, as pointers and as the A of a product.
#pragma once

#include "activation.h"
#include "attention_pool.h"
#include "scratch.h"
#include "weights.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

PYKERNELS_INLINE int64_t halves(const AttentionPoolArgs& args) { return args.gated ? 2 : 1; }

// Hidden units of one column block, and of all of them: parameters are padded with zeros to these.
template <class P>
PYKERNELS_INLINE int64_t block_units(const AttentionPoolArgs& args) {
  return Product<P>::kLanes * (args.gated ? 1 : 2);
}
template <class P>
int64_t column_blocks(const AttentionPoolArgs& args) {
  return (args.hidden + block_units<P>(args) - 1) / block_units<P>(args);
}
template <class P>
int64_t padded_hidden(const AttentionPoolArgs& args) {
  return column_blocks<P>(args) * block_units<P>(args);
}

// The live rows of some chunks, one after the other.
template <class T>
struct LiveRows {
  const T** rows;      // width elements each
  int64_t* positions;  // in their sequence
  int64_t* ends;       // of each chunk, counted in live rows
  T** kept;            // their rows of args.kept, or null
  T* panel;            // for x whose rows are not contiguous
  int64_t count = 0;

  LiveRows(Scratch& scratch, const AttentionPoolArgs& args, const Blocks& chunks)
      : rows(scratch.take<const T*>(chunks.rows)),
        positions(scratch.take<int64_t>(chunks.rows)),
        ends(scratch.take<int64_t>(chunks.count)),
        kept(args.kept ? scratch.take<T*>(chunks.rows) : nullptr),
        panel(args.x_column == 1 ? nullptr : scratch.take<T>(chunks.rows * args.width)) {
    T* next = panel;
    for (int64_t i = 0; i < chunks.count; i++) {
      const Block& chunk = chunks.data[i];
      const Sequence& sequence = args.sequences[chunk.sequence];
      const T* first = static_cast<const T*>(sequence.x) + chunk.first * args.x_row;
      int64_t stride = args.x_row;
      if (panel) {
        gather_rows(next, args.width, args.width, Rows<T>{first, args.x_row, args.x_column, args.width, chunk.rows, nullptr}, 0,
                    chunk.rows);
        first = next;
        stride = args.width;
        next += chunk.rows * args.width;
      }
      for (int64_t r = 0; r < chunk.rows; r++) {
        if (sequence.mask && !sequence.mask[chunk.first + r]) continue;
        rows[count] = first + r * stride;
        if (kept) kept[count] = static_cast<T*>(args.kept) + (sequence.in_row + chunk.first + r) * halves(args) * args.hidden;
        positions[count++] = chunk.first + r;
      }
      ends[i] = count;
    }
  }

  static int64_t bytes(const AttentionPoolArgs& args, int64_t rows, int64_t chunks) {
    return Scratch::bytes<const T*>(rows) + Scratch::bytes<int64_t>(rows) + Scratch::bytes<int64_t>(chunks) +
           Scratch::bytes<T*>(args.kept ? rows : 0) + Scratch::bytes<T>(args.x_column == 1 ? 0 : rows * args.width);
  }
};

template <class P>
int64_t operand_elements(const AttentionPoolArgs& args, int64_t rows) {
  return round_up(rows, Product<P>::kRowPad) * panel_stride<P>(panel_width<P>(args.width));
}

// The rows as the A of a product: in place where they are equally far apart, else in `panel`. Rows that a tile reads beyond the last one
// exist in x, or in the panel; what they hold goes nowhere.
template <class P, class T>
Tap<P> operand(P* panel, LiveRows<T>& live, const AttentionPoolArgs& args, const Blocks& chunks) {
  const int64_t width = panel_width<P>(args.width), read = round_up(live.count, Product<P>::kRowPad);
  if constexpr (__is_same(T, P)) {
    const int64_t step = live.count > 1 ? live.rows[1] - live.rows[0] : args.width;
    bool in_place = args.width == width && !rows_collide<P>(step);
    for (int64_t r = 2; r < live.count && in_place; r++) in_place = live.rows[r] - live.rows[r - 1] == step;
    if (read > live.count && in_place) {
      const Sequence& last = args.sequences[chunks.data[chunks.count - 1].sequence];
      in_place = !live.panel && step == args.x_row && live.positions[live.count - 1] + read - live.count < last.in_rows;
    }
    if (in_place) return {live.rows[0], step, 0};
  }
  const int64_t stride = panel_stride<P>(width);
  for (int64_t r = 0; r < live.count && args.width > 0; r++) {
    convert_row(panel + r * stride, live.rows[r], args.width, width);
    if constexpr (__is_same(T, P)) live.rows[r] = panel + r * stride;  // the copy is in the cache
  }
  memset(panel + live.count * stride, 0, size_t((read - live.count) * stride) * sizeof(P));
  return {panel, stride, 0};
}

// bias, gate_bias and query in the arithmetic type, zeros behind the hidden units that exist: these add nothing to any sum.
template <class T, class P>
struct Parameters {
  using C = Arithmetic<P>;
  const C *bias, *gate_bias, *query;  // [padded_hidden], likewise, [heads, padded_hidden]

  Parameters(Scratch& scratch, const AttentionPoolArgs& args) {
    const int64_t padded = padded_hidden<P>(args);
    const auto padded_copy = [&](const void* from, int64_t rows) {
      C* to = scratch.take<C>(rows * padded);
      for (int64_t r = 0; r < rows; r++) {
        if (from)
          convert_row(to + r * padded, static_cast<const T*>(from) + r * args.hidden, args.hidden, padded);
        else
          memset(to, 0, size_t(padded) * sizeof(C));
      }
      return to;
    };
    bias = padded_copy(args.bias, 1);
    gate_bias = padded_copy(args.gate_bias, 1);
    query = padded_copy(args.query, args.heads);
  }

  static int64_t bytes(const AttentionPoolArgs& args) { return (2 + args.heads) * padded_hidden<P>(args) * int64_t(sizeof(C)) + 3 * 64; }
};

template <class C>
PYKERNELS_INLINE C* score_rows(void* scores, const AttentionPoolArgs& args, const Sequence& sequence, int64_t head) {
  return static_cast<C*>(scores) + sequence.in_row * args.score_row + head * args.score_head;
}

// v with zeros from lane n on.
template <class V>
PYKERNELS_INLINE V first_lanes(V v, int64_t n) {
  using C = decltype(v[0] + v[0]);
  typename ShuffleIndex<V>::type lane;
  for (int i = 0; i < kLanes<C>; i++) lane[i] = i;
  const auto end = decltype(lane[0] + 0)(n < 0 ? 0 : n < kLanes<C> ? n : kLanes<C>);
  return lane < end ? v : V{};
}

// e^x for the weights of a softmax: zero where e^x leaves the range of exp.
PYKERNELS_INLINE vfloat weight_exp(vfloat x) { return x < -87.3f ? vfloat{} : exp(x); }
PYKERNELS_INLINE Vec<double> weight_exp(Vec<double> x) { return exp(x); }

template <class C>
PYKERNELS_INLINE C weight_exp(C x) {
  return weight_exp(broadcast(x))[0];
}

// a of rows with these scores. The logarithm of the sum would be one number instead of two, but its rounding is one of the exponent.
template <class C>
PYKERNELS_INLINE Vec<C> weights_of(Vec<C> scores, const AttentionPoolArgs& args, const Sequence& sequence, int64_t head) {
  const C* max_sum = static_cast<const C*>(args.max_sum) + 2 * (sequence.index * args.heads + head);
  return weight_exp(scores - max_sum[0]) / max_sum[1];
}

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
