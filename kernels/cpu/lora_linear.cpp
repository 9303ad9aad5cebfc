// Forward of lora_linear.
#include "lora_linear.h"

#include "kernel_table.h"
#include "lora_linear_rows.h"
#include "weights.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

template <class Ta, class C>
void arrange_from(const LoraLinearArgs& args, const LoraAdapters& from, void* a, void* b) {
  for (int64_t r = 0; r < args.adapters * args.rank; r++)
    convert_row(static_cast<C*>(a) + r * args.a_row, static_cast<const Ta*>(from.a) + r * args.in, args.in, args.a_row);
  for (int64_t i = 0; i < args.adapters; i++) {
    C* to = static_cast<C*>(b) + i * args.rank * args.b_row;
    const Ta* rows = static_cast<const Ta*>(from.b) + i * args.rank * args.out;
    gather_rows(to, args.b_row, args.b_row, Rows<Ta>{rows, 1, args.rank, args.out, args.rank, nullptr}, 0, args.rank);
    for (int64_t j = 0; j < args.rank * args.b_row; j++) to[j] *= C(from.scales[i]);
  }
}

template <class T, class C>
void arrange(const LoraLinearArgs& args, const LoraAdapters& from, void* a, void* b) {
  if (from.is_float && sizeof(C) == sizeof(float))
    arrange_from<Arithmetic<C>, C>(args, from, a, b);
  else
    arrange_from<T, C>(args, from, a, b);
}

void keep_bits(const LoraLinearArgs& args, int64_t first, int64_t count) {
  philox_keep_bits(args.keep + first * args.keep_row, args.seed, uint64_t(first * args.keep_row), count * args.keep_row,
                   args.keep_threshold, args.stream, 0);
}

template <class T, class C>
void shrink(const LoraLinearArgs& args, int64_t first, int64_t count) {
  const T* x = static_cast<const T*>(args.x);
  for_each_adapter(args, first, count, [&](int64_t adapter, int64_t row, int64_t rows) {
    C* s = static_cast<C*>(args.s) + row * args.rank;
    const auto x_row = [&](int64_t i) { return x + (row + i) * args.x_row; };
    const auto a_row = [&](int64_t j) { return a_of<C>(args, adapter) + j * args.a_row; };
    if (!args.keep) {
      dots<Step<C>>(s, args.rank, rows, args.rank, args.in, x_row, a_row, [](int64_t, int64_t, Vec<C> v) { return v; });
      return;
    }
    const uint8_t* keep = args.keep + row * args.keep_row;
    dots<Step<C>>(s, args.rank, rows, args.rank, args.in, x_row, a_row,
                  [&](int64_t i, int64_t e, Vec<C> v) { return keep_columns<C>(v, keep + i * args.keep_row, e); });
    for (int64_t i = 0; i < rows * args.rank; i++) s[i] *= C(args.keep_scale);
  });
}

// ---- base product --------------------------------------------------------------------------------------------------------------------

template <class P>
int64_t column_blocks(int64_t columns) {
  return x_column_blocks<P>(columns);
}

template <class P>
int64_t packed_bytes(int64_t depth) {
  return tap_weights<P>(panel_width<P>(depth)) * int64_t(sizeof(P));
}

// Rows [outputs, depth] as column blocks, or the same matrix stored as [depth, outputs].
template <class T, class P>
void pack_matrix(void* packed, const T* weight, bool transposed, int64_t outputs, int64_t depth, int64_t begin, int64_t end) {
  constexpr int W = Product<P>::kLanes;
  const int64_t width = panel_width<P>(depth);
  const Interleaved<Arithmetic<P>> of_one(1);
  for (int64_t block = begin; block < end; block++) {
    P* to = static_cast<P*>(packed) + (block - begin) * tap_weights<P>(width);
    if (transposed) {
      pack_inputs<T>(to, block, width, outputs, 1, of_one,
                     [&](int64_t e) -> const T* { return e < depth ? weight + e * outputs : nullptr; });
      continue;
    }
    for (int half = 0; half < 2; half++) {
      const int64_t first = block * kBlockColumns<P> + half * W;
      pack_outputs(to, half, weight + first * depth, max<int64_t>(0, min<int64_t>(W, outputs - first)), depth, 1, 0);
    }
    zero_packed_tail(to, depth, width);
  }
}

template <class T, class P>
void pack(const LoraLinearArgs& args, void* packed, int64_t begin, int64_t end) {
  pack_matrix<T, P>(packed, static_cast<const T*>(args.weight), args.weight_transposed, args.out, args.in, begin, end);
}

template <class T, class P>
void pack_transposed(const LoraLinearArgs& args, void* packed, int64_t begin, int64_t end) {
  pack_matrix<T, P>(packed, static_cast<const T*>(args.weight), !args.weight_transposed, args.in, args.out, begin, end);
}

// The epilogue of rows of two vectors of outputs.
template <class T, class C>
struct OutputTile {
  const LoraLinearArgs* args;
  int64_t first, column;  // row of y, and output, where the tile begins
  const C* acc;           // [rows] vectors, and half_stride further on as many
  int64_t acc_row, half_stride;
  Vec<C> bias[2];

  OutputTile(const LoraLinearArgs& a, int64_t row, int64_t output, const C* accumulators, int64_t accumulator_row, int64_t second_half)
      : args(&a), first(row), column(output), acc(accumulators), acc_row(accumulator_row), half_stride(second_half), bias{} {
    const T* from = static_cast<const T*>(a.bias) + output;
    const int64_t n = a.out - output;
    if (a.bias) bias[0] = load_columns(from, n);
    if (a.bias && n > kLanes<C>) bias[1] = load_columns(from + kLanes<C>, n - kLanes<C>);
  }

  PYKERNELS_INLINE void rows(int64_t begin, int64_t end) const {
    constexpr int W = kLanes<C>;
    const int64_t n = args->out - column, rank = args->rank;
    in_groups(*args, begin, end, [&]<int kRows>(int64_t r) {
      Vec<C> v[kRows][2];
      for (int i = 0; i < kRows; i++) {
        v[i][0] = load(acc + (r + i) * acc_row) + bias[0];
        v[i][1] = load(acc + half_stride + (r + i) * acc_row) + bias[1];
      }
      const int64_t adapter = args->adapter_of ? args->adapter_of[first + r] : 0;
      if (adapter >= 0)
        add_low_rank(v, static_cast<const C*>(args->s) + (first + r) * rank, rank, b_of<C>(*args, adapter) + column, args->b_row);
      for (int i = 0; i < kRows; i++) {
        T* to = static_cast<T*>(args->y) + (first + r + i) * args->out + column;
        store_columns(to, v[i][0], n);
        if (n > W) store_columns(to + W, v[i][1], n - W);
      }
    });
  }
};

template <class T, class P>
void forward(const LoraLinearArgs& args, const void* packed, int64_t first, int64_t count, int64_t begin, int64_t end,
             const void* prepared) {
  using C = Arithmetic<P>;
  const int64_t depth = panel_width<P>(args.in);
  const auto make = [&](int64_t block, int64_t row, const C* acc) {
    return OutputTile<T, C>(args, first + row, block * kBlockColumns<P>, acc, kLanes<C>, Product<P>::kRows * kLanes<C>);
  };
  Product<P>::begin();
  for_each_tile(static_cast<const Tap<P>*>(prepared), 1, count, depth, static_cast<const P*>(packed), tap_weights<P>(depth), begin, end,
                make);
  Product<P>::end();
}

// ---- few rows ------------------------------------------------------------------------------------------------------------------------

template <class T, class P>
void forward_few(const LoraLinearArgs& args, int64_t begin, int64_t end, void* memory) {
  using C = Arithmetic<P>;
  Scratch scratch(memory);
  const int64_t stride = few_stride<C>(end - begin);
  const C* products = multiply_few<T, P>(scratch, static_cast<const T*>(args.x), args.x_row, args.rows, args.in,
                                         static_cast<const T*>(args.weight), args.weight_transposed, args.out, begin, end);
  for (int64_t column = begin; column < end; column += 2 * kLanes<C>)
    OutputTile<T, C>(args, 0, column, products + column - begin, stride, kLanes<C>).rows(0, args.rows);
}

}  // namespace

template <class T, class P>
void add_lora_linear_forward(LoraLinearKernels& table) {
  using C = Arithmetic<P>;
  table.row_tile = Product<P>::kRows;
  table.panel_size = sizeof(P);
  table.sum_size = sizeof(C);
  // Tiles pay for packing sooner than vectors, whose products of bf16 need no more instructions unpacked.
  table.few_rows = Product<P>::kOverlapsEpilogue ? 16 : sizeof(P) == 2 ? 64 : 32;
  table.arrange = arrange<T, C>;
  table.keep_bits = keep_bits;
  table.shrink = shrink<T, C>;
  table.column_blocks = column_blocks<P>;
  table.packed_bytes = packed_bytes<P>;
  table.pack = pack<T, P>;
  table.pack_transposed = pack_transposed<T, P>;
  table.prepared_bytes = prepared_bytes<P>;
  table.prepare = prepare<T, P>;
  table.forward = forward<T, P>;
  table.few_scratch = few_scratch<C>;
  table.forward_few = forward_few<T, P>;
}

PYKERNELS_INSTANTIATE(add_lora_linear_forward, LoraLinearKernels)

}  // namespace pykernels::PYKERNELS_TIER
