// What AdamW and SGD make of a gradient and its moments, one element at a time. Each rounding is written down: with compact moments and
// without, the same bits come out.
#pragma once

#include <cuda_bf16.h>

#include "child_update.h"
#include "elements.cuh"

namespace pykernels::cuda {

struct AdamW {
  static constexpr bool kSecond = true;  // has a second moment
  float beta1, beta2, rest1, rest2, step_size, root_scale, eps, before, after;

  __device__ AdamW(const ChildArgs& a, const ChildTensor& t)
      : beta1(float(a.beta1)),
        beta2(float(a.beta2)),
        rest1(float(1 - a.beta1)),
        rest2(float(1 - a.beta2)),
        step_size(float(t.step_size)),
        root_scale(float(t.root_scale)),
        eps(float(a.eps)),
        before(float(a.before)),
        after(float(a.after)) {}

  // What is subtracted from p, before it is masked.
  __device__ __forceinline__ float step(float g, float, float& m, float& v) const {
    m = __fmaf_rn(m, beta1, __fmul_rn(rest1, g));
    v = __fmaf_rn(v, beta2, __fmul_rn(rest2, __fmul_rn(g, g)));
    return __fdiv_rn(__fmul_rn(step_size, m), __fmaf_rn(__fsqrt_rn(v), root_scale, eps));
  }
};

struct Sgd {
  static constexpr bool kSecond = false;
  float momentum, gain, lr, decay, before = 1, after = 0;
  bool nesterov, first;

  __device__ Sgd(const ChildArgs& a, const ChildTensor& t)
      : momentum(float(a.momentum)),
        gain(float(a.gain)),
        lr(float(a.lr)),
        decay(float(a.weight_decay)),
        nesterov(a.nesterov),
        first(t.first) {}

  // decayed: p where it decays, else 0.
  __device__ __forceinline__ float step(float g, float decayed, float& m, float&) const {
    if (decay != 0) g = __fmaf_rn(decay, decayed, g);
    if (momentum != 0) {
      m = first ? g : __fmaf_rn(momentum, m, __fmul_rn(gain, g));
      g = nesterov ? __fmaf_rn(momentum, m, g) : m;
    }
    return __fmul_rn(lr, g);
  }
};

template <class Rule>
__device__ __forceinline__ float apply(const Rule& rule, float p, float d, bool decays) {
  p = __fmaf_rn(decays ? rule.before : 1.f, p, -d);
  return decays && rule.after != 0 ? __fmaf_rn(-rule.after, p, p) : p;
}

// To bfloat16 by a random number below one unit of the last place in place of a half; NaN stays NaN. A bfloat16 as a float.
__device__ __forceinline__ float round_by(float v, uint32_t draw) {
  const uint32_t u = __float_as_uint(v);
  return __uint_as_float((v == v ? u + draw : u | 0x400000u) & 0xffff0000u);
}

}  // namespace pykernels::cuda
