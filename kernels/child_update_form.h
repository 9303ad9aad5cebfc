// One step of ChildTuning's optimizers as the kernels of every device see it.
//
//   AdamW   m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2     d = step_size * m / (root_scale * sqrt(v) + eps)
//           p = before * p - d, then p -= after * p
//   SGD     g += decay * p     m = momentum * m + gain * g     d = lr * (g + momentum * m), or lr * m, or lr * g     p -= d
//
// g and d are masked by bits that are drawn by the kernels, or stored with the parameter. With stored bits the moments of the reserved
// elements alone can be kept, one after the other.
#pragma once

#include <cstdint>

namespace pykernels {

// Elements start + k * stride + [0, length) of the whole tensor, k = 0, 1, ...
struct ElementRun {
  int64_t start, length, stride;
};

// What all tensors of a call share.
struct ChildArgs {
  bool mask_grad, mask_update;  // which of g and d the bits select from
  bool reserved_decay;          // only selected elements decay
  double grad_factor;           // of g: scale, clipping, sign, what keeps the mean of drawn masks
  double update_factor;         // of d, where it is masked
  uint64_t seed;
  uint32_t threshold;  // of drawn bits; 0 where none are drawn
  bool stochastic;     // bf16 is rounded by random bits

  double beta1, beta2, eps, before, after;  // AdamW
  double lr, momentum, gain, weight_decay;
  bool nesterov;  // SGD
};

// One tensor; C is double for double, else float.
struct ChildTensor {
  void* p;
  const void* g;
  void *m, *v;             // C, null where the rule has none
  const uint8_t* mask;     // stored bits, or null
  bool compact;            // m and v hold the selected elements alone
  const ElementRun* runs;  // null: the tensor is whole
  int64_t run_elements;    // local elements that a run describes
  uint32_t stream, step;
  bool first;                    // SGD: m is set to g
  double step_size, root_scale;  // AdamW
};

}  // namespace pykernels
