// One call of gated_conv1d as the kernels of every device see it.
#pragma once

#include <cstdint>

namespace pykernels {

enum class Residual : uint8_t { highway, add, none };
enum class ValueAct : uint8_t { identity, tanh };
enum class GateRandom : uint8_t { none, dropout, noise };

struct GatedConvForm {
  int64_t c_in, c_out, taps, dilation, left, shift;

  const void *value_bias, *gate_bias;  // [c_out] or null
  const void *value_cond, *gate_cond;  // rows of c_out at distance cond_row: one per output row, or one per sequence; or null
  int64_t cond_row;
  bool cond_per_row;

  Residual residual;
  ValueAct value_act;
  GateRandom random;
  uint64_t seed;
  uint32_t keep_threshold;  // dropout: keep iff draw < keep_threshold
  float random_scale;       // dropout: 65536 / keep_threshold; noise: its amplitude

  void* y;                         // [out rows, c_out]
  void *saved_value, *saved_gate;  // v and g, [out rows, c_out], or null
};

}  // namespace pykernels
