// The tier's tables of attention_pool kernels.
#include "attention_pool.h"
#include "kernel_table.h"

namespace pykernels::PYKERNELS_TIER {

template <class T, class P>
void add_attention_pool_forward(AttentionPoolKernels&);
template <class T, class P>
void add_attention_pool_backward(AttentionPoolKernels&);

const AttentionPoolKernels* attention_pool_kernels(Dtype dtype, bool bf16_products) {
  return table_for<AttentionPoolKernels>(dtype, bf16_products, []<class T, class P>(AttentionPoolKernels& table) {
    add_attention_pool_forward<T, P>(table);
    add_attention_pool_backward<T, P>(table);
  });
}

}  // namespace pykernels::PYKERNELS_TIER
