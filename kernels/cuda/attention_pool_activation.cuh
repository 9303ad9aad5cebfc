// The activations of attention pooling, with their slopes. bfloat16 takes short forms: a score is a sum of hundreds of them, and eager
// PyTorch rounds each to 8 bits.
#pragma once

#include "attention_pool.h"
#include "elements.cuh"

namespace pykernels::cuda {

template <class T>
constexpr bool kShortForms = false;
template <>
constexpr bool kShortForms<bfloat16> = true;

template <class T>
__device__ __forceinline__ float exp_to(float x) {
  return kShortForms<T> ? __expf(x) : expf(x);
}

template <class T>
__device__ __forceinline__ float tanh_to(float x) {
  if constexpr (kShortForms<T>) {
    asm("tanh.approx.f32 %0, %0;" : "+f"(x));  // relative error 2^-11
    return x;
  } else {
    return tanhf(x);
  }
}

struct Activated {
  float value, slope;
};

// By the error function, x Phi(x). The tail Phi(-|x|) by Hastings' polynomials in 1 / (1 + p |x|) (Abramowitz and Stegun 7.1.25
// and 7.1.26): absolute error 1.3e-5 in the short form, 8e-8 in the other.
template <class T>
__device__ __forceinline__ Activated gelu(float x) {
  const float a = fabsf(x), bell = exp_to<T>(x * x * -0.5f);
  float polynomial;
  if constexpr (kShortForms<T>) {
    const float t = __fdividef(1.f, a * 0.332672527f + 1.f);
    polynomial = ((t * 0.3739278f + -0.0479399f) * t + 0.1740121f) * t;
  } else {
    const float t = 1.f / (a * 0.231641888f + 1.f);
    polynomial = ((((t * 0.530702715f + -0.726576014f) * t + 0.710706871f) * t + -0.142248368f) * t + 0.127414796f) * t;
  }
  const float tail = polynomial * bell, cdf = x < 0.f ? tail : 1.f - tail;
  return {x * cdf, cdf + x * bell * 0.398942280f};
}

// What is not used of the result costs nothing.
template <class T, PoolAct kAct>
__device__ __forceinline__ Activated activated(float x) {
  if constexpr (kAct == PoolAct::tanh) {
    const float u = tanh_to<T>(x);
    return {u, 1.f - u * u};
  } else if constexpr (kAct == PoolAct::swish) {
    const float s = sigmoid_to<T>(x), u = x * s;
    return {u, s + u * (1.f - s)};
  } else if constexpr (kAct == PoolAct::relu) {
    return {x < 0.f ? 0.f : x, x > 0.f ? 1.f : 0.f};  // NaN stays NaN
  } else {
    return gelu<T>(x);
  }
}

// Calls use(activated<T, act>).
template <class T, class Use>
__device__ __forceinline__ void with_activation(PoolAct act, Use use) {
  switch (act) {
    case PoolAct::tanh: use([](float x) { return activated<T, PoolAct::tanh>(x); }); break;
    case PoolAct::swish: use([](float x) { return activated<T, PoolAct::swish>(x); }); break;
    case PoolAct::relu: use([](float x) { return activated<T, PoolAct::relu>(x); }); break;
    case PoolAct::gelu: use([](float x) { return activated<T, PoolAct::gelu>(x); }); break;
  }
}

}  // namespace pykernels::cuda
