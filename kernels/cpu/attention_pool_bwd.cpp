// Backward of attention_pool.
//
// With c = W x + bias, A = act(c), g = sigmoid(V x + gate_bias) (1 without a gate), u = A g, s_j = q_j . u, a_j = softmax of s_j over the
// live rows, out_j = sum_l a_jl x_l, and given dout_j and the gradient of the returned scores (of s or of a):
//   da_jl = dout_j . x_l (+ the gradient of a_jl)
//   ds_jl = a_jl (da_jl - delta_j) (+ the gradient of s_jl),   delta_j = sum_l a_jl da_jl = dout_j . out_j (+ sum_l a_jl gradient of a_jl)
//   du_l  = sum_j ds_jl q_j              dq_j = sum_l ds_jl u_l
//   dc_l  = du_l g act'(c)               dz_l = du_l A g (1 - g)            dh = [dc, dz]
//   dbias = sum_l dc_l                   dgate_bias = sum_l dz_l            dW = sum_l dc_l x_l^T     dV = sum_l dz_l x_l^T
//   dx_l  = sum_j a_jl dout_j + W^T dc_l + V^T dz_l
// Saved by forward: s, its largest value and the sum of e^(s - largest), and out. c and V x + gate_bias are computed again, or were kept
// too; dh exists for some units of work at a time.
#include "attention_pool.h"
#include "attention_pool_rows.h"
#include "kernel_table.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

// dout . x, in C.
template <class C, class A, class B>
PYKERNELS_INLINE C dot(const A* a, const B* b, int64_t n) {
  constexpr int W = kLanes<C>;
  Vec<C> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int k = 0; k < 4; k++) sum[k] += load(a + i + k * W) * load(b + i + k * W);
  }
  for (; i < n; i += W) sum[0] += load_columns(a + i, n - i) * load_columns(b + i, n - i);
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T, class C>
void backward_delta(const AttentionPoolArgs& args, int64_t index) {
  constexpr int W = kLanes<C>;
  const Sequence& sequence = args.sequences[index];
  for (int64_t j = 0; j < args.heads; j++) {
    const int64_t row = sequence.index * args.heads + j;
    C delta = 0;
    if (args.dout)
      delta =
          dot<C>(static_cast<const T*>(args.dout) + row * args.width, static_cast<const C*>(args.pooled) + row * args.width, args.width);
    if (args.dscores && args.softmax_returned) {
      const C *s = score_rows<const C>(args.scores, args, sequence, j),
              *ds = score_rows<const C>(const_cast<void*>(args.dscores), args, sequence, j);
      Vec<C> sum{};
      for (int64_t r = 0; r < sequence.live; r += W) {
        const int64_t n = min<int64_t>(W, sequence.live - r);
        Vec<C> term = weights_of<C>(load_columns(s + r, n), args, sequence, j) * load_columns(ds + r, n);
        for (int64_t i = 0; i < W; i++) {
          if (i >= n || (sequence.mask && !sequence.mask[r + i])) term[i] = 0;
        }
        sum += term;
      }
      delta += sum_lanes(sum);
    }
    static_cast<C*>(args.delta)[row] = delta;
  }
}

// ---- packed weights with their roles exchanged ---------------------------------------------------------------------------------------

template <class P>
int64_t packed_transposed_bytes(const AttentionPoolArgs& args) {
  return tap_weights<P>(halves(args) * args.dh_half) * int64_t(sizeof(P));
}

template <class T, class P>
void pack_transposed(const AttentionPoolArgs& args, void* packed, const void* weight, const void* gate_weight, int64_t begin, int64_t end) {
  const int64_t depth = halves(args) * args.dh_half;
  const Interleaved<Arithmetic<P>> of_taps(1);
  for (int64_t block = begin; block < end; block++) {
    P* to = static_cast<P*>(packed) + (block - begin) * tap_weights<P>(depth);
    pack_inputs<T>(to, block, depth, args.width, 1, of_taps, [&](int64_t e) -> const T* {
      const int64_t unit = e % args.dh_half;
      if (unit >= args.hidden) return nullptr;
      return static_cast<const T*>(e < args.dh_half ? weight : gate_weight) + unit * args.width;
    });
  }
}

template <class P>
int64_t input_column_blocks(const AttentionPoolArgs& args) {
  return x_column_blocks<P>(args.width);
}

// ---- dh, sums of it, dx --------------------------------------------------------------------------------------------------------------

// Sums over rows: dbias, dgate_bias, then dquery, each padded as the parameters are.
template <class P>
int64_t sum_elements(const AttentionPoolArgs& args) {
  return (2 + args.heads) * padded_hidden<P>(args);
}

// a and ds of all live rows, [heads, rows] each.
template <class T, class C>
void score_gradients(const AttentionPoolArgs& args, const Blocks& chunks, const LiveRows<T>& live, C* a, C* ds, int64_t stride) {
  constexpr int W = kLanes<C>;
  for (int64_t i = 0, begin = 0; i < chunks.count; begin = live.ends[i++]) {
    const Sequence& sequence = args.sequences[chunks.data[i].sequence];
    for (int64_t j = 0; j < args.heads; j++) {
      const C* s = score_rows<const C>(args.scores, args, sequence, j);
      const C* returned = args.dscores ? score_rows<const C>(const_cast<void*>(args.dscores), args, sequence, j) : nullptr;
      const int64_t row = sequence.index * args.heads + j;
      const T* dout = args.dout ? static_cast<const T*>(args.dout) + row * args.width : nullptr;
      const C delta = static_cast<const C*>(args.delta)[row];
      C *to_a = a + j * stride, *to_ds = ds + j * stride;
      for (int64_t r = begin; r < live.ends[i]; r++) {
        to_a[r] = s[live.positions[r]];
        to_ds[r] = dout ? dot<C>(dout, live.rows[r], args.width) : C(0);
        if (returned && args.softmax_returned) to_ds[r] += returned[live.positions[r]];
      }
      for (int64_t r = begin; r < live.ends[i]; r += W) {
        const int64_t n = min<int64_t>(W, live.ends[i] - r);
        const Vec<C> weight = weights_of<C>(load_columns(to_a + r, n), args, sequence, j);
        store_columns(to_ds + r, weight * (load_columns(to_ds + r, n) - delta), n);
        store_columns(to_a + r, weight, n);
      }
      for (int64_t r = begin; r < live.ends[i] && returned && !args.softmax_returned; r++) to_ds[r] += returned[live.positions[r]];
    }
  }
}

// dh of one register tile: rows of one column block. Pointers are at the block's first unit, rows and sums included. The preactivations
// come from the product's accumulators, or from what forward kept.
template <class T, class P, PoolAct kAct, bool kGated>
struct GradientTile {
  using C = Arithmetic<P>;
  const C* acc;
  int64_t half_stride;
  Vec<C> bias[2];
  T* const* kept;  // at the tile's first row, or null
  int64_t unit, hidden;
  const C* query;
  int64_t padded, heads;
  const C* ds;  // at the tile's first row
  int64_t ds_stride;
  P* dh;  // at the tile's first row
  int64_t dh_row, dh_half;
  C *dbias, *dgate_bias, *dquery;
  int64_t n;  // units that exist, of the first vector

  static PYKERNELS_INLINE void add(C* to, Vec<C> v) { store(to, load(to) + v); }

  PYKERNELS_INLINE void row(int64_t r) const {
    constexpr int W = kLanes<C>;
    Vec<C> h0, h1;
    if (kept) {
      h0 = load_columns(kept[r] + unit, n);
      h1 = kGated ? load_columns(kept[r] + hidden + unit, n) : n > W ? load_columns(kept[r] + unit + W, n - W) : Vec<C>{};
    } else {
      h0 = load(acc + r * W) + bias[0];
      h1 = load(acc + half_stride + r * W) + bias[1];
    }
    const Activated<Vec<C>> a0 = activate<T, kAct>(h0);
    const Activated<Vec<C>> a1 = kGated ? Activated<Vec<C>>{sigmoid_to<T>(h1), {}} : activate<T, kAct>(h1);
    const Vec<C> u0 = kGated ? a0.value * a1.value : a0.value;
    Vec<C> du0{}, du1{};
    for (int64_t j = 0; j < heads; j++) {
      const C d = ds[j * ds_stride + r];
      du0 += d * load(query + j * padded);
      add(dquery + j * padded, d * u0);
      if constexpr (!kGated) {
        du1 += d * load(query + j * padded + W);
        add(dquery + j * padded + W, d * a1.value);
      }
    }
    P* to = dh + r * dh_row;
    if constexpr (kGated) {
      const Vec<C> dc = du0 * a1.value * a0.slope, dz = du0 * u0 * (C(1) - a1.value);
      store_columns(to, dc, n);
      store_columns(to + dh_half, dz, n);
      add(dbias, dc);
      add(dgate_bias, dz);
    } else {
      const Vec<C> dc0 = du0 * a0.slope, dc1 = du1 * a1.slope;
      store_columns(to, dc0, n);
      if (n > W) store_columns(to + W, dc1, n - W);
      add(dbias, dc0);
      add(dbias + W, dc1);
    }
  }
};

template <class T, class P, PoolAct kAct, bool kGated>
void gradient_rows(const AttentionPoolArgs& args, const void* packed, const Tap<P>& x, int64_t rows, const Parameters<T, P>& parameters,
                   T* const* kept, const Arithmetic<P>* ds, int64_t ds_stride, P* dh, Arithmetic<P>* sums) {
  using C = Arithmetic<P>;
  constexpr int W = kLanes<C>;
  const int64_t depth = panel_width<P>(args.width), padded = padded_hidden<P>(args);
  auto make = [&](int64_t block, int64_t row, const C* acc) {
    const int64_t unit = block * block_units<P>(args);
    GradientTile<T, P, kAct, kGated> tile{};
    tile.acc = acc;
    tile.half_stride = Product<P>::kRows * W;
    tile.bias[0] = load(parameters.bias + unit);
    tile.bias[1] = load(kGated ? parameters.gate_bias + unit : parameters.bias + unit + W);
    tile.kept = kept ? kept + row : nullptr;
    tile.unit = unit;
    tile.hidden = args.hidden;
    tile.query = parameters.query + unit;
    tile.padded = padded;
    tile.heads = args.heads;
    tile.ds = ds + row;
    tile.ds_stride = ds_stride;
    tile.dh = dh + row * args.dh_row + unit;
    tile.dh_row = args.dh_row;
    tile.dh_half = args.dh_half;
    tile.dbias = sums + unit;
    tile.dgate_bias = sums + padded + unit;
    tile.dquery = sums + 2 * padded + unit;
    tile.n = args.hidden - unit;
    return tile;
  };
  if (!kept) {
    for_each_tile(&x, 1, rows, depth, static_cast<const P*>(packed), tap_weights<P>(depth), 0, column_blocks<P>(args), make);
    return;
  }
  for (int64_t block = 0; block < column_blocks<P>(args); block++) {
    const auto all = make(block, 0, nullptr);
    for (int64_t r = 0; r < rows; r++) all.row(r);
  }
}

// dx of one register tile: the product, and what the weighted sum passes back.
template <class T, class C>
struct PooledInputTile {
  const C* acc;
  int64_t half_stride;
  const C* a;  // at the tile's first row
  int64_t a_stride, heads;
  const T* const* dout;  // [heads, width] of each row's sequence, or null
  T* const* dx;          // of each row
  int64_t width, column;

  PYKERNELS_INLINE void row(int64_t r) const {
    constexpr int W = kLanes<C>;
    for (int half = 0; half < 2; half++) {
      const int64_t at = column + half * W, n = width - at;
      if (n <= 0) return;
      Vec<C> out = load(acc + half * half_stride + r * W);
      for (int64_t j = 0; j < heads && dout; j++) out += a[j * a_stride + r] * load_columns(dout[r] + j * width + at, n);
      store_columns(dx[r] + at, out, n);
    }
  }
};

template <class T, class P>
int64_t backward_scratch(const AttentionPoolArgs& args, int64_t rows, int64_t chunks) {
  using C = Arithmetic<P>;
  return LiveRows<T>::bytes(args, rows, chunks) + Parameters<T, P>::bytes(args) + Scratch::bytes<P>(operand_elements<P>(args, rows)) +
         2 * Scratch::bytes<C>(args.heads * rows) + 2 * Scratch::bytes<T*>(rows);
}

template <class T, class P, PoolAct kAct, bool kGated>
void backward_unit(const AttentionPoolArgs& args, const void* packed, const void* packed_transposed, const Blocks& chunks, void* dh_memory,
                   void* sums, void* memory) {
  using C = Arithmetic<P>;
  Scratch scratch(memory);
  LiveRows<T> live(scratch, args, chunks);
  const Parameters<T, P> parameters(scratch, args);
  Tap<P> x{};
  if (!live.kept) x = operand(scratch.take<P>(operand_elements<P>(args, chunks.rows)), live, args, chunks);
  C *a = scratch.take<C>(args.heads * chunks.rows), *ds = scratch.take<C>(args.heads * chunks.rows);
  const T** dout = scratch.take<const T*>(chunks.rows);
  T** dx = scratch.take<T*>(chunks.rows);
  P* dh = static_cast<P*>(dh_memory);
  score_gradients(args, chunks, live, a, ds, chunks.rows);
  memset(sums, 0, size_t(sum_elements<P>(args)) * sizeof(C));
  const int64_t depth = halves(args) * args.dh_half, tail = args.dh_half - args.hidden;
  for (int64_t r = 0; r < live.count && tail > 0; r++) {
    for (int64_t half = 1; half <= halves(args); half++)
      memset(dh + r * args.dh_row + half * args.dh_half - tail, 0, size_t(tail) * sizeof(P));
  }
  for (int64_t r = live.count; r < round_up(live.count, Product<P>::kRowPad); r++)
    memset(dh + r * args.dh_row, 0, size_t(depth) * sizeof(P));
  Product<P>::begin();
  gradient_rows<T, P, kAct, kGated>(args, packed, x, live.count, parameters, live.kept, ds, chunks.rows, dh, static_cast<C*>(sums));
  if (args.dx) {
    for (int64_t i = 0, r = 0; i < chunks.count; i++) {
      const Sequence& sequence = args.sequences[chunks.data[i].sequence];
      for (; r < live.ends[i]; r++) {
        dout[r] = args.dout ? static_cast<const T*>(args.dout) + sequence.index * args.heads * args.width : nullptr;
        dx[r] = static_cast<T*>(args.dx) + (sequence.in_row + live.positions[r]) * args.width;
      }
    }
    const Tap<P> all{dh, args.dh_row, 0};
    auto make = [&](int64_t block, int64_t row, const C* acc) {
      return PooledInputTile<T, C>{acc,
                                   Product<P>::kRows * Product<P>::kLanes,
                                   a + row,
                                   chunks.rows,
                                   args.heads,
                                   args.dout ? dout + row : nullptr,
                                   dx + row,
                                   args.width,
                                   block * kBlockColumns<P>};
    };
    for_each_tile(&all, 1, live.count, depth, static_cast<const P*>(packed_transposed), tap_weights<P>(depth), 0,
                  x_column_blocks<P>(args.width), make);
  }
  Product<P>::end();
}

template <class T, class P>
void backward_rows(const AttentionPoolArgs& args, const void* packed, const void* packed_transposed, const Blocks& chunks, void* dh,
                   void* sums, void* scratch) {
  using Body = void (*)(const AttentionPoolArgs&, const void*, const void*, const Blocks&, void*, void*, void*);
  static constexpr Body bodies[4][2] = {{backward_unit<T, P, PoolAct::tanh, false>, backward_unit<T, P, PoolAct::tanh, true>},
                                        {backward_unit<T, P, PoolAct::swish, false>, backward_unit<T, P, PoolAct::swish, true>},
                                        {backward_unit<T, P, PoolAct::relu, false>, backward_unit<T, P, PoolAct::relu, true>},
                                        {backward_unit<T, P, PoolAct::gelu, false>, backward_unit<T, P, PoolAct::gelu, true>}};
  bodies[int(args.act)][args.gated](args, packed, packed_transposed, chunks, dh, sums, scratch);
}

template <class T, class P>
void reduce_sums(const AttentionPoolArgs& args, const void* sums, int64_t count, void* dbias, void* dgate_bias, void* dquery) {
  using C = Arithmetic<P>;
  constexpr int W = kLanes<C>;
  const int64_t elements = sum_elements<P>(args), padded = padded_hidden<P>(args);
  for (int64_t row = 0; row < 2 + args.heads; row++) {
    T* to = static_cast<T*>(row == 0 ? dbias : row == 1 ? dgate_bias : dquery);
    if (!to) continue;
    if (row > 1) to += (row - 2) * args.hidden;
    for (int64_t unit = 0; unit < args.hidden; unit += W) {
      const C* from = static_cast<const C*>(sums) + row * padded + unit;
      Vec<C> sum{};
      for (int64_t i = 0; i < count; i++) sum += load(from + i * elements);
      store_columns(to + unit, sum, args.hidden - unit);
    }
  }
}

// ---- dW ------------------------------------------------------------------------------------------------------------------------------

template <class P>
int64_t partial_elements(const AttentionPoolArgs& args) {
  return x_column_blocks<P>(args.width) * halves(args) * args.dh_half * kBlockColumns<P>;
}

template <class T, class P>
int64_t backward_weight_scratch(const AttentionPoolArgs& args, int64_t rows, int64_t chunks) {
  const int64_t depth = panel_width<P>(rows);
  return LiveRows<T>::bytes(args, rows, chunks) + Scratch::bytes<P>(halves(args) * args.dh_half * transposed_stride<P>(depth)) +
         Scratch::bytes<P>(tap_weights<P>(depth));
}

template <class T, class P>
void backward_weight(const AttentionPoolArgs& args, const Blocks& chunks, const void* dh, void* partial, bool add, int64_t begin,
                     int64_t end, void* memory) {
  Scratch scratch(memory);
  const LiveRows<T> live(scratch, args, chunks);
  const int64_t outputs = halves(args) * args.dh_half, depth = panel_width<P>(live.count), stride = transposed_stride<P>(depth);
  P* transposed = scratch.take<P>(outputs * stride);
  P* x = scratch.take<P>(tap_weights<P>(depth));
  transpose_dh(transposed, stride, 0, static_cast<const P*>(dh), args.dh_row, live.count, outputs);
  zero_dh_tail(transposed, stride, live.count, depth, outputs);
  Product<P>::begin();
  for (int64_t block = begin; block < end; block++) {
    pack_rows(x, 0, live.count, block * kBlockColumns<P>, args.width, [&](int64_t r) { return live.rows[r]; });
    zero_packed_tail(x, live.count, depth);
    weight_product(transposed, stride, outputs, depth, static_cast<const P*>(x),
                   static_cast<Arithmetic<P>*>(partial) + block * outputs * kBlockColumns<P>, add);
  }
  Product<P>::end();
}

template <class T, class P>
void reduce_weight(const AttentionPoolArgs& args, const void* partials, int64_t count, void* dweight, void* dgate_weight, int64_t begin,
                   int64_t end) {
  using C = Arithmetic<P>;
  constexpr int W = kLanes<C>;
  const int64_t elements = partial_elements<P>(args), outputs = halves(args) * args.dh_half;
  for (int64_t row = begin; row < end; row++) {
    const bool is_gate = row >= args.hidden;
    const int64_t unit = is_gate ? row - args.hidden : row, dh_unit = is_gate ? args.dh_half + unit : unit;
    T* to = static_cast<T*>(is_gate ? dgate_weight : dweight);
    if (!to) continue;
    to += unit * args.width;
    for (int64_t column = 0; column < args.width; column += W) {
      const C* from =
          static_cast<const C*>(partials) + (column / kBlockColumns<P> * outputs + dh_unit) * kBlockColumns<P> + column % kBlockColumns<P>;
      Vec<C> sum = load(from);
      for (int64_t p = 1; p < count; p++) sum += load(from + p * elements);
      store_columns(to + column, sum, args.width - column);
    }
  }
}

}  // namespace

template <class T, class P>
void add_attention_pool_backward(AttentionPoolKernels& table) {
  table.backward_delta = backward_delta<T, Arithmetic<P>>;
  table.input_column_blocks = input_column_blocks<P>;
  table.packed_transposed_bytes = packed_transposed_bytes<P>;
  table.pack_transposed = pack_transposed<T, P>;
  table.sum_elements = sum_elements<P>;
  table.backward_scratch = backward_scratch<T, P>;
  table.backward_rows = backward_rows<T, P>;
  table.reduce_sums = reduce_sums<T, P>;
  table.partial_elements = partial_elements<P>;
  table.backward_weight_scratch = backward_weight_scratch<T, P>;
  table.backward_weight = backward_weight<T, P>;
  table.reduce_weight = reduce_weight<T, P>;
}

PYKERNELS_INSTANTIATE(add_attention_pool_backward, AttentionPoolKernels)

}  // namespace pykernels::PYKERNELS_TIER
