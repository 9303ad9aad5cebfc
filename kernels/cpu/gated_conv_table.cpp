// The tier's tables of gated_conv1d kernels.
#include "gated_conv.h"
#include "kernel_table.h"

namespace pykernels::PYKERNELS_TIER {

template <class T, class P>
void add_gated_conv_forward(GatedConvKernels&);
template <class T, class P>
void add_gated_conv_backward(GatedConvKernels&);
template <class T, class P>
void add_gated_conv_weight(GatedConvKernels&);

const GatedConvKernels* gated_conv_kernels(Dtype dtype, bool bf16_products) {
  return table_for<GatedConvKernels>(dtype, bf16_products, []<class T, class P>(GatedConvKernels& table) {
    add_gated_conv_forward<T, P>(table);
    add_gated_conv_backward<T, P>(table);
    add_gated_conv_weight<T, P>(table);
  });
}

}  // namespace pykernels::PYKERNELS_TIER
