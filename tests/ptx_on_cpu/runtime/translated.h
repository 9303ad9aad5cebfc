// What translated kernels include. Names of one letter keep the generated text short: t is the thread, P its parameters, S a site.
#pragma once
#include "counters.h"
#include "memory.h"
#include "mma.h"
#include "numbers.h"
#include "simt.h"
#include "warp.h"

#define S(k) (sites + (k))

// Where a module's table goes: to the stand-in runtime of its library, or out of a library that has no host code.
#if defined(PTX_EXPORT)
extern "C" __attribute__((visibility("default"), weak)) const simt::Module* ptx_exported_module = nullptr;
#define PTX_ADD_MODULE(m) (ptx_exported_module = (m))
#else
extern "C" __attribute__((visibility("hidden"))) void ptx_add_module(const simt::Module*);
#define PTX_ADD_MODULE(m) ptx_add_module(m)
#endif

namespace simt {

// Device functions that nvcc expects from the system: printf and assert.
void device_printf(Thread&, u64 format, u64 arguments, const Site*);
[[noreturn]] void device_assert(Thread&, u64 message, u64 file, u32 line, u64 function, const Site*);

struct Pair {
  u32 low, high;
};

template <class T, class Operation>
inline u32 each_half(u32 a, Operation operation) {
  const T low = operation(PTX_BITS(T, u16(a))), high = operation(PTX_BITS(T, u16(a >> 16)));
  return u32(PTX_BITS(u16, high)) << 16 | PTX_BITS(u16, low);
}
template <class T, class Operation>
inline u32 each_half(u32 a, u32 b, Operation operation) {
  const T low = operation(PTX_BITS(T, u16(a)), PTX_BITS(T, u16(b)));
  const T high = operation(PTX_BITS(T, u16(a >> 16)), PTX_BITS(T, u16(b >> 16)));
  return u32(PTX_BITS(u16, high)) << 16 | PTX_BITS(u16, low);
}
template <class T, class Operation>
inline u32 each_half(u32 a, u32 b, u32 c, Operation operation) {
  const T low = operation(PTX_BITS(T, u16(a)), PTX_BITS(T, u16(b)), PTX_BITS(T, u16(c)));
  const T high = operation(PTX_BITS(T, u16(a >> 16)), PTX_BITS(T, u16(b >> 16)), PTX_BITS(T, u16(c >> 16)));
  return u32(PTX_BITS(u16, high)) << 16 | PTX_BITS(u16, low);
}

template <class T>
inline T from_f32(f32 x, Rounding r = kNearest) {
  if constexpr (std::is_same_v<T, bf16>)
    return to_bf16(x, r);
  else if constexpr (std::is_same_v<T, f16>)
    return to_f16(x, r);
  else
    return T(x);
}

inline u64 next_clock() {
  static u64 ticks = 0;
  return ++ticks;
}

// ldmatrix and stmatrix: every eighth of the warp names the rows of one matrix; further lanes' addresses are not looked at.
inline void load_matrices(Thread& t, u32 count, bool transposed, u64 offset, u32* registers, const Site* s) {
  Row row = {};
  if (t.lane < 8 * count) {
    const u64 at = at_shared<false>(t, offset, 16, s);
    for (int i = 0; i < 4; i++) row.word[i] = load<u32>(at + 4 * i);
  }
  exchange_rows(t, count, transposed, row, registers, s);
}
inline void store_matrices(Thread& t, u32 count, bool transposed, u64 offset, const u32* registers, const Site* s) {
  Row row = {};
  exchange_fragments(t, count, transposed, registers, row, s);
  if (t.lane < 8 * count) {
    const u64 at = at_shared<true>(t, offset, 16, s);
    for (int i = 0; i < 4; i++) store<u32>(at + 4 * i, row.word[i]);
  }
}

}  // namespace simt
