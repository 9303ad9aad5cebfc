// The scalar types of PTX and what its instructions do with them where C++ has no operator for it.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#define PTX_BITS(type, value) __builtin_bit_cast(type, value)

namespace simt {

using u8 = uint8_t;
using s8 = int8_t;
using u16 = uint16_t;
using s16 = int16_t;
using u32 = uint32_t;
using s32 = int32_t;
using u64 = uint64_t;
using s64 = int64_t;
using u128 = unsigned __int128;
using s128 = __int128;
using f32 = float;
using f64 = double;
using f16 = _Float16;

struct bf16 {
  u16 bits;
};

inline f32 to_f32(f32 x) { return x; }
inline f32 to_f32(f16 x) { return f32(x); }
inline f32 to_f32(bf16 x) { return PTX_BITS(f32, u32(x.bits) << 16); }

enum Rounding { kNearest, kZero, kDown, kUp };

// fp32 to `kept` bits of mantissa less; NaN and infinity stay.
template <int Dropped>
inline u32 round_bits(u32 x, Rounding r) {
  if ((x & 0x7f800000) == 0x7f800000) return x & 0x7fffff ? x | 0x400000 : x;
  const u32 mask = (1u << Dropped) - 1, rest = x & mask, up = u32(1) << Dropped;
  u32 y = x & ~mask;
  switch (r) {
    case kNearest: {
      const u32 half = up >> 1;
      if (rest > half || (rest == half && y & up)) y += up;
      break;
    }
    case kZero: break;
    case kDown: y += x >> 31 && rest ? up : 0; break;
    case kUp: y += !(x >> 31) && rest ? up : 0; break;
  }
  return y;
}

inline bf16 to_bf16(f32 x, Rounding r = kNearest) {
  const u32 bits = PTX_BITS(u32, x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {u16(round_bits<16>(bits, r) >> 16)};
}

inline f16 to_f16(f32 x, Rounding r = kNearest) {
  const f16 y = f16(x);
  if (x != x) return PTX_BITS(f16, u16(0x7fff));
  if (r == kNearest || f32(y) == x) return y;
  const u16 bits = PTX_BITS(u16, y);
  // The neighbours of a magnitude are one bit pattern apart, infinity included.
  const bool away = std::fabs(f32(y)) > std::fabs(x), negative = std::signbit(x);
  const bool want_away = (r == kUp && !negative) || (r == kDown && negative);
  return PTX_BITS(f16, u16(bits + (want_away ? !away : -int(away))));
}

inline u32 to_tf32_rna(f32 x) {
  const u32 bits = PTX_BITS(u32, x);
  return (bits & 0x7f800000) == 0x7f800000 ? (bits & 0x7fffff ? 0x7fffffffu : bits) : (bits + 0x1000u) & 0xffffe000u;
}

// A double on its way to a narrower type: inexact sums get an odd last bit, so that the second rounding is the only one that counts.
inline f64 odd_sum(f64 a, f64 b) {
  const f64 s = a + b, t = s - a, error = (a - (s - t)) + (b - t);
  u64 bits = PTX_BITS(u64, s);
  if (error == 0 || !std::isfinite(s) || bits & 1) return s;
  bits += (error > 0) == (s > 0) ? 1 : -1;
  return PTX_BITS(f64, bits);
}

inline f32 odd_f32(f64 x) {  // to fp32, rounded to odd: narrower types have over 2 bits less
  f32 y = f32(x);
  if (f64(y) == x || !std::isfinite(y)) return y;
  u32 bits = PTX_BITS(u32, y);
  if (std::fabs(f64(y)) > std::fabs(x)) bits--;
  return PTX_BITS(f32, bits | 1);
}

inline f32 fma_narrow(f32 a, f32 b, f32 c) { return odd_f32(odd_sum(f64(a) * f64(b), f64(c))); }

inline f32 flush(f32 x) { return std::fabs(x) < std::numeric_limits<f32>::min() ? std::copysign(0.0f, x) : x; }
template <class T>
inline T saturate(T x) {
  return x > T(0) ? (x < T(1) ? x : T(1)) : T(0);
}

template <class T>
inline T max_nan(T a, T b) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : std::fmax(a, b);
}
template <class T>
inline T min_nan(T a, T b) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : std::fmin(a, b);
}
// fmax and fmin leave the sign of equal zeros open; PTX has -0 < +0.
template <class T>
inline T max_number(T a, T b) {
  return a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b);
}
template <class T>
inline T min_number(T a, T b) {
  return a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b);
}

// Out of range values clamp, NaN gives 0 (the top bit alone for 64 bits).
template <class To, class From>
inline To to_integer(From value, Rounding r) {
  f64 x = f64(value);
  if (x != x) return sizeof(To) == 8 ? To(u64(1) << 63) : To(0);
  switch (r) {
    case kNearest: x = std::nearbyint(x); break;
    case kZero: x = std::trunc(x); break;
    case kDown: x = std::floor(x); break;
    case kUp: x = std::ceil(x); break;
  }
  if (x <= f64(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (x >= f64(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return To(x);
}

template <class T>
inline T to_integral(T x, Rounding r) {
  switch (r) {
    case kNearest: return std::nearbyint(x);
    case kZero: return std::trunc(x);
    case kDown: return std::floor(x);
    default: return std::ceil(x);
  }
}

// Directed roundings of fp32 and fp64, in numbers.cpp.
template <class T>
T add_rounded(T, T, Rounding);
template <class T>
T mul_rounded(T, T, Rounding);
template <class T>
T div_rounded(T, T, Rounding);
template <class T>
T fma_rounded(T, T, T, Rounding);
template <class T>
T sqrt_rounded(T, Rounding);
f32 f64_to_f32(f64, Rounding);
template <class To, class From>
To integer_to_float(From, Rounding);

template <class T>
inline T divide(T a, T b) {  // by zero: all bits set, which PTX leaves open
  if (!b) return T(~T(0));
  if (std::is_signed_v<T> && b == T(-1)) return T(0 - std::make_unsigned_t<T>(a));
  return T(a / b);
}
template <class T>
inline T remainder(T a, T b) {
  if (!b) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return T(a % b);
}

template <class T>
inline T clamp_to(s64 x) {
  const s64 low = s64(std::numeric_limits<T>::min()), high = s64(std::numeric_limits<T>::max());
  return T(x < low ? low : x > high ? high : x);
}

template <class T>
inline T shift_left(T a, u32 n) {
  return n >= sizeof(T) * 8 ? T(0) : T(a << n);
}
template <class T>
inline T shift_right(T a, u32 n) {
  constexpr u32 bits = sizeof(T) * 8;
  if (std::is_signed_v<T>) return T(a >> (n >= bits ? bits - 1 : n));
  return n >= bits ? T(0) : T(a >> n);
}
inline u32 funnel_left(u32 low, u32 high, u32 n) { return n >= 32 ? low : n ? high << n | low >> (32 - n) : high; }
inline u32 funnel_right(u32 low, u32 high, u32 n) { return n >= 32 ? high : n ? low >> n | high << (32 - n) : low; }

inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 r = 0;
  for (u32 i = 0; i < 8; i++)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}

inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64(b) << 32 | a;
  u32 r = 0;
  for (u32 i = 0; i < 4; i++) {
    const u32 s = selector >> 4 * i & 15;
    u32 byte = u32(bytes >> 8 * (s & 7)) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * i;
  }
  return r;
}

template <class T>
inline T extract_bits(T a, u32 position, u32 length) {
  constexpr u32 bits = sizeof(T) * 8;
  using U = std::make_unsigned_t<T>;
  position &= 255, length &= 255;
  if (!length) return 0;
  const u32 top = position + length - 1 < bits - 1 ? position + length - 1 : bits - 1;
  const bool sign = std::is_signed_v<T> && U(a) >> top & 1;
  U r = position < bits ? U(U(a) >> position) : U(0);
  const u32 valid = position < bits ? top - position + 1 : 0;
  if (valid < bits) {
    const U mask = U((U(1) << valid) - 1);
    r = U((r & mask) | (sign ? U(~mask) : U(0)));
  }
  return T(r);
}

template <class T>
inline T insert_bits(T a, T b, u32 position, u32 length) {
  constexpr u32 bits = sizeof(T) * 8;
  position &= 255, length &= 255;
  if (position >= bits || !length) return b;
  const T ones = length >= bits ? T(~T(0)) : T((T(1) << length) - 1);
  const T mask = T(ones << position);
  return T((b & ~mask) | (T(a << position) & mask));
}

template <class T>
inline T reverse_bits(T a) {
  T r = 0;
  for (u32 i = 0; i < sizeof(T) * 8; i++) r = T(r << 1 | (a >> i & 1));
  return r;
}

template <class T>
inline u32 count_leading_zeros(T a) {
  return !a ? sizeof(T) * 8 : sizeof(T) == 8 ? u32(__builtin_clzll(a)) : u32(__builtin_clz(u32(a)));
}

template <class T>
inline u32 highest_bit(T a, bool as_shift) {  // of a negative number: the highest zero
  using U = std::make_unsigned_t<T>;
  const U x = std::is_signed_v<T> && a < 0 ? U(~U(a)) : U(a);
  if (!x) return ~0u;
  const u32 zeros = count_leading_zeros(x);
  return as_shift ? zeros : u32(sizeof(T) * 8 - 1 - zeros);
}

inline u32 bit_mask(u32 position, u32 length, bool wrap) {
  if (wrap) position &= 31, length &= 31;
  if (position >= 32) return 0;
  return u32(length >= 32 ? ~0u << position : ((1u << length) - 1) << position);
}

template <class A, class B>
inline u32 dot_bytes(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 4; i++) c += u32(s32(A(a >> 8 * i)) * s32(B(b >> 8 * i)));
  return c;
}

}  // namespace simt
