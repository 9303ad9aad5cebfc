// One vector register of the tier: load, store, convert, exp, sigmoid, tanh, transpose.
//
// Everything here lives in the tier's own namespace and has internal linkage: each tier is a translation unit with flags of its own, and a
// symbol shared between tiers could leave AVX-512 code in the generic path. For the same reason no std:: template and no torch header.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PYKERNELS_INLINE inline __attribute__((always_inline))

namespace pykernels {

// Storage types: bits only, arithmetic happens in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace PYKERNELS_TIER {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class C>
constexpr int kLanes = kVectorBytes / int(sizeof(C));

template <class C, int Bytes = kVectorBytes>
struct VecOf {
  typedef C type __attribute__((vector_size(Bytes)));
};
template <class C>
using Vec = typename VecOf<C>::type;

using vfloat = Vec<float>;
using vint = Vec<int32_t>;
using vuint = Vec<uint32_t>;
typedef VecOf<uint16_t, kVectorBytes / 2>::type vhalf;  // as many 16-bit lanes as floats in a vector

template <class To, class From>
PYKERNELS_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
constexpr T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T max(T a, T b) {
  return a > b ? a : b;
}
constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class C>
PYKERNELS_INLINE Vec<C> broadcast(C value) {
  return value - Vec<C>{};  // not zeros + value, which no compiler may leave out: -0 would change
}

// ---- load and store, with conversion between the storage type T and the arithmetic type C -------------------------------------------

PYKERNELS_INLINE vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}

PYKERNELS_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}

PYKERNELS_INLINE vfloat widen_bf16(vhalf h) { return bit_cast<vfloat>(__builtin_convertvector(h, vuint) << 16); }

PYKERNELS_INLINE vfloat widen_f16(vhalf h) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (vfloat)_mm256_cvtph_ps((__m128i)h);
#else
  vfloat v;
  for (int i = 0; i < kLanes<float>; i++) v[i] = float(bit_cast<_Float16>(uint16_t(h[i])));
  return v;
#endif
}

PYKERNELS_INLINE vhalf narrow_bf16(vfloat v) {
#if defined(__AVX512BF16__)
  return (vhalf)_mm512_cvtneps_pbh((__m512)v);
#else
  vuint u = bit_cast<vuint>(v);
  vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // nearest, ties to even
  vuint quiet_nan = (u >> 16) | 0x40;
  return __builtin_convertvector((v == v) ? rounded : quiet_nan, vhalf);
#endif
}

PYKERNELS_INLINE vhalf narrow_f16(vfloat v) {
#if defined(__AVX512F__)
  return (vhalf)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vhalf)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vhalf h;
  for (int i = 0; i < kLanes<float>; i++) h[i] = bit_cast<uint16_t>(_Float16(float(v[i])));
  return h;
#endif
}

PYKERNELS_INLINE vfloat load(const bf16* p) {
  vhalf h;
  memcpy(&h, p, sizeof h);
  return widen_bf16(h);
}

PYKERNELS_INLINE vfloat load(const f16* p) {
  vhalf h;
  memcpy(&h, p, sizeof h);
  return widen_f16(h);
}

PYKERNELS_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
PYKERNELS_INLINE void store(double* p, Vec<double> v) { memcpy(p, &v, sizeof v); }
PYKERNELS_INLINE void store(bf16* p, vfloat v) {
  vhalf h = narrow_bf16(v);
  memcpy(p, &h, sizeof h);
}
PYKERNELS_INLINE void store(f16* p, vfloat v) {
  vhalf h = narrow_f16(v);
  memcpy(p, &h, sizeof h);
}

// The first n lanes, never a byte more; the other lanes load as zero.
template <class T>
PYKERNELS_INLINE auto load_n(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    vhalf h = (vhalf)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    if constexpr (__is_same(T, bf16))
      return widen_bf16(h);
    else
      return widen_f16(h);
  } else if constexpr (sizeof(T) == 4) {
    return (vfloat)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  } else
#endif
  {
    constexpr int lanes = sizeof(T) == 8 ? kLanes<double> : kLanes<float>;
    T buffer[lanes];
    memset(buffer, 0, sizeof buffer);
    for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
    return load(buffer);
  }
}

template <class T, class V>
PYKERNELS_INLINE void store_n(T* p, V v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, bf16)) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)narrow_bf16(v));
  } else if constexpr (__is_same(T, f16)) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)narrow_f16(v));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  } else
#endif
  {
    T buffer[sizeof(T) == 8 ? kLanes<double> : kLanes<float>];
    store(buffer, v);
    for (int64_t i = 0; i < n; i++) p[i] = buffer[i];
  }
}

// The arithmetic type of a storage type.
template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

template <class T>
PYKERNELS_INLINE Arithmetic<T> load_scalar(const T* p) {
  if constexpr (__is_same(T, bf16)) {
    return bit_cast<float>(uint32_t(p->bits) << 16);
  } else if constexpr (__is_same(T, f16)) {
#if defined(__F16C__)
    return _cvtsh_ss(p->bits);
#else
    return float(bit_cast<_Float16>(p->bits));
#endif
  } else {
    return *p;
  }
}

template <class T>
PYKERNELS_INLINE void store_scalar(T* p, Arithmetic<T> v) {
  if constexpr (__is_same(T, bf16)) {
    uint32_t u = bit_cast<uint32_t>(v);
    p->bits = uint16_t(v == v ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : (u >> 16) | 0x40);
  } else if constexpr (__is_same(T, f16)) {
#if defined(__F16C__)
    p->bits = uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    p->bits = bit_cast<uint16_t>(_Float16(v));
#endif
  } else {
    *p = v;
  }
}

// Loads and stores of one vector of columns of which n exist.
template <class T>
PYKERNELS_INLINE auto load_columns(const T* p, int64_t n) {
  return n >= kLanes<Arithmetic<T>> ? load(p) : load_n(p, n);
}
template <class T, class V>
PYKERNELS_INLINE void store_columns(T* p, V v, int64_t n) {
  if (n >= kLanes<Arithmetic<T>>)
    store(p, v);
  else
    store_n(p, v, n);
}

// ---- elementary functions ------------------------------------------------------------------------------------------------------------

// e^x for x in [-87.3, 88.3], clamped outside; about 1 ulp. NaN stays NaN: each clamp keeps x when the comparison is false.
PYKERNELS_INLINE vfloat exp(vfloat x) {
  x = x < -87.3f ? broadcast(-87.3f) : x;
  x = x > 88.3f ? broadcast(88.3f) : x;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer that sits in the low mantissa bits
  vfloat shifted = x * 1.44269504f + magic;
  vfloat n = shifted - magic;
  vfloat r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  vint exponent = (bit_cast<vint>(shifted) - bit_cast<int32_t>(magic) + 127) << 23;
  return p * bit_cast<vfloat>(exponent);
}

// p / q for normal numbers, to about 1 ulp: one Newton step on 14 bits takes half the time of a division.
PYKERNELS_INLINE vfloat quotient(vfloat p, vfloat q) {
#if defined(__AVX512F__)
  const vfloat r = (vfloat)_mm512_rcp14_ps((__m512)q), t = p * r;
  return t + r * (p - t * q);
#else
  return p / q;
#endif
}

// x * P(x^2) / Q(x^2), fitted to relative error 2^-25 up to 9.02, where tanh rounds to 1; to 3.5 * 2^-23 as it is computed.
PYKERNELS_INLINE vfloat tanh(vfloat x) {
  x = x < -9.02f ? broadcast(-9.02f) : x;  // NaN stays NaN
  x = x > 9.02f ? broadcast(9.02f) : x;
  const vfloat z = x * x;
  const vfloat p = (((z * 1.33188999e-8f + 2.05833530e-5f) * z + 3.49402661e-3f) * z + 1.33797109e-1f) * z + 1.f;
  const vfloat q = (((z * 7.76194724e-7f + 3.28308000e-4f) * z + 2.58710440e-2f) * z + 4.67130274e-1f) * z + 1.f;
  vfloat t = quotient(x * p, q);
  t = t < -1.f ? broadcast(-1.f) : t;
  return t > 1.f ? broadcast(1.f) : t;
}

// Functions for results that are stored as T. bf16 keeps 8 bits: 13 of them cost half the instructions.

// e^x: 2^t by a cubic.
template <class T>
PYKERNELS_INLINE vfloat exp_to(vfloat x) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, bf16)) {
    // The operand order of min and max keeps NaN.
    const __m512 t = _mm512_max_ps(_mm512_set1_ps(-126.f), _mm512_min_ps(_mm512_set1_ps(126.f), (__m512)(x * 1.44269504f)));
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vfloat f = (vfloat)t - (vfloat)n;
    const vfloat p = ((f * 0.0551716649f + 0.242611122f) * f + 0.693260986f) * f + 0.999928074f;
    return (vfloat)_mm512_scalef_ps((__m512)p, n);
  }
#endif
  return exp(x);
}

template <class T>
PYKERNELS_INLINE vfloat reciprocal_to(vfloat x) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, bf16)) return (vfloat)_mm512_rcp14_ps((__m512)x);
#endif
  return 1.f / x;
}

template <class T>
PYKERNELS_INLINE vfloat sigmoid_to(vfloat x) {
  return reciprocal_to<T>(exp_to<T>(-x) + 1.f);
}

// Lambert's continued fraction, cut where it is within 2.2e-4 of tanh 4, which rounds to 1 as a bf16.
template <class T>
PYKERNELS_INLINE vfloat tanh_to(vfloat x) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, bf16)) {
    x = (vfloat)_mm512_max_ps(_mm512_set1_ps(-4.f), _mm512_min_ps(_mm512_set1_ps(4.f), (__m512)x));
    const vfloat z = x * x, p = (z * 21.f + 1260.f) * z + 10395.f, q = ((z + 210.f) * z + 4725.f) * z + 10395.f;
    return x * p * (vfloat)_mm512_rcp14_ps((__m512)q);
  }
#endif
  return tanh(x);
}

PYKERNELS_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = __builtin_exp(x[i]);
  return x;
}

template <class T>
PYKERNELS_INLINE Vec<double> sigmoid_to(Vec<double> x) {
  return 1.0 / (1.0 + exp(-x));
}

template <class T>
PYKERNELS_INLINE Vec<double> tanh_to(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = __builtin_tanh(x[i]);
  return x;
}

// Sum of all lanes, halves first.
template <class V>
PYKERNELS_INLINE auto sum_lanes(V v) {
  using C = decltype(v[0] + v[0]);
  constexpr int W = sizeof(V) / sizeof(C);
  C lanes[W];
  memcpy(lanes, &v, sizeof v);
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// ---- transpose -----------------------------------------------------------------------------------------------------------------------

template <class V>
struct ShuffleIndex {
  using type = vint;
};
template <>
struct ShuffleIndex<Vec<double>> {
  using type = Vec<int64_t>;
};

// In place, by swapping the off-diagonal halves of ever larger blocks (Eklundh 1972): log2(W) rounds of W two-register shuffles.
template <int D = 1, class V, int W>
PYKERNELS_INLINE void transpose(V (&v)[W]) {
  if constexpr (D < W) {
    typename ShuffleIndex<V>::type upper, lower;
    for (int l = 0; l < W; l++) {
      upper[l] = l & D ? W + l - D : l;
      lower[l] = l & D ? W + l : l + D;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      if (i & D) continue;
      V a = v[i], b = v[i + D];
      v[i] = __builtin_shuffle(a, b, upper);
      v[i + D] = __builtin_shuffle(a, b, lower);
    }
    transpose<2 * D>(v);
  }
}

}  // namespace
}  // namespace PYKERNELS_TIER
}  // namespace pykernels
