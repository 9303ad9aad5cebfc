// The dtypes of tensors, for kernels of every device.
#pragma once

#include <cstdint>

namespace pykernels {

enum class Dtype : uint8_t { float32, bfloat16, float16, float64 };

}  // namespace pykernels
