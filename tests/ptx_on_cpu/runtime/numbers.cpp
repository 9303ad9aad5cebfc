// Arithmetic in a directed rounding mode. Compiled with -frounding-math; volatile keeps the operation between the two mode switches.
#include "numbers.h"

#include <cfenv>

namespace simt {
namespace {

class InMode {
 public:
  explicit InMode(Rounding r) : before_(fegetround()) {
    constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    fesetround(kModes[r]);
  }
  ~InMode() { fesetround(before_); }

 private:
  int before_;
};

template <class T, class Operation>
T rounded(Rounding r, Operation operation) {
  const InMode mode(r);
  volatile T result = operation();
  return result;
}

}  // namespace

template <class T>
T add_rounded(T a, T b, Rounding r) {
  volatile T x = a, y = b;
  return rounded<T>(r, [&] { return x + y; });
}

template <class T>
T mul_rounded(T a, T b, Rounding r) {
  volatile T x = a, y = b;
  return rounded<T>(r, [&] { return x * y; });
}

template <class T>
T div_rounded(T a, T b, Rounding r) {
  volatile T x = a, y = b;
  return rounded<T>(r, [&] { return x / y; });
}

template <class T>
T fma_rounded(T a, T b, T c, Rounding r) {
  volatile T x = a, y = b, z = c;
  return rounded<T>(r, [&] { return std::fma(T(x), T(y), T(z)); });
}

template <class T>
T sqrt_rounded(T a, Rounding r) {
  volatile T x = a;
  return rounded<T>(r, [&] { return std::sqrt(T(x)); });
}

f32 f64_to_f32(f64 a, Rounding r) {
  volatile f64 x = a;
  return rounded<f32>(r, [&] { return f32(x); });
}

template <class To, class From>
To integer_to_float(From a, Rounding r) {
  volatile From x = a;
  return rounded<To>(r, [&] { return To(x); });
}

#define PTX_FLOAT(T)                             \
  template T add_rounded(T, T, Rounding);        \
  template T mul_rounded(T, T, Rounding);        \
  template T div_rounded(T, T, Rounding);        \
  template T fma_rounded(T, T, T, Rounding);     \
  template T sqrt_rounded(T, Rounding);          \
  template T integer_to_float<T>(s32, Rounding); \
  template T integer_to_float<T>(u32, Rounding); \
  template T integer_to_float<T>(s64, Rounding); \
  template T integer_to_float<T>(u64, Rounding);
PTX_FLOAT(f32)
PTX_FLOAT(f64)

}  // namespace simt
