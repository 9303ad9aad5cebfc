// What forward and backward of lora_linear share: rows of one adapter, and rows as the A of a product.
#pragma once

#include "dots.h"
#include "lora_linear.h"
#include "panel.h"
#include "philox.h"
#include "scratch.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

// Calls use(adapter, first, count) for runs of rows that have the same adapter, those without one left out.
template <class Use>
void for_each_adapter(const LoraLinearArgs& args, int64_t first, int64_t count, Use use) {
  for (int64_t end = first + count; first < end;) {
    int64_t run = 1;
    const int64_t adapter = args.adapter_of ? args.adapter_of[first] : 0;
    while (args.adapter_of ? first + run < end && args.adapter_of[first + run] == adapter : first + run < end) run++;
    if (adapter >= 0) use(adapter, first, run);
    first += run;
  }
}

// The low-rank rows of an adapter: C [rank, a_row] and [rank, b_row].
template <class C>
PYKERNELS_INLINE const C* a_of(const LoraLinearArgs& args, int64_t adapter) {
  return static_cast<const C*>(args.a) + adapter * args.rank * args.a_row;
}
template <class C>
PYKERNELS_INLINE const C* b_of(const LoraLinearArgs& args, int64_t adapter) {
  return static_cast<const C*>(args.b) + adapter * args.rank * args.b_row;
}

// v[i] += sum over r of s[i * rank + r] times two vectors of row r of `factor`: several rows hide the latency of each sum.
template <int kRows, class C>
PYKERNELS_INLINE void add_low_rank(Vec<C> (&v)[kRows][2], const C* s, int64_t rank, const C* factor, int64_t factor_row) {
  for (int64_t r = 0; r < rank; r++) {
    const Vec<C> f0 = load(factor + r * factor_row), f1 = load(factor + r * factor_row + kLanes<C>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
      v[i][0] += s[i * rank + r] * f0;
      v[i][1] += s[i * rank + r] * f1;
    }
  }
}

// Calls use.operator()<kRows>(row) for groups of rows [begin, end), single ones where each may have its own adapter.
template <class Use>
PYKERNELS_INLINE void in_groups(const LoraLinearArgs& args, int64_t begin, int64_t end, Use use) {
  constexpr int kGroup = kVectorBytes == 64 ? 4 : 2;
  for (; begin + kGroup <= end && !args.adapter_of; begin += kGroup) use.template operator()<kGroup>(begin);
  for (; begin < end; begin++) use.template operator()<1>(begin);
}

template <class P>
int64_t prepared_bytes(int64_t rows, int64_t columns) {
  return Scratch::bytes<Tap<P>>(1) + Scratch::bytes<P>(round_up(rows, Product<P>::kRowPad) * panel_stride<P>(panel_width<P>(columns)));
}

// Rows [first, first + count) of a matrix with `total` rows as the A of a product: in place where they can be read as they lie.
template <class T, class P>
void prepare(const void* from, int64_t row_stride, int64_t columns, int64_t total, int64_t first, int64_t count, void* memory) {
  const T* data = static_cast<const T*>(from);
  const int64_t width = panel_width<P>(columns), stride = panel_stride<P>(width), read = round_up(count, Product<P>::kRowPad);
  Scratch scratch(memory);
  Tap<P>& to = *scratch.take<Tap<P>>(1);
  if constexpr (__is_same(T, P)) {
    if (columns == width && !rows_collide<P>(row_stride) && first + read <= total) {
      to = {data + first * row_stride, row_stride, 0};
      return;
    }
  }
  P* panel = scratch.take<P>(read * stride);
  gather_rows(panel, stride, width, Rows<T>{data, row_stride, 1, columns, total, nullptr}, first, read);
  to = {panel, stride, 0};
}

// ---- few rows: weights as they lie --------------------------------------------------------------------------------------------------

template <class T, class P>
struct FewStep {
  using type = Step<Arithmetic<P>>;
};
#if defined(__AVX512BF16__)
template <>
struct FewStep<bf16, bf16> {
  using type = PairStep;
};
#endif

template <class C>
int64_t few_stride(int64_t outputs) {
  return round_up(outputs, 2 * kLanes<C>);
}

// For the products, and a transposed copy of the rows.
template <class C>
int64_t few_scratch(int64_t rows, int64_t depth, int64_t outputs) {
  return Scratch::bytes<C>(rows * few_stride<C>(outputs)) + Scratch::bytes<C>(rows * depth);
}

// Rows [rows, depth] times columns [begin, end) of a matrix: C [rows, few_stride]. The matrix lies as [outputs, depth], or as [depth,
// outputs] with `transposed`.
template <class T, class P>
const Arithmetic<P>* multiply_few(Scratch& scratch, const T* data, int64_t row_stride, int64_t rows, int64_t depth, const T* matrix,
                                  bool transposed, int64_t outputs, int64_t begin, int64_t end) {
  using C = Arithmetic<P>;
  const int64_t stride = few_stride<C>(end - begin);
  C* products = scratch.take<C>(rows * stride);
  if (transposed) {
    C* columns = scratch.take<C>(rows * depth);
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t e = 0; e < depth; e++) columns[e * rows + i] = load_scalar(data + i * row_stride + e);
    }
    memset(products, 0, size_t(rows * stride) * sizeof(C));
    outer(
        products, stride, rows, end - begin, depth, [&](int64_t e) { return columns + e * rows; },
        [&](int64_t e, int64_t c, int64_t n) { return load_columns(matrix + e * outputs + begin + c, n); });
  } else {
    using S = typename FewStep<T, P>::type;
    dots<S>(
        products, stride, rows, end - begin, depth, [&](int64_t i) { return data + i * row_stride; },
        [&](int64_t j) { return matrix + (begin + j) * depth; }, [](int64_t, int64_t, typename S::Operand v) { return v; });
  }
  return products;
}

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
