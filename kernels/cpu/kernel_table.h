// A tier's table of an operator's kernels: which storage type and panel element serve a dtype is the same for all operators.
#pragma once

#include "blocks.h"
#include "vec.h"

// Explicit instantiations of `function`<T, P>(Table&) for the pairs of types below.
#if defined(__AVX512BF16__)
#define PYKERNELS_INSTANTIATE_BF16(function, Table)                 \
  template void function<pykernels::bf16, pykernels::bf16>(Table&); \
  template void function<float, pykernels::bf16>(Table&);
#else
#define PYKERNELS_INSTANTIATE_BF16(function, Table) template void function<pykernels::bf16, float>(Table&);
#endif
#if defined(__AVX2__)
#define PYKERNELS_INSTANTIATE_DOUBLE(function, Table)
#else
#define PYKERNELS_INSTANTIATE_DOUBLE(function, Table) template void function<double, double>(Table&);
#endif
#define PYKERNELS_INSTANTIATE(function, Table)           \
  template void function<float, float>(Table&);          \
  template void function<pykernels::f16, float>(Table&); \
  PYKERNELS_INSTANTIATE_BF16(function, Table)            \
  PYKERNELS_INSTANTIATE_DOUBLE(function, Table)

namespace pykernels::PYKERNELS_TIER {
namespace {

template <class Table, class T, class P, class Fill>
const Table* filled_table(Fill fill) {
  static const Table table = [&] {
    Table t{};
    fill.template operator()<T, P>(t);
    return t;
  }();
  return &table;
}

// The table for a dtype, filled once by fill.operator()<T, P>(table); null where the tier does not serve the dtype.
template <class Table, class Fill>
const Table* table_for(Dtype dtype, [[maybe_unused]] bool bf16_products, Fill fill) {
  switch (dtype) {
    case Dtype::float16: return filled_table<Table, f16, float>(fill);
#if defined(__AVX512BF16__)
    case Dtype::bfloat16: return filled_table<Table, bf16, bf16>(fill);
    case Dtype::float32: return bf16_products ? filled_table<Table, float, bf16>(fill) : filled_table<Table, float, float>(fill);
#else
    case Dtype::bfloat16: return filled_table<Table, bf16, float>(fill);
    case Dtype::float32: return filled_table<Table, float, float>(fill);
#endif
#if !defined(__AVX2__)
    case Dtype::float64: return filled_table<Table, double, double>(fill);
#endif
    default: return nullptr;
  }
}

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
