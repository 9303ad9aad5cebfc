// Backward of gated_conv1d by its weight: dW_k = sum_t dh[t] x[t + k d - left]^T, with the dh that gated_conv_bwd.cpp makes.
#include "gated_conv.h"
#include "gated_conv_rows.h"
#include "kernel_table.h"
#include "weights.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

// Column blocks are those of x, each with all its taps behind each other: so they lie in partial sums, [outputs, 2 vectors] each.
template <class P>
int64_t weight_column_blocks(const GatedConvArgs& args) {
  return args.taps * x_column_blocks<P>(args.c_in);
}
template <class P>
int64_t partial_elements(const GatedConvArgs& args) {
  return weight_column_blocks<P>(args) * 2 * args.dh_half * kBlockColumns<P>;
}

template <class T, class P>
int64_t backward_weight_scratch(const GatedConvArgs& args, int64_t rows) {
  const int64_t depth = panel_width<P>(rows);
  return Scratch::bytes<P>(2 * args.dh_half * transposed_stride<P>(depth)) + Scratch::bytes<P>(tap_weights<P>(depth)) +
         Scratch::bytes<T>(rows * kBlockColumns<P>);
}

// dh^T x of the rows of some blocks: outputs are the rows of the product, rows of the batch its inner dimension.
template <class T, class P>
class WeightProduct {
  using C = Arithmetic<P>;

  const GatedConvArgs& args_;
  const Blocks& blocks_;
  int64_t outputs_, depth_, stride_;
  P *dh_, *x_;
  T* panel_;

 public:
  WeightProduct(const GatedConvArgs& args, const Blocks& blocks, Scratch& scratch)
      : args_(args),
        blocks_(blocks),
        outputs_(2 * args.dh_half),
        depth_(panel_width<P>(blocks.rows)),
        stride_(transposed_stride<P>(depth_)),
        dh_(scratch.take<P>(outputs_ * stride_)),
        x_(scratch.take<P>(tap_weights<P>(depth_))),
        panel_(scratch.take<T>(blocks.rows * kBlockColumns<P>)) {
    int64_t e = 0;
    for (int64_t i = 0; i < blocks.count; i++) {
      const Block& block = blocks.data[i];
      const P* from = static_cast<const P*>(args.dh) + (args.sequences[block.sequence].out_row + block.first) * args.dh_row;
      transpose_dh(dh_, stride_, e, from, args.dh_row, block.rows, outputs_);
      e += block.rows;
    }
    zero_dh_tail(dh_, stride_, blocks.rows, depth_, outputs_);
  }

  // Written, or with `add` added, to [outputs, 2 vectors].
  void run(int64_t block, int64_t tap, C* to, bool add) const {
    pack_x(tap, block * kBlockColumns<P>);
    weight_product(dh_, stride_, outputs_, depth_, x_, to, add);
  }

 private:
  // Rows of x that one tap reads for all rows of the blocks, columns [column, column + 2 vectors), packed as the inner dimension of B.
  void pack_x(int64_t tap, int64_t column) const {
    const int64_t columns = min<int64_t>(kBlockColumns<P>, args_.c_in - column);
    int64_t e = 0;
    for (int64_t i = 0; i < blocks_.count; i++) {
      const Block& block = blocks_.data[i];
      Rows<T> x = x_rows<T>(args_, args_.sequences[block.sequence]);
      x.data += column * x.column_stride;
      x.columns = columns;
      int64_t start = block.first + tap * args_.dilation - args_.left;
      if (x.column_stride != 1) {
        gather_rows(panel_, columns, columns, x, start, block.rows);
        x = {panel_, columns, 1, columns, block.rows, nullptr};
        start = 0;
      }
      e = pack_rows(x_, e, block.rows, 0, columns,
                    [&](int64_t r) { return x.reads_zero(start + r) ? nullptr : x.data + (start + r) * x.row_stride; });
    }
    zero_packed_tail(x_, e, panel_width<P>(e));
  }
};

template <class T, class P>
void backward_weight(const GatedConvArgs& args, const Blocks& blocks, void* partial, bool add, int64_t begin, int64_t end, void* memory) {
  Scratch scratch(memory);
  const WeightProduct<T, P> product(args, blocks, scratch);
  const int64_t size = 2 * args.dh_half * kBlockColumns<P>;
  Product<P>::begin();
  for (int64_t index = begin; index < end; index++)
    product.run(index / args.taps, index % args.taps, static_cast<Arithmetic<P>*>(partial) + index * size, add);
  Product<P>::end();
}

// Rows [begin, end) of dweight, columns of one block: the sum of `count` partial sums of that block, `distance` apart.
template <class T, class P>
void write_weight(const GatedConvArgs& args, const Interleaved<Arithmetic<P>>& of_taps, const Arithmetic<P>* partials, int64_t count,
                  int64_t distance, int64_t block, void* value_dweight, void* gate_dweight, int64_t begin, int64_t end) {
  using C = Arithmetic<P>;
  constexpr int W = Product<P>::kLanes;
  for (int64_t row = begin; row < end; row++) {
    const bool is_gate = row >= args.c_out;
    const int64_t output = is_gate ? row - args.c_out : row, dh_row = is_gate ? args.dh_half + output : output;
    T* to = static_cast<T*>(is_gate ? gate_dweight : value_dweight) + output * args.c_in * args.taps;
    for (int half = 0; half < 2; half++) {
      const int64_t column = block * kBlockColumns<P> + half * W;
      if (column >= args.c_in) break;
      of_taps.store(to + column * args.taps, min<int64_t>(W, args.c_in - column), [&](int64_t tap) {
        const C* from = partials + (tap * 2 * args.dh_half + dh_row) * kBlockColumns<P> + half * W;
        Vec<C> sum = load(from);
        for (int64_t p = 1; p < count; p++) sum += load(from + p * distance);
        return sum;
      });
    }
  }
}

template <class T, class P>
void reduce_weight(const GatedConvArgs& args, const void* partials, int64_t count, void* value_dweight, void* gate_dweight, int64_t begin,
                   int64_t end) {
  const Interleaved<Arithmetic<P>> of_taps(args.taps);
  const int64_t elements = partial_elements<P>(args), blocks = x_column_blocks<P>(args.c_in);
  for (int64_t block = 0; block < blocks; block++) {
    const auto* from = static_cast<const Arithmetic<P>*>(partials) + block * (elements / blocks);
    write_weight<T, P>(args, of_taps, from, count, elements, block, value_dweight, gate_dweight, begin, end);
  }
}

template <class T, class P>
int64_t whole_weight_scratch(const GatedConvArgs& args, int64_t rows) {
  return backward_weight_scratch<T, P>(args, rows) + Scratch::bytes<Arithmetic<P>>(args.taps * 2 * args.dh_half * kBlockColumns<P>);
}

template <class T, class P>
void whole_weight(const GatedConvArgs& args, const Blocks& blocks, void* value_dweight, void* gate_dweight, int64_t begin, int64_t end,
                  void* memory) {
  using C = Arithmetic<P>;
  Scratch scratch(memory);
  const WeightProduct<T, P> product(args, blocks, scratch);
  const int64_t size = 2 * args.dh_half * kBlockColumns<P>;
  C* sums = scratch.take<C>(args.taps * size);
  const Interleaved<C> of_taps(args.taps);
  for (int64_t block = begin; block < end; block++) {
    Product<P>::begin();
    for (int64_t tap = 0; tap < args.taps; tap++) product.run(block, tap, sums + tap * size, false);
    Product<P>::end();
    write_weight<T, P>(args, of_taps, sums, 1, 0, block, value_dweight, gate_dweight, 0, 2 * args.c_out);
  }
}

}  // namespace

template <class T, class P>
void add_gated_conv_weight(GatedConvKernels& table) {
  table.weight_column_blocks = weight_column_blocks<P>;
  table.partial_elements = partial_elements<P>;
  table.backward_weight_scratch = backward_weight_scratch<T, P>;
  table.backward_weight = backward_weight<T, P>;
  table.reduce_weight = reduce_weight<T, P>;
  table.whole_weight_scratch = whole_weight_scratch<T, P>;
  table.whole_weight = whole_weight<T, P>;
}

PYKERNELS_INSTANTIATE(add_gated_conv_weight, GatedConvKernels)

}  // namespace pykernels::PYKERNELS_TIER
