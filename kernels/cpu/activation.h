// The activations of attention pooling, with their slopes. Values of T are what the result is rounded to in the end: bf16 takes the short
// forms of vec.h, since a score is a sum of hundreds of them and eager PyTorch rounds each to 8 bits.
#pragma once

#include "attention_pool.h"
#include "vec.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

template <class V>
struct Activated {
  V value, slope;
};

// Gaussian tail: Phi(-|x|) with e^(-x^2/2). erfc by Hastings' polynomials in 1 / (1 + p |x|) (Abramowitz and Stegun 7.1.25 and 7.1.26):
// absolute error 1.3e-5 for bf16 and 8e-8 else.
template <class T>
PYKERNELS_INLINE Activated<vfloat> gaussian_tail(vfloat x) {
  const vfloat a = x < 0.f ? -x : x, bell = exp_to<T>(x * x * -0.5f);
  vfloat polynomial;
  if constexpr (__is_same(T, bf16)) {
    const vfloat t = reciprocal_to<T>(a * 0.332672527f + 1.f);
    polynomial = ((t * 0.3739278f + -0.0479399f) * t + 0.1740121f) * t;
  } else {
    const vfloat t = 1.f / (a * 0.231641888f + 1.f);
    polynomial = ((((t * 0.530702715f + -0.726576014f) * t + 0.710706871f) * t + -0.142248368f) * t + 0.127414796f) * t;
  }
  return {polynomial * bell, bell};
}

// GELU by the error function, x Phi(x), not its tanh approximation.
template <class T>
PYKERNELS_INLINE Activated<vfloat> gelu(vfloat x) {
  const Activated<vfloat> tail = gaussian_tail<T>(x);
  const vfloat cdf = x < 0.f ? tail.value : 1.f - tail.value;
  return {x * cdf, cdf + x * tail.slope * 0.398942280f};
}

template <class T>
PYKERNELS_INLINE Activated<Vec<double>> gelu(Vec<double> x) {
  Vec<double> cdf;
  for (int i = 0; i < kLanes<double>; i++) cdf[i] = 0.5 * __builtin_erfc(x[i] * -0.70710678118654752440);
  return {x * cdf, cdf + x * exp(x * x * -0.5) * 0.39894228040143267794};
}

// What is not used of the result costs nothing.
template <class T, PoolAct kAct, class V>
PYKERNELS_INLINE Activated<V> activate(V x) {
  using C = decltype(x[0] + x[0]);
  if constexpr (kAct == PoolAct::tanh) {
    const V u = tanh_to<T>(x);
    return {u, C(1) - u * u};
  } else if constexpr (kAct == PoolAct::swish) {
    const V s = sigmoid_to<T>(x), u = x < C(-87) ? V{} : x * s;  // s stops at e^-87, x goes on
    return {u, s + u * (C(1) - s)};
  } else if constexpr (kAct == PoolAct::relu) {
    return {x < C(0) ? V{} : x, x > C(0) ? V{} + C(1) : V{}};  // NaN stays NaN
  } else {
    return gelu<T>(x);
  }
}

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
