// Forward of attention_pool. A score is finished in the epilogue of the product, so that u never exists in memory; the rows are then summed
// with their weights while they are still in the cache.
#include "attention_pool.h"

#include "attention_pool_rows.h"
#include "kernel_table.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

template <class P>
int64_t packed_bytes(const AttentionPoolArgs& args) {
  return tap_weights<P>(panel_width<P>(args.width)) * int64_t(sizeof(P));
}

template <class T, class P>
void pack(const AttentionPoolArgs& args, void* packed, const void* weight, const void* gate_weight, int64_t begin, int64_t end) {
  constexpr int W = Product<P>::kLanes;
  const int64_t depth = panel_width<P>(args.width), units = block_units<P>(args);
  for (int64_t block = begin; block < end; block++) {
    P* to = static_cast<P*>(packed) + (block - begin) * tap_weights<P>(depth);
    for (int half = 0; half < 2; half++) {
      const int64_t first = block * units + (args.gated ? 0 : half * W);
      const T* from = static_cast<const T*>(args.gated && half ? gate_weight : weight) + first * args.width;
      pack_outputs(to, half, from, max<int64_t>(0, min<int64_t>(W, args.hidden - first)), args.width, 1, 0);
    }
    zero_packed_tail(to, args.width, depth);
  }
}

// ---- scores --------------------------------------------------------------------------------------------------------------------------

// One register tile: rows of one column block. Scores are kept as vectors until all hidden units are in them.
template <class T, class C, PoolAct kAct, bool kGated>
struct ScoreTile {
  const C* acc;  // two vectors a row, half_stride apart
  int64_t half_stride;
  Vec<C> bias[2];
  const C* query;  // at the block's first unit
  int64_t query_stride, heads;
  C* sums;  // at the tile's first row, one vector a row
  int64_t head_stride;
  T* const* kept;   // at the tile's first row, or null
  int64_t unit, n;  // the block's first unit, and how many exist from there on
  int64_t hidden;

  PYKERNELS_INLINE void row(int64_t r) const {
    constexpr int W = kLanes<C>;
    const Vec<C> h0 = load(acc + r * W) + bias[0], h1 = load(acc + half_stride + r * W) + bias[1];
    if (kept) {
      store_columns(kept[r] + unit, h0, n);
      if (kGated) store_columns(kept[r] + hidden + unit, h1, n);
      if (!kGated && n > W) store_columns(kept[r] + unit + W, h1, n - W);
    }
    Vec<C> u0 = kGated ? activate<T, kAct>(h0).value * sigmoid_to<T>(h1) : activate<T, kAct>(h0).value;
    Vec<C> u1 = kGated ? Vec<C>{} : activate<T, kAct>(h1).value;
    if (n < (kGated ? W : 2 * W)) {  // an infinite x times the zero weights of the other units is NaN
      u0 = first_lanes(u0, n);
      u1 = first_lanes(u1, n - W);
    }
    for (int64_t j = 0; j < heads; j++) {
      C* to = sums + j * head_stride + r * W;
      Vec<C> sum = load(to) + u0 * load(query + j * query_stride);
      if constexpr (!kGated) sum += u1 * load(query + j * query_stride + W);
      store(to, sum);
    }
  }
};

// s of all live rows: scores [heads, rows].
template <class T, class P, PoolAct kAct, bool kGated>
void score(const AttentionPoolArgs& args, const void* packed, const Tap<P>& x, int64_t rows, const Parameters<T, P>& parameters,
           T* const* kept, Arithmetic<P>* sums, Arithmetic<P>* scores) {
  using C = Arithmetic<P>;
  constexpr int W = kLanes<C>;
  const int64_t depth = panel_width<P>(args.width), padded = padded_hidden<P>(args), head_stride = round_up(rows, W) * W;
  memset(sums, 0, size_t(args.heads * head_stride) * sizeof(C));
  auto make = [&](int64_t block, int64_t row, const C* acc) {
    const int64_t unit = block * block_units<P>(args);
    ScoreTile<T, C, kAct, kGated> tile{};
    tile.acc = acc;
    tile.half_stride = Product<P>::kRows * W;
    tile.bias[0] = load(parameters.bias + unit);
    tile.bias[1] = load(kGated ? parameters.gate_bias + unit : parameters.bias + unit + W);
    tile.query = parameters.query + unit;
    tile.query_stride = padded;
    tile.heads = args.heads;
    tile.sums = sums + row * W;
    tile.head_stride = head_stride;
    tile.kept = kept ? kept + row : nullptr;
    tile.unit = unit;
    tile.n = args.hidden - unit;
    tile.hidden = args.hidden;
    return tile;
  };
  Product<P>::begin();
  for_each_tile(&x, 1, rows, depth, static_cast<const P*>(packed), tap_weights<P>(depth), 0, column_blocks<P>(args), make);
  Product<P>::end();
  for (int64_t j = 0; j < args.heads; j++) {
    for (int64_t r = 0; r < rows; r += W) {
      Vec<C> v[W];
      for (int i = 0; i < W; i++) v[i] = load(sums + j * head_stride + (r + i) * W);
      transpose(v);
      for (int i = 1; i < W; i++) v[0] += v[i];
      store(scores + j * round_up(rows, W) + r, v[0]);
    }
  }
}

// ---- softmax and weighted sum --------------------------------------------------------------------------------------------------------

// to[j] = sum over rows of weights[j] x, for kHeads heads that share each load of x.
template <int kHeads, int kColumns, class T, class C>
PYKERNELS_INLINE void weighted_sum(C* to, int64_t to_stride, const C* weights, int64_t weight_stride, const T* const* rows, int64_t count,
                                   int64_t width) {
  constexpr int W = kLanes<C>;
  int64_t column = 0;
  for (; column + kColumns * W <= width; column += kColumns * W) {
    Vec<C> sum[kHeads][kColumns] = {};
    for (int64_t r = 0; r < count; r++) {
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; c++) {
        const Vec<C> x = load(rows[r] + column + c * W);
        for (int j = 0; j < kHeads; j++) sum[j][c] += x * weights[j * weight_stride + r];
      }
    }
    for (int j = 0; j < kHeads; j++)
      for (int c = 0; c < kColumns; c++) store(to + j * to_stride + column + c * W, sum[j][c]);
  }
  for (; column < width; column += W) {
    const int64_t n = min<int64_t>(W, width - column);
    Vec<C> sum[kHeads] = {};
    for (int64_t r = 0; r < count; r++) {
      const Vec<C> x = load_columns(rows[r] + column, n);
      for (int j = 0; j < kHeads; j++) sum[j] += x * weights[j * weight_stride + r];
    }
    for (int j = 0; j < kHeads; j++) store_columns(to + j * to_stride + column, sum[j], n);
  }
}

// out = sum / total.
template <class T, class C>
void finish(const AttentionPoolArgs& args, int64_t sequence, int64_t head, const C* sum, C total, C largest) {
  constexpr int W = kLanes<C>;
  const int64_t row = args.sequences[sequence].index * args.heads + head;
  for (int64_t column = 0; column < args.width; column += W) {
    const int64_t n = min<int64_t>(W, args.width - column);
    const Vec<C> out = load_columns(sum + column, n) / total;
    store_columns(static_cast<T*>(args.out) + row * args.width + column, out, n);
    if (args.pooled) store_columns(static_cast<C*>(args.pooled) + row * args.width + column, out, n);
  }
  C* max_sum = static_cast<C*>(args.max_sum) + 2 * row;
  max_sum[0] = largest;
  max_sum[1] = total;
}

template <class C>
constexpr C kLowest = sizeof(C) == 8 ? C(-__builtin_inf()) : C(-__builtin_inff());

// Where scores are compared with: the largest, but not minus infinity, from which nothing can be subtracted.
template <class C>
PYKERNELS_INLINE C base_of(C largest) {
  return largest == kLowest<C> ? C(0) : largest;
}

// NaN counts as nothing here; it comes back with the weights.
template <class C>
C largest_of(const C* s, int64_t count) {
  constexpr int W = kLanes<C>;
  Vec<C> v = broadcast(kLowest<C>);
  int64_t r = 0;
  for (; r + W <= count; r += W) v = load(s + r) > v ? load(s + r) : v;
  C largest = kLowest<C>;
  for (; r < count; r++) largest = s[r] > largest ? s[r] : largest;
  for (int i = 0; i < W; i++) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

template <class C>
int64_t part_elements(const AttentionPoolArgs& args) {
  return args.width + 2;
}

// Pools rows [begin, end) of the live rows, which are those of one chunk. Scores turn into weights.
template <class T, class C>
void pool_chunk(const AttentionPoolArgs& args, const Block& chunk, const LiveRows<T>& live, int64_t begin, int64_t end, C* scores,
                int64_t score_stride, C* sum) {
  constexpr int W = kLanes<C>;
  const Sequence& sequence = args.sequences[chunk.sequence];
  const int64_t place = (&chunk - args.chunks) * args.heads, count = end - begin;
  const bool alone = args.alone[chunk.sequence];
  C* parts = static_cast<C*>(args.parts) + (alone ? 0 : place * part_elements<C>(args));
  if (!alone) sum = parts;
  const int64_t sum_stride = alone ? args.width : part_elements<C>(args);
  C* const heads = sum + args.heads * sum_stride;  // alone: total and largest of each head lie behind the sums
  for (int64_t j = 0; j < args.heads; j++) {
    C* s = scores + j * score_stride + begin;
    if (args.scores) {
      C* to = score_rows<C>(args.scores, args, sequence, j);
      for (int64_t r = 0; r < count; r++) to[live.positions[begin + r]] = s[r];
    }
    const C largest = largest_of(s, count);
    const Vec<C> base = broadcast(base_of(largest));
    Vec<C> totals{};
    for (int64_t r = 0; r < count; r += W) {
      const int64_t n = min<int64_t>(W, count - r);
      const Vec<C> p = weight_exp(load_columns(s + r, n) - base);
      store_columns(s + r, p, n);
      totals += load_columns(s + r, n);  // zeros where no row is
    }
    C* const ends = alone ? heads + 2 * j : sum + j * sum_stride + args.width;
    ends[0] = sum_lanes(totals);
    ends[1] = largest;
  }
  int64_t j = 0;
  for (; j + 2 <= args.heads; j += 2)
    weighted_sum<2, 4>(sum + j * sum_stride, sum_stride, scores + j * score_stride + begin, score_stride, live.rows + begin, count,
                       args.width);
  if (j < args.heads)
    weighted_sum<1, 8>(sum + j * sum_stride, sum_stride, scores + j * score_stride + begin, score_stride, live.rows + begin, count,
                       args.width);
  for (j = 0; alone && j < args.heads; j++)
    finish<T>(args, chunk.sequence, j, sum + j * sum_stride, heads[2 * j], base_of(heads[2 * j + 1]));
}

template <class T, class P>
int64_t forward_scratch(const AttentionPoolArgs& args, int64_t rows, int64_t chunks) {
  using C = Arithmetic<P>;
  const int64_t padded = round_up(rows, kLanes<C>);
  return LiveRows<T>::bytes(args, rows, chunks) + Parameters<T, P>::bytes(args) + Scratch::bytes<P>(operand_elements<P>(args, rows)) +
         Scratch::bytes<C>(args.heads * padded * kLanes<C>) + Scratch::bytes<C>(args.heads * padded) +
         Scratch::bytes<C>(args.heads * (args.width + 2));
}

template <class T, class P, PoolAct kAct, bool kGated>
void forward_rows(const AttentionPoolArgs& args, const void* packed, const Blocks& chunks, void* memory) {
  using C = Arithmetic<P>;
  constexpr int W = kLanes<C>;
  Scratch scratch(memory);
  LiveRows<T> live(scratch, args, chunks);
  const Parameters<T, P> parameters(scratch, args);
  const Tap<P> x = operand(scratch.take<P>(operand_elements<P>(args, chunks.rows)), live, args, chunks);
  const int64_t stride = round_up(live.count, W);
  C* sums = scratch.take<C>(args.heads * stride * W);
  C* scores = scratch.take<C>(args.heads * stride);
  C* sum = scratch.take<C>(args.heads * (args.width + 2));
  score<T, P, kAct, kGated>(args, packed, x, live.count, parameters, live.kept, sums, scores);
  for (int64_t i = 0, begin = 0; i < chunks.count; begin = live.ends[i++])
    pool_chunk(args, chunks.data[i], live, begin, live.ends[i], scores, stride, sum);
}

template <class T, class P>
void forward(const AttentionPoolArgs& args, const void* packed, const Blocks& chunks, void* scratch) {
  using Body = void (*)(const AttentionPoolArgs&, const void*, const Blocks&, void*);
  static constexpr Body bodies[4][2] = {{forward_rows<T, P, PoolAct::tanh, false>, forward_rows<T, P, PoolAct::tanh, true>},
                                        {forward_rows<T, P, PoolAct::swish, false>, forward_rows<T, P, PoolAct::swish, true>},
                                        {forward_rows<T, P, PoolAct::relu, false>, forward_rows<T, P, PoolAct::relu, true>},
                                        {forward_rows<T, P, PoolAct::gelu, false>, forward_rows<T, P, PoolAct::gelu, true>}};
  bodies[int(args.act)][args.gated](args, packed, chunks, scratch);
}

template <class T, class P>
void combine(const AttentionPoolArgs& args, int64_t sequence, int64_t first, int64_t count) {
  using C = Arithmetic<P>;
  constexpr int W = kLanes<C>;
  const int64_t elements = part_elements<C>(args), chunk_elements = args.heads * elements;
  for (int64_t j = 0; j < args.heads; j++) {
    C* const parts = static_cast<C*>(args.parts) + first * chunk_elements + j * elements;
    C largest = kLowest<C>;
    for (int64_t i = 0; i < count; i++) {
      const C m = parts[i * chunk_elements + args.width + 1];
      largest = m > largest ? m : largest;
    }
    C total = 0;
    for (int64_t i = 0; i < count; i++) {
      C* ends = parts + i * chunk_elements + args.width;
      const C scale = weight_exp(base_of(ends[1]) - base_of(largest));
      total += ends[0] * scale;
      ends[1] = scale;
    }
    for (int64_t column = 0; column < args.width; column += W) {
      const int64_t n = min<int64_t>(W, args.width - column);
      Vec<C> sum{};
      for (int64_t i = 0; i < count; i++) {
        const C* part = parts + i * chunk_elements;
        sum += load_columns(part + column, n) * part[args.width + 1];
      }
      store_columns(parts + column, sum, n);
    }
    finish<T>(args, sequence, j, parts, total, base_of(largest));
  }
}

template <class C>
void normalize(const AttentionPoolArgs& args, int64_t index) {
  const Sequence& sequence = args.sequences[index];
  for (int64_t j = 0; j < args.heads; j++) {
    const C* s = score_rows<C>(args.scores, args, sequence, j);
    C* a = score_rows<C>(args.weights, args, sequence, j);
    constexpr int W = kLanes<C>;
    for (int64_t r = 0; r < sequence.live; r += W) {
      const int64_t n = min<int64_t>(W, sequence.live - r);
      store_columns(a + r, weights_of<C>(load_columns(s + r, n), args, sequence, j), n);
    }
    for (int64_t r = 0; r < sequence.live && sequence.mask; r++) {
      if (!sequence.mask[r]) a[r] = 0;
    }
  }
}

}  // namespace

template <class T, class P>
void add_attention_pool_forward(AttentionPoolKernels& table) {
  table.row_tile = Product<P>::kRows;
  table.row_pad = Product<P>::kRowPad;
  table.panel_size = sizeof(P);
  table.sum_size = sizeof(Arithmetic<P>);
  table.depth_unit = Product<P>::kDepth;
  table.column_blocks = column_blocks<P>;
  table.packed_bytes = packed_bytes<P>;
  table.pack = pack<T, P>;
  table.forward_scratch = forward_scratch<T, P>;
  table.forward = forward<T, P>;
  table.combine = combine<T, P>;
  table.normalize = normalize<Arithmetic<P>>;
}

PYKERNELS_INSTANTIATE(add_attention_pool_forward, AttentionPoolKernels)

}  // namespace pykernels::PYKERNELS_TIER
