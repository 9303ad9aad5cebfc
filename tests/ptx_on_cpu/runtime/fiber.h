// Fibers: stacks that switch to each other inside one OS thread, announced to the sanitizers when the build has one.
#pragma once
#include <pthread.h>
#include <sys/mman.h>

#include <new>

#include "simt.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// The scheduler itself is not instrumented (README.md), so these come by hand.
#if defined(PTX_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif
#if defined(SIMT_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_unpoison_memory_region(const volatile void*, size_t);
}
#endif

namespace simt {

inline void order_release([[maybe_unused]] void* tag) {
#if defined(PTX_TSAN)
  __tsan_release(tag);
#endif
}

inline void order_acquire([[maybe_unused]] void* tag) {
#if defined(PTX_TSAN)
  __tsan_acquire(tag);
#endif
}

#if defined(SIMT_ASAN) || defined(PTX_TSAN)
constexpr size_t kStack = 512 << 10;  // instrumented frames are larger
#else
constexpr size_t kStack = 128 << 10;
#endif
constexpr size_t kGuard = 4096;

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  size_t size = 0;
  Thread* thread = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
#if defined(SIMT_ASAN)
  void* fake_stack = nullptr;
#endif
#if defined(PTX_TSAN)
  void* tsan = nullptr;
#endif
};

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack of `from`, continues on the stack of `to`.
[[gnu::naked, gnu::noinline]] inline void swap_stacks(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n\t pushq %rbx\n\t pushq %r12\n\t pushq %r13\n\t pushq %r14\n\t pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t movq %rsi, %rsp\n\t"
      "popq %r15\n\t popq %r14\n\t popq %r13\n\t popq %r12\n\t popq %rbx\n\t popq %rbp\n\t ret");
}
#endif

inline void switch_fiber(Fiber& from, Fiber& to) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
#if defined(PTX_TSAN)
  __tsan_switch_to_fiber(to.tsan, 1);
#endif
#if defined(__x86_64__)
  swap_stacks(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// Makes the fiber start with body() at the next switch to it. Also for a fiber that was abandoned in the middle of a kernel.
inline void reset_fiber(Fiber& f, void (*body)()) {
  if (!f.stack) {
    f.size = kStack;
    void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
    f.stack = static_cast<char*>(memory) + kGuard;
  }
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(f.stack, f.size);
  f.fake_stack = nullptr;
#endif
#if defined(PTX_TSAN)
  f.tsan = __tsan_create_fiber(0);  // an abandoned one leaks: ThreadSanitizer cannot destroy it inside a call
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + f.size);
  *--top = nullptr;  // keeps the stack aligned to 16 at entry, and ends back traces
  *--top = reinterpret_cast<void*>(body);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f.sp = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = f.size;
  f.context.uc_link = nullptr;
  makecontext(&f.context, body, 0);
#endif
}

// The OS thread that launches is a fiber too.
inline void describe_own_stack([[maybe_unused]] Fiber& f) {
#if defined(SIMT_ASAN)
  pthread_attr_t attributes;
  void* base = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &base, &f.size);
  pthread_attr_destroy(&attributes);
  f.stack = static_cast<char*>(base);
#endif
#if defined(PTX_TSAN)
  f.tsan = __tsan_get_current_fiber();
#endif
}

}  // namespace simt
