// The tier's tables of lora_linear kernels.
#include "kernel_table.h"
#include "lora_linear.h"

namespace pykernels::PYKERNELS_TIER {

template <class T, class P>
void add_lora_linear_forward(LoraLinearKernels&);
template <class T, class P>
void add_lora_linear_backward(LoraLinearKernels&);

const LoraLinearKernels* lora_linear_kernels(Dtype dtype, bool bf16_products) {
  return table_for<LoraLinearKernels>(dtype, bf16_products, []<class T, class P>(LoraLinearKernels& table) {
    add_lora_linear_forward<T, P>(table);
    add_lora_linear_backward<T, P>(table);
  });
}

}  // namespace pykernels::PYKERNELS_TIER
