// Backward of lora_linear.
//
// With d = drop(x), S = d A^T, y = x W^T + bias + scale S B^T, and dy given:
//   dS = scale dy B        dB = scale dy^T S        dA = dS^T d        dbias = sum of dy over rows
//   dx = dy W + drop'(dS A)        dW = dy^T x
// drop' multiplies with the factors that dropout had in forward, which kept a bit of each. Saved: x, S and these bits.
#include "kernel_table.h"
#include "lora_linear.h"
#include "lora_linear_rows.h"
#include "weights.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

template <class T, class C>
void backward_shrink(const LoraLinearArgs& args, int64_t first, int64_t count) {
  const T* dy = static_cast<const T*>(args.dy);
  for_each_adapter(args, first, count, [&](int64_t adapter, int64_t row, int64_t rows) {
    dots<Step<C>>(
        static_cast<C*>(args.ds) + row * args.rank, args.rank, rows, args.rank, args.out,
        [&](int64_t i) { return dy + (row + i) * args.dy_row; }, [&](int64_t j) { return b_of<C>(args, adapter) + j * args.b_row; },
        [](int64_t, int64_t, Vec<C> v) { return v; });
  });
}

// ---- gradients of the adapters -------------------------------------------------------------------------------------------------------

// Where da, db and dbias lie in a partial sum.
PYKERNELS_INLINE int64_t db_offset(const LoraLinearArgs& args) { return args.adapters * args.rank * args.in; }
PYKERNELS_INLINE int64_t dbias_offset(const LoraLinearArgs& args) { return args.adapters * args.rank * (args.in + args.out); }
int64_t partial_elements(const LoraLinearArgs& args) { return dbias_offset(args) + args.out; }

template <class T, class C>
void backward_adapters(const LoraLinearArgs& args, int64_t first, int64_t count, void* partial, bool want_a, bool want_b, bool want_bias) {
  C* const sums = static_cast<C*>(partial);
  const auto load_dy = [&](int64_t row) {
    const T* dy = static_cast<const T*>(args.dy) + row * args.dy_row;
    return [&args, dy](int64_t r, int64_t c, int64_t n) { return load_columns(dy + r * args.dy_row + c, n); };
  };
  for_each_adapter(args, first, count, [&](int64_t adapter, int64_t row, int64_t rows) {
    if (want_a) {
      const auto ds_row = [&](int64_t r) { return static_cast<const C*>(args.ds) + (row + r) * args.rank; };
      C* da = sums + adapter * args.rank * args.in;
      const T* x = static_cast<const T*>(args.x) + row * args.x_row;
      if (args.keep) {
        const uint8_t* keep = args.keep + row * args.keep_row;
        const C scale = C(args.keep_scale);
        outer(da, args.in, args.rank, args.in, rows, ds_row, [&](int64_t r, int64_t c, int64_t n) {
          return keep_columns<C>(load_columns(x + r * args.x_row + c, n), keep + r * args.keep_row, c) * scale;
        });
      } else {
        outer(da, args.in, args.rank, args.in, rows, ds_row,
              [&](int64_t r, int64_t c, int64_t n) { return load_columns(x + r * args.x_row + c, n); });
      }
    }
    if (want_b) {
      C* db = sums + db_offset(args) + adapter * args.rank * args.out;
      outer(
          db, args.out, args.rank, args.out, rows, [&](int64_t r) { return static_cast<const C*>(args.s) + (row + r) * args.rank; },
          load_dy(row));
    }
  });
  if (want_bias) {
    const C one = 1;
    outer(sums + dbias_offset(args), 0, 1, args.out, count, [&](int64_t) { return &one; }, load_dy(first));
  }
}

// The sum over partial gradients of `n` elements at `offset`, into the first of them.
template <class C>
C* sum_partials(void* partials, int64_t count, int64_t elements, int64_t offset, int64_t n) {
  C* sum = static_cast<C*>(partials) + offset;
  for (int64_t p = 1; p < count; p++) {
    const C* from = sum + p * elements;
    for (int64_t i = 0; i < n; i += kLanes<C>) store_columns(sum + i, load_columns(sum + i, n - i) + load_columns(from + i, n - i), n - i);
  }
  return sum;
}

template <class Ta, class T, class C>
void reduce_adapters_to(const LoraLinearArgs& args, const LoraAdapters& adapters, void* partials, int64_t count, void* da, void* db,
                        void* dbias) {
  const int64_t elements = partial_elements(args), of_a = args.rank * args.in, of_b = args.rank * args.out;
  for (int64_t i = 0; i < args.adapters && da; i++) {
    const C* sum = sum_partials<C>(partials, count, elements, i * of_a, of_a);
    convert_row(static_cast<Ta*>(da) + i * of_a, sum, of_a, of_a);
  }
  for (int64_t i = 0; i < args.adapters && db; i++) {
    C* sum = sum_partials<C>(partials, count, elements, db_offset(args) + i * of_b, of_b);
    for (int64_t j = 0; j < of_b; j++) sum[j] *= C(adapters.scales[i]);
    for (int64_t r = 0; r < args.rank; r++) {
      for (int64_t n = 0; n < args.out; n++) store_scalar(static_cast<Ta*>(db) + i * of_b + n * args.rank + r, sum[r * args.out + n]);
    }
  }
  if (dbias) {
    const C* sum = sum_partials<C>(partials, count, elements, dbias_offset(args), args.out);
    convert_row(static_cast<T*>(dbias), sum, args.out, args.out);
  }
}

template <class T, class C>
void reduce_adapters(const LoraLinearArgs& args, const LoraAdapters& adapters, void* partials, int64_t count, void* da, void* db,
                     void* dbias) {
  if (adapters.is_float && sizeof(C) == sizeof(float))
    reduce_adapters_to<Arithmetic<C>, T, C>(args, adapters, partials, count, da, db, dbias);
  else
    reduce_adapters_to<T, T, C>(args, adapters, partials, count, da, db, dbias);
}

// ---- dx ------------------------------------------------------------------------------------------------------------------------------

template <class T, class C>
struct InputTile {
  const LoraLinearArgs* args;
  int64_t first, column;  // row of dx, and input, where the tile begins
  const C* acc;
  int64_t acc_row, half_stride;

  PYKERNELS_INLINE void rows(int64_t begin, int64_t end) const {
    constexpr int W = kLanes<C>;
    const int64_t n = args->in - column, rank = args->rank;
    in_groups(*args, begin, end, [&]<int kRows>(int64_t r) {
      Vec<C> v[kRows][2] = {};
      const int64_t adapter = args->adapter_of ? args->adapter_of[first + r] : 0;
      if (adapter >= 0)
        add_low_rank(v, static_cast<const C*>(args->ds) + (first + r) * rank, rank, a_of<C>(*args, adapter) + column, args->a_row);
      for (int i = 0; i < kRows; i++) {
        const int64_t row = first + r + i;
        if (args->keep) {
          const uint8_t* keep = args->keep + row * args->keep_row;
          v[i][0] = keep_columns<C>(v[i][0], keep, column) * C(args->keep_scale);
          if (n > W) v[i][1] = keep_columns<C>(v[i][1], keep, column + W) * C(args->keep_scale);
        }
        T* to = static_cast<T*>(args->dx) + row * args->in + column;
        v[i][0] += load(acc + (r + i) * acc_row);
        v[i][1] += load(acc + half_stride + (r + i) * acc_row);
        if (args->add_to_dx) {
          v[i][0] += load_columns(to, n);
          if (n > W) v[i][1] += load_columns(to + W, n - W);
        }
        store_columns(to, v[i][0], n);
        if (n > W) store_columns(to + W, v[i][1], n - W);
      }
    });
  }
};

template <class T, class P>
void backward_input(const LoraLinearArgs& args, const void* packed, int64_t first, int64_t count, int64_t begin, int64_t end,
                    const void* prepared) {
  using C = Arithmetic<P>;
  const int64_t depth = panel_width<P>(args.out);
  const auto make = [&](int64_t block, int64_t row, const C* acc) {
    return InputTile<T, C>{&args, first + row, block * kBlockColumns<P>, acc, kLanes<C>, Product<P>::kRows * kLanes<C>};
  };
  Product<P>::begin();
  for_each_tile(static_cast<const Tap<P>*>(prepared), 1, count, depth, static_cast<const P*>(packed), tap_weights<P>(depth), begin, end,
                make);
  Product<P>::end();
}

template <class T, class P>
void backward_input_few(const LoraLinearArgs& args, int64_t begin, int64_t end, void* memory) {
  using C = Arithmetic<P>;
  Scratch scratch(memory);
  const int64_t stride = few_stride<C>(end - begin);
  const C* products = multiply_few<T, P>(scratch, static_cast<const T*>(args.dy), args.dy_row, args.rows, args.out,
                                         static_cast<const T*>(args.weight), !args.weight_transposed, args.in, begin, end);
  for (int64_t column = begin; column < end; column += 2 * kLanes<C>)
    InputTile<T, C>{&args, 0, column, products + column - begin, stride, kLanes<C>}.rows(0, args.rows);
}

// ---- dW ------------------------------------------------------------------------------------------------------------------------------

template <class P>
int64_t weight_partial_elements(const LoraLinearArgs& args) {
  return x_column_blocks<P>(args.in) * args.out * kBlockColumns<P>;
}

template <class P>
int64_t backward_weight_scratch(const LoraLinearArgs& args, int64_t rows) {
  const int64_t depth = panel_width<P>(rows);
  return Scratch::bytes<P>(args.out * transposed_stride<P>(depth)) + Scratch::bytes<P>(tap_weights<P>(depth));
}

template <class T, class P>
void backward_weight(const LoraLinearArgs& args, int64_t first, int64_t count, void* partial, bool add, int64_t begin, int64_t end,
                     void* memory) {
  Scratch scratch(memory);
  const int64_t depth = panel_width<P>(count), stride = transposed_stride<P>(depth);
  P* transposed = scratch.take<P>(args.out * stride);
  P* packed_x = scratch.take<P>(tap_weights<P>(depth));
  const T *dy = static_cast<const T*>(args.dy) + first * args.dy_row, *x = static_cast<const T*>(args.x) + first * args.x_row;
  gather_transposed(transposed, stride, Rows<T>{dy, 1, args.dy_row, count, args.out, nullptr}, 0, args.out);
  zero_dh_tail(transposed, stride, count, depth, args.out);
  Product<P>::begin();
  for (int64_t block = begin; block < end; block++) {
    pack_rows(packed_x, 0, count, block * kBlockColumns<P>, args.in, [&](int64_t r) { return x + r * args.x_row; });
    zero_packed_tail(packed_x, count, depth);
    weight_product(transposed, stride, args.out, depth, static_cast<const P*>(packed_x),
                   static_cast<Arithmetic<P>*>(partial) + block * args.out * kBlockColumns<P>, add);
  }
  Product<P>::end();
}

template <class T, class P>
void reduce_weight(const LoraLinearArgs& args, const void* partials, int64_t count, void* dweight, int64_t begin, int64_t end) {
  using C = Arithmetic<P>;
  constexpr int W = kLanes<C>;
  const int64_t elements = weight_partial_elements<P>(args);
  for (int64_t row = begin; row < end; row++) {
    for (int64_t column = 0; column < args.in; column += W) {
      const C* from =
          static_cast<const C*>(partials) + (column / kBlockColumns<P> * args.out + row) * kBlockColumns<P> + column % kBlockColumns<P>;
      Vec<C> sum = load(from);
      for (int64_t p = 1; p < count; p++) sum += load(from + p * elements);
      store_columns(static_cast<T*>(dweight) + row * args.in + column, sum, args.in - column);
    }
  }
}

}  // namespace

template <class T, class P>
void add_lora_linear_backward(LoraLinearKernels& table) {
  using C = Arithmetic<P>;
  table.backward_shrink = backward_shrink<T, C>;
  table.partial_elements = partial_elements;
  table.backward_adapters = backward_adapters<T, C>;
  table.reduce_adapters = reduce_adapters<T, C>;
  table.backward_input = backward_input<T, P>;
  table.backward_input_few = backward_input_few<T, P>;
  table.weight_partial_elements = weight_partial_elements<P>;
  table.backward_weight_scratch = backward_weight_scratch<P>;
  table.backward_weight = backward_weight<T, P>;
  table.reduce_weight = reduce_weight<T, P>;
}

PYKERNELS_INSTANTIATE(add_lora_linear_backward, LoraLinearKernels)

}  // namespace pykernels::PYKERNELS_TIER
