// The tier's table of attention_pool kernels.
#include "attention_pool.h"
#include "vec.h"

namespace pykernels::PYKERNELS_TIER {

template <class T, class P>
void add_attention_pool_forward(AttentionPoolKernels&);
template <class T, class P>
void add_attention_pool_backward(AttentionPoolKernels&);

namespace {
template <class T, class P>
const AttentionPoolKernels* table() {
  static const AttentionPoolKernels kernels = [] {
    AttentionPoolKernels k{};
    add_attention_pool_forward<T, P>(k);
    add_attention_pool_backward<T, P>(k);
    return k;
  }();
  return &kernels;
}
}  // namespace

const AttentionPoolKernels* attention_pool_kernels(Dtype dtype, [[maybe_unused]] bool bf16_products) {
  switch (dtype) {
    case Dtype::float16: return table<f16, float>();
#if defined(__AVX512BF16__)
    case Dtype::bfloat16: return table<bf16, bf16>();
    case Dtype::float32: return bf16_products ? table<float, bf16>() : table<float, float>();
#else
    case Dtype::bfloat16: return table<bf16, float>();
    case Dtype::float32: return table<float, float>();
#endif
#if !defined(__AVX2__)
    case Dtype::float64: return table<double, double>();
#endif
    default: return nullptr;
  }
}

}  // namespace pykernels::PYKERNELS_TIER
