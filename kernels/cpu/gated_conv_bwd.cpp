// Backward of gated_conv1d.
//
// With c = value preactivation, v = act(c), z = gate logit, g = sigmoid(f * z) (f: dropout or noise factor), and dy given:
//   highway y = x + g (v - x):   dv = dy g    dg = dy (v - x)    dx gets dy (1 - g)
//   add     y = x + g v:         dv = dy g    dg = dy v          dx gets dy
//   none    y = g v:             dv = dy g    dg = dy v
//   dc = dv act'(c), act' = 1 - v^2 for tanh;   dz = f g (1 - g) dg;   dh = [dc, dz]
// and, as h[t] = bias + cond[t] + sum_k W_k x[t + k d - left]:
//   dbias = sum_t dh[t]    dcond[t] = dh[t]    dx[j] += sum_k W_k^T dh[j + left - k d]    dW_k = sum_t dh[t] x[t + k d - left]^T
// Saved by forward: v and g. dh exists once, in panel type; the two products read it in place.
#include "gated_conv.h"
#include "gated_conv_rows.h"
#include "kernel_table.h"
#include "weights.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

// ---- dh, dcond, sums of dh -----------------------------------------------------------------------------------------------------------

template <class T, class P>
int64_t backward_gate_scratch(const GatedConvArgs& args, int64_t rows) {
  return Scratch::bytes<T>(rows * args.c_in) + RandomFactors<Arithmetic<P>>::scratch(args, rows);
}

template <class T, class P, Residual kResidual, ValueAct kAct>
void gate_rows(const GatedConvArgs& args, const Block& block, Arithmetic<P>* sums, void* memory) {
  using C = Arithmetic<P>;
  constexpr int W = kLanes<C>;
  const Sequence& sequence = args.sequences[block.sequence];
  const int64_t row0 = sequence.out_row + block.first, live = sequence.live_out, n = args.c_out;
  Scratch scratch(memory);
  int64_t x_row = 0;
  const T* x = kResidual == Residual::highway
                   ? residual_rows(scratch.take<T>(block.rows * args.c_in), x_row, args, Blocks{&block, 1, block.rows})
                   : nullptr;
  const RandomFactors<C> factors(args, row0, block.rows, scratch);
  for (int64_t r = 0; r < block.rows; r++) {
    const int64_t row = row0 + r, t = block.first + r;
    P* dh = static_cast<P*>(args.dh) + row * args.dh_row;
    T* value_dcond = args.value_dcond ? static_cast<T*>(args.value_dcond) + row * args.dcond_row : nullptr;
    T* gate_dcond = args.value_dcond ? static_cast<T*>(args.gate_dcond) + row * args.dcond_row : nullptr;
    if (t >= live || (sequence.mask && !sequence.mask[t + args.shift])) {
      memset(dh, 0, size_t(2 * args.dh_half) * sizeof(P));
      if (value_dcond) {
        memset(value_dcond, 0, size_t(n) * sizeof(T));
        memset(gate_dcond, 0, size_t(n) * sizeof(T));
      }
      continue;
    }
    const T *dy = static_cast<const T*>(args.dy) + row * n, *v_row = static_cast<const T*>(args.saved_value) + row * n,
            *g_row = static_cast<const T*>(args.saved_gate) + row * n;
    for (int64_t column = 0; column < n; column += W) {
      const int64_t columns = min<int64_t>(W, n - column);
      const Vec<C> d = load_columns(dy + column, columns), v = load_columns(v_row + column, columns),
                   g = load_columns(g_row + column, columns);
      Vec<C> dc = d * g, dg = d * v;
      if constexpr (kResidual == Residual::highway) dg = d * (v - load_columns(x + r * x_row + column, columns));
      if constexpr (kAct == ValueAct::tanh) dc *= C(1) - v * v;
      Vec<C> dz = dg * (g * (C(1) - g));
      if (factors.draws) dz *= factors.at(r, column);
      store_columns(dh + column, dc, columns);
      store_columns(dh + args.dh_half + column, dz, columns);
      store_columns(sums + column, load_columns(sums + column, columns) + dc, columns);
      store_columns(sums + n + column, load_columns(sums + n + column, columns) + dz, columns);
      if (value_dcond) {
        store_columns(value_dcond + column, dc, columns);
        store_columns(gate_dcond + column, dz, columns);
      }
    }
    memset(dh + n, 0, size_t(args.dh_half - n) * sizeof(P));
    memset(dh + args.dh_half + n, 0, size_t(args.dh_half - n) * sizeof(P));
  }
}

template <class T, class P>
void backward_gate(const GatedConvArgs& args, const Block& block, void* sums, void* scratch) {
  using Body = void (*)(const GatedConvArgs&, const Block&, Arithmetic<P>*, void*);
  static constexpr Body bodies[3][2] = {
      {gate_rows<T, P, Residual::highway, ValueAct::identity>, gate_rows<T, P, Residual::highway, ValueAct::tanh>},
      {gate_rows<T, P, Residual::add, ValueAct::identity>, gate_rows<T, P, Residual::add, ValueAct::tanh>},
      {gate_rows<T, P, Residual::none, ValueAct::identity>, gate_rows<T, P, Residual::none, ValueAct::tanh>}};
  memset(sums, 0, size_t(2 * args.c_out) * sizeof(Arithmetic<P>));
  bodies[int(args.residual)][int(args.value_act)](args, block, static_cast<Arithmetic<P>*>(sums), scratch);
}

template <class T, class P>
void reduce_sums(const GatedConvArgs& args, const void* sums, int64_t count, void* value_to, void* gate_to) {
  using C = Arithmetic<P>;
  constexpr int W = kLanes<C>;
  for (int half = 0; half < 2; half++) {
    T* to = static_cast<T*>(half ? gate_to : value_to);
    for (int64_t column = 0; column < args.c_out; column += W) {
      const C* from = static_cast<const C*>(sums) + half * args.c_out + column;
      const int64_t n = min<int64_t>(W, args.c_out - column);
      Vec<C> sum{};
      for (int64_t i = 0; i < count; i++) sum += load_columns(from + i * 2 * args.c_out, n);
      store_columns(to + column, sum, n);
    }
  }
}

// ---- dx ------------------------------------------------------------------------------------------------------------------------------

template <class P>
int64_t packed_transposed_bytes(int64_t c_out, int64_t c_in, int64_t taps) {
  return x_column_blocks<P>(c_in) * taps * tap_weights<P>(2 * panel_width<P>(c_out)) * int64_t(sizeof(P));
}

// The columns are now those of x, two vectors of them side by side; the inner dimension is [value outputs, gate outputs] like dh.
template <class T, class P>
void pack_transposed(void* packed, const void* value_weight, const void* gate_weight, int64_t c_out, int64_t c_in, int64_t taps,
                     int64_t begin, int64_t end) {
  const int64_t half_depth = panel_width<P>(c_out), depth = 2 * half_depth;
  const Interleaved<Arithmetic<P>> of_taps(taps);
  for (int64_t block = begin; block < end; block++) {
    P* to = static_cast<P*>(packed) + (block - begin) * taps * tap_weights<P>(depth);
    pack_inputs<T>(to, block, depth, c_in, taps, of_taps, [&](int64_t e) {
      const int64_t output = e % half_depth;
      return output < c_out ? static_cast<const T*>(e < half_depth ? value_weight : gate_weight) + output * c_in * taps : nullptr;
    });
  }
}

// dx of one register tile: the product plus what the blend lets through.
template <class T, class C, Residual kResidual>
struct InputTile {
  const C* acc;
  int64_t half_stride;  // between the accumulators of the two vectors
  const T *dy, *gate;   // at x row `row`, column 0; rows [first_out, end_out) exist
  int64_t first_out, end_out;
  T* dx;
  int64_t c_in, c_out, column;

  PYKERNELS_INLINE void row(int64_t r) const {
    constexpr int W = kLanes<C>;
    for (int half = 0; half < 2; half++) {
      const int64_t at = column + half * W, n = min<int64_t>(W, c_in - at);
      if (n <= 0) return;
      Vec<C> out = load(acc + half * half_stride + r * W);
      if (kResidual != Residual::none && r >= first_out && r < end_out) {
        Vec<C> through = load_columns(dy + r * c_out + at, n);
        if constexpr (kResidual == Residual::highway) through *= C(1) - load_columns(gate + r * c_out + at, n);
        out += through;
      }
      store_columns(dx + r * c_in + at, out, n);
    }
  }
};

// What a product with some rows of dh reads, as ForwardRows does of x.
template <class P>
struct InputRows {
  Block first;
  int64_t rows;
  const Tap<P>* taps;
  int64_t ntaps;
};

template <class P>
int64_t backward_input_bytes(const GatedConvArgs& args, int64_t rows) {
  return Scratch::bytes<InputRows<P>>(1) + Scratch::bytes<Tap<P>>(args.taps) +
         Scratch::bytes<P>(panel_elements<P>(args, rows, 2 * args.dh_half));
}

template <class P>
void prepare_backward_input(const GatedConvArgs& args, const Blocks& whole, void* memory) {
  const int64_t depth = 2 * args.dh_half;
  Scratch scratch(memory);
  InputRows<P>& to = *scratch.take<InputRows<P>>(1);
  to = {.first = whole.data[0], .rows = whole.rows};
  Blocks blocks = whole;
  if (whole.count == 1) {
    trim(to.first, args, args.sequences[to.first.sequence].live, 0);
    to.rows = to.first.rows;
    blocks = {&to.first, 1, to.rows};
  }
  if (to.rows <= 0) return;
  Tap<P>* taps = scratch.take<Tap<P>>(args.taps);
  P* panel = scratch.take<P>(panel_elements<P>(args, to.rows, depth));
  to.taps = taps;
  to.ntaps = taps_of(taps, panel, args, blocks, args.left, -args.dilation, depth, [&](const Sequence& s) {
    return Rows<P>{static_cast<const P*>(args.dh) + s.out_row * args.dh_row, args.dh_row, 1, depth, s.live_out, nullptr};
  });
}

// One block of x rows of one sequence, or several whole sequences whose taps are gathered.
template <class T, class P, Residual kResidual>
void input_rows(const GatedConvArgs& args, const void* packed, const Blocks& blocks, const InputRows<P>& from, int64_t begin, int64_t end) {
  using C = Arithmetic<P>;
  const int64_t depth = 2 * args.dh_half;
  const Sequence& sequence = args.sequences[from.first.sequence];
  const int64_t first = from.first.first, in_row = sequence.in_row + first;
  // Several sequences share their numbering of x and output rows: shift is zero there.
  const int64_t out_row = sequence.out_row + first - args.shift;
  const int64_t first_out = args.shift - first;
  const int64_t end_out = blocks.count == 1 ? first_out + sequence.live_out : from.rows;
  auto make = [&](int64_t block, int64_t row, const C* acc) {
    return InputTile<T, C, kResidual>{acc,
                                      Product<P>::kRows * Product<P>::kLanes,
                                      static_cast<const T*>(args.dy) + (out_row + row) * args.c_out,
                                      static_cast<const T*>(args.saved_gate) + (out_row + row) * args.c_out,
                                      first_out - row,
                                      end_out - row,
                                      static_cast<T*>(args.dx) + (in_row + row) * args.c_in,
                                      args.c_in,
                                      args.c_out,
                                      block * kBlockColumns<P>};
  };
  for_each_tile(from.taps, from.ntaps, from.rows, depth, static_cast<const P*>(packed), args.taps * tap_weights<P>(depth), begin, end,
                make);
}

template <class T, class P>
void backward_input(const GatedConvArgs& args, const void* packed, const Blocks& blocks, int64_t begin, int64_t end, const void* prepared) {
  using Body = void (*)(const GatedConvArgs&, const void*, const Blocks&, const InputRows<P>&, int64_t, int64_t);
  static constexpr Body bodies[3] = {input_rows<T, P, Residual::highway>, input_rows<T, P, Residual::add>,
                                     input_rows<T, P, Residual::none>};
  const auto& rows = *static_cast<const InputRows<P>*>(prepared);
  if (rows.rows > 0) {
    Product<P>::begin();
    bodies[int(args.residual)](args, packed, blocks, rows, begin, end);
    Product<P>::end();
  }
  const int64_t column = begin * kBlockColumns<P>, columns = min(args.c_in, end * kBlockColumns<P>) - column;
  for (int64_t i = 0; i < blocks.count; i++) {
    const Block& block = blocks.data[i];
    const Sequence& sequence = args.sequences[block.sequence];
    for (int64_t r = block.first; r < block.first + block.rows; r++) {
      if (r < sequence.live && (!sequence.mask || sequence.mask[r])) continue;
      memset(static_cast<T*>(args.dx) + (sequence.in_row + r) * args.c_in + column, 0, size_t(columns) * sizeof(T));
    }
  }
}

}  // namespace

template <class T, class P>
void add_gated_conv_backward(GatedConvKernels& table) {
  table.backward_gate_scratch = backward_gate_scratch<T, P>;
  table.backward_gate = backward_gate<T, P>;
  table.reduce_sums = reduce_sums<T, P>;
  table.packed_transposed_bytes = packed_transposed_bytes<P>;
  table.pack_transposed = pack_transposed<T, P>;
  table.backward_input_bytes = backward_input_bytes<P>;
  table.prepare_backward_input = prepare_backward_input<P>;
  table.backward_input = backward_input<T, P>;
}

PYKERNELS_INSTANTIATE(add_gated_conv_backward, GatedConvKernels)

}  // namespace pykernels::PYKERNELS_TIER
