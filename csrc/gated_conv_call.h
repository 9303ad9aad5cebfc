// One call of gated_conv1d: its arguments checked, and seen as the CPU kernels see them. Shared by forward and backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "gated_conv.h"
#include "gated_conv_arguments.h"

namespace pykernels {

class GatedConvCall : public GatedConvArguments {
 public:
  // Throws TypeError / ValueError with the argument's name, what was wanted and what came.
  explicit GatedConvCall(const GatedConvInputs& inputs);

  void set_saved(void* saved) { GatedConvArguments::set_saved(saved, args); }

  // Rows of a block such that its panel of `channels` stays in L2 and all threads find work. Never changes a result.
  int64_t block_rows(int64_t total_rows, int64_t channels) const;

  const GatedConvKernels* kernels;
  GatedConvArgs args{};
  std::vector<Sequence> sequences;

 private:
  void lay_out_sequences(const GatedConvInputs& in);
};

// The whole forward pass into call.args.y and saved_*. Without prepacked weights they are packed inside.
void gated_conv_forward(const GatedConvCall& call, const void* prepacked);

}  // namespace pykernels
