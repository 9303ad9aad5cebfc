// Forward of gated_conv1d. The value columns and the gate columns of the same outputs share one register tile, so that the gate is applied
// while the accumulators are still in L1 and h never exists in memory.
#include "gated_conv.h"

#include "gated_conv_rows.h"
#include "kernel_table.h"
#include "weights.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

template <class P>
int64_t packed_bytes(int64_t c_out, int64_t c_in, int64_t taps) {
  const int64_t blocks = (c_out + Product<P>::kLanes - 1) / Product<P>::kLanes;
  return blocks * taps * tap_weights<P>(panel_width<P>(c_in)) * int64_t(sizeof(P));
}

// [c_out, c_in, taps] to [column block][tap][packed].
template <class T, class P>
void pack(void* packed, const void* value_weight, const void* gate_weight, int64_t c_out, int64_t c_in, int64_t taps, int64_t begin,
          int64_t end) {
  constexpr int W = Product<P>::kLanes;
  const int64_t depth = panel_width<P>(c_in), tap_size = tap_weights<P>(depth);
  for (int64_t block = begin; block < end; block++) {
    P* to = static_cast<P*>(packed) + (block - begin) * taps * tap_size;
    for (int half = 0; half < 2; half++) {
      const T* from = static_cast<const T*>(half ? gate_weight : value_weight) + block * W * c_in * taps;
      pack_outputs(to, half, from, min<int64_t>(W, c_out - block * W), c_in, taps, tap_size);
    }
    for (int64_t tap = 0; tap < taps; tap++) zero_packed_tail(to + tap * tap_size, c_in, depth);
  }
}

// ---- gate ----------------------------------------------------------------------------------------------------------------------------

// The blend of one register tile: rows of one column block. Pointers are at the tile's first row and first column.
template <class T, class C, Residual kResidual, ValueAct kAct>
struct GateTile {
  const C *value, *gate;  // accumulators, stride W
  Vec<C> value_bias, gate_bias;
  const T *value_cond, *gate_cond;
  int64_t cond_row;
  RandomFactors<C> factors;
  const T* x;
  int64_t x_row;
  T *y, *saved_value, *saved_gate;
  int64_t c_out;
  int64_t n;  // columns that exist

  PYKERNELS_INLINE void row(int64_t r) const {
    constexpr int W = kLanes<C>;
    Vec<C> c = load(value + r * W) + value_bias, z = load(gate + r * W) + gate_bias;
    if (value_cond) {
      c += load_columns(value_cond + r * cond_row, n);
      z += load_columns(gate_cond + r * cond_row, n);
    }
    if (factors.draws) z *= factors.at(r, 0);
    const Vec<C> g = sigmoid_to<T>(z), v = kAct == ValueAct::tanh ? tanh_to<T>(c) : c;
    Vec<C> out = g * v;
    if constexpr (kResidual != Residual::none) {
      const Vec<C> xr = load_columns(x + r * x_row, n);
      out = kResidual == Residual::highway ? xr + g * (v - xr) : xr + out;
    }
    store_columns(y + r * c_out, out, n);
    if (saved_value) {
      store_columns(saved_value + r * c_out, v, n);
      store_columns(saved_gate + r * c_out, g, n);
    }
  }
};

template <class T>
void zero_row(const GatedConvArgs& args, int64_t row, int64_t column, int64_t columns) {
  void* const outputs[] = {args.y, args.saved_value, args.saved_gate};
  for (void* output : outputs) {
    if (output) memset(static_cast<T*>(output) + row * args.c_out + column, 0, size_t(columns) * sizeof(T));
  }
}

// What a product with some rows of x reads, whichever its columns. Lies in memory of forward_rows_bytes, which it points into.
template <class T, class P>
struct ForwardRows {
  using C = Arithmetic<P>;
  Block first;   // the first block, without padding where it is the only one
  int64_t rows;  // of all blocks
  const Tap<P>* taps;
  int64_t ntaps;
  const T* x;  // what the blend adds
  int64_t x_row;
  const T *value_cond, *gate_cond;
  int64_t cond_row;
  RandomFactors<C> factors;
};

template <class T, class P>
int64_t forward_rows_bytes(const GatedConvArgs& args, int64_t rows) {
  using C = Arithmetic<P>;
  int64_t bytes = Scratch::bytes<ForwardRows<T, P>>(1) + Scratch::bytes<Tap<P>>(args.taps) +
                  Scratch::bytes<P>(panel_elements<P>(args, rows, panel_width<P>(args.c_in))) + Scratch::bytes<T>(rows * args.c_in);
  bytes += RandomFactors<C>::scratch(args, rows);
  if (args.value_cond && !args.cond_per_row) bytes += 2 * Scratch::bytes<T>(rows * args.c_out);
  return bytes;
}

// cond [sequences, c_out] repeated for each row.
template <class T>
const T* repeat_cond(T* to, const void* cond, const GatedConvArgs& args, const Blocks& blocks) {
  T* row = to;
  for (int64_t i = 0; i < blocks.count; i++) {
    const T* from = static_cast<const T*>(cond) + args.sequences[blocks.data[i].sequence].index * args.cond_row;
    for (int64_t r = 0; r < blocks.data[i].rows; r++, row += args.c_out) memcpy(row, from, size_t(args.c_out) * sizeof(T));
  }
  return to;
}

template <class T, class P>
void prepare_forward(const GatedConvArgs& args, const Blocks& whole, void* memory) {
  using C = Arithmetic<P>;
  const int64_t depth = panel_width<P>(args.c_in);
  Scratch scratch(memory);
  ForwardRows<T, P>& to = *scratch.take<ForwardRows<T, P>>(1);
  to = {.first = whole.data[0], .rows = whole.rows};
  // A single block is trimmed to the rows that are not padding; several short ones are computed whole.
  Blocks blocks = whole;
  if (whole.count == 1) {
    trim(to.first, args, args.sequences[to.first.sequence].live_out, args.shift);
    to.rows = to.first.rows;
    blocks = {&to.first, 1, to.rows};
  }
  if (to.rows <= 0) return;
  const Sequence& sequence = args.sequences[to.first.sequence];
  const int64_t row0 = sequence.out_row + to.first.first;
  Tap<P>* taps = scratch.take<Tap<P>>(args.taps);
  P* panel = scratch.take<P>(panel_elements<P>(args, to.rows, depth));
  to.taps = taps;
  to.ntaps = taps_of(taps, panel, args, blocks, -args.left, args.dilation, depth, [&](const Sequence& s) { return x_rows<T>(args, s); });
  if (args.residual != Residual::none) to.x = residual_rows(scratch.take<T>(to.rows * args.c_in), to.x_row, args, blocks);
  to.factors = RandomFactors<C>(args, row0, to.rows, scratch);
  if (!args.value_cond) return;
  const auto* value_cond = static_cast<const T*>(args.value_cond);
  const auto* gate_cond = static_cast<const T*>(args.gate_cond);
  if (args.cond_per_row) {
    to.value_cond = value_cond + row0 * args.cond_row;
    to.gate_cond = gate_cond + row0 * args.cond_row;
    to.cond_row = args.cond_row;
  } else if (blocks.count == 1) {  // the same row again and again: added apart from the bias, as for several sequences
    to.value_cond = value_cond + sequence.index * args.cond_row;
    to.gate_cond = gate_cond + sequence.index * args.cond_row;
  } else {
    to.value_cond = repeat_cond(scratch.take<T>(to.rows * args.c_out), args.value_cond, args, blocks);
    to.gate_cond = repeat_cond(scratch.take<T>(to.rows * args.c_out), args.gate_cond, args, blocks);
    to.cond_row = args.c_out;
  }
}

template <class T, class P, Residual kResidual, ValueAct kAct>
void forward_rows(const GatedConvArgs& args, const void* packed, const ForwardRows<T, P>& from, int64_t begin, int64_t end) {
  using C = Arithmetic<P>;
  constexpr int W = kLanes<C>;
  const int64_t depth = panel_width<P>(args.c_in);
  const int64_t row0 = args.sequences[from.first.sequence].out_row + from.first.first;
  GateTile<T, C, kResidual, kAct> all{};  // at row 0, column 0
  all.c_out = args.c_out;
  all.y = static_cast<T*>(args.y) + row0 * args.c_out;
  if (args.saved_value) {
    all.saved_value = static_cast<T*>(args.saved_value) + row0 * args.c_out;
    all.saved_gate = static_cast<T*>(args.saved_gate) + row0 * args.c_out;
  }
  all.x = from.x;
  all.x_row = from.x_row;
  all.factors = from.factors;
  all.value_cond = from.value_cond;
  all.gate_cond = from.gate_cond;
  all.cond_row = from.cond_row;

  auto make = [&](int64_t block, int64_t row, const C* acc) {
    const int64_t column = block * W, n = min<int64_t>(W, args.c_out - column);
    GateTile<T, C, kResidual, kAct> tile = all;
    tile.value = acc;
    tile.gate = acc + Product<P>::kRows * W;
    tile.n = n;
    tile.y += row * args.c_out + column;
    if (all.saved_value) {
      tile.saved_value += row * args.c_out + column;
      tile.saved_gate += row * args.c_out + column;
    }
    if (kResidual != Residual::none) tile.x += row * all.x_row + column;
    if (all.factors.draws) tile.factors.draws += row * all.factors.row + column;
    if (all.value_cond) {
      tile.value_cond += row * all.cond_row + column;
      tile.gate_cond += row * all.cond_row + column;
    }
    if (args.value_bias) tile.value_bias = load_columns(static_cast<const T*>(args.value_bias) + column, n);
    if (args.gate_bias) tile.gate_bias = load_columns(static_cast<const T*>(args.gate_bias) + column, n);
    return tile;
  };
  for_each_tile(from.taps, from.ntaps, from.rows, depth, static_cast<const P*>(packed), args.taps * tap_weights<P>(depth), begin, end,
                make);
}

template <class T, class P>
void forward(const GatedConvArgs& args, const void* packed, const Blocks& blocks, int64_t begin, int64_t end, const void* prepared) {
  using Body = void (*)(const GatedConvArgs&, const void*, const ForwardRows<T, P>&, int64_t, int64_t);
  static constexpr Body bodies[3][2] = {
      {forward_rows<T, P, Residual::highway, ValueAct::identity>, forward_rows<T, P, Residual::highway, ValueAct::tanh>},
      {forward_rows<T, P, Residual::add, ValueAct::identity>, forward_rows<T, P, Residual::add, ValueAct::tanh>},
      {forward_rows<T, P, Residual::none, ValueAct::identity>, forward_rows<T, P, Residual::none, ValueAct::tanh>}};
  const auto& rows = *static_cast<const ForwardRows<T, P>*>(prepared);
  if (rows.rows > 0) {
    Product<P>::begin();
    bodies[int(args.residual)][int(args.value_act)](args, packed, rows, begin, end);
    Product<P>::end();
  }
  const int64_t column = begin * Product<P>::kLanes, columns = min(args.c_out, end * Product<P>::kLanes) - column;
  for (int64_t i = 0; i < blocks.count; i++) {
    const Block& block = blocks.data[i];
    const Sequence& sequence = args.sequences[block.sequence];
    const int64_t live = sequence.live_out;
    for (int64_t r = block.first; r < block.first + block.rows; r++) {
      if (r >= live || (sequence.mask && !sequence.mask[r + args.shift])) zero_row<T>(args, sequence.out_row + r, column, columns);
    }
  }
}

}  // namespace

template <class T, class P>
void add_gated_conv_forward(GatedConvKernels& table) {
  table.row_tile = Product<P>::kRows;
  table.columns = Product<P>::kLanes;
  table.panel_size = sizeof(P);
  table.sum_size = sizeof(Arithmetic<P>);
  table.depth_unit = Product<P>::kDepth;
  table.packed_bytes = packed_bytes<P>;
  table.pack = pack<T, P>;
  table.forward_rows_bytes = forward_rows_bytes<T, P>;
  table.prepare_forward = prepare_forward<T, P>;
  table.forward = forward<T, P>;
}

PYKERNELS_INSTANTIATE(add_gated_conv_forward, GatedConvKernels)

}  // namespace pykernels::PYKERNELS_TIER
