// Every access of a kernel goes through these: the address is checked, then read or written as a plain object that sanitizers see.
#pragma once
#include "counters.h"
#include "numbers.h"
#include "simt.h"

namespace simt {

// The allowed range that was hit last; all of memory but the lowest pages while no ranges are set.
struct Window {
  u64 low, high;
};
extern Window windows[2];  // [0] for reads, [1] for writes
constexpr u64 kLowest = 65536;

struct Range {
  u64 low, high;
  u64 writable;
};

extern "C" {
// The memory that kernels may touch, besides variables of modules and cudaMalloc's. count < 0: anything.
void ptx_set_ranges(int count, const Range*);
void ptx_add_range(u64 low, u64 bytes, int writable);
void ptx_remove_range(u64 low);
}

void find_range(Thread&, u64 address, u32 bytes, bool write, const Site*);
[[noreturn, gnu::cold]] void misaligned(Thread&, u64 address, u32 bytes, const Site*);
[[noreturn, gnu::cold]] void outside_shared(Thread&, u64 offset, u32 bytes, const Site*);

template <bool Write>
inline u64 at_global(Thread& t, u64 address, u32 bytes, const Site* s) {
  if (address & (bytes - 1)) misaligned(t, address, bytes, s);
  const Window& w = windows[Write];
  if (address < w.low || address + bytes > w.high) find_range(t, address, bytes, Write, s);
  PTX_ACCESS(t, kGlobal, Write, address, bytes, s);
  return address;
}

template <bool Write>
inline u64 at_shared(Thread& t, u64 offset, u32 bytes, const Site* s) {
  if (offset & (bytes - 1)) misaligned(t, offset, bytes, s);
  if (u32(offset) + u64(bytes) > t.shared_bytes) outside_shared(t, u32(offset), bytes, s);
  PTX_ACCESS(t, kShared, Write, u32(offset), bytes, s);
  return u64(t.shared) + u32(offset);
}

// A generic address is the host's: shared memory and the stacks lie in it like everything else.
template <bool Write>
inline u64 at_generic(Thread& t, u64 address, u32 bytes, const Site* s) {
  const u64 offset = address - u64(t.shared);
  if (offset < kSharedWindow) return at_shared<Write>(t, offset, bytes, s);
  if (on_stack(t, address)) {
    if (address & (bytes - 1)) misaligned(t, address, bytes, s);
    return address;
  }
  return at_global<Write>(t, address, bytes, s);
}

template <bool Write>
inline u64 at_local(Thread& t, u64 address, u32 bytes, const Site* s) {
  if (address & (bytes - 1)) misaligned(t, address, bytes, s);
  return address;
}

// May alias anything, as memory of a kernel does; plain typed accesses, because ThreadSanitizer overlooks small memcpys.
template <class T>
struct Cell {
  typedef T type __attribute__((may_alias));
};

template <class T>
inline T load(u64 address) {
  return *reinterpret_cast<const typename Cell<T>::type*>(address);
}
template <class T>
inline void store(u64 address, T value) {
  *reinterpret_cast<typename Cell<T>::type*>(address) = value;
}
// .volatile, .relaxed, .acquire and .release: no data race for ThreadSanitizer, and ordering where the instruction has it.
template <class T>
inline T load_atomic(u64 address, [[maybe_unused]] int order) {
#if defined(SIMT_TSAN)
  return __atomic_load_n(reinterpret_cast<T*>(address), order);
#else
  return load<T>(address);
#endif
}
template <class T>
inline void store_atomic(u64 address, T value, [[maybe_unused]] int order) {
#if defined(SIMT_TSAN)
  __atomic_store_n(reinterpret_cast<T*>(address), value, order);
#else
  store<T>(address, value);
#endif
}

// Fibers switch at barriers only, so an update is atomic by itself; ThreadSanitizer must be told.
template <class T, class Update>
inline T atomic(u64 address, Update update) {
  PTX_ATOMIC();
#if defined(SIMT_TSAN)
  T* p = reinterpret_cast<T*>(address);
  T before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &before, T(update(before)), false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  return before;
#else
  const T before = load<T>(address);
  store<T>(address, T(update(before)));
  return before;
#endif
}

// cp.async: the copy happens when the thread waits for its group. Until then the target holds 0xFF bytes.
void copy_async(Thread&, u64 to_shared, u64 from, u32 bytes, u32 source_bytes, const Site*);
void copy_wait(Thread&, u32 groups_left);

}  // namespace simt
