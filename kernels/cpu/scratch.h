#pragma once

#include "vec.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

// Scratch memory handed out piece by piece, each aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(void* base) : next_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return piece;
  }
  template <class T>
  static int64_t bytes(int64_t count) {
    return round_up(count * int64_t(sizeof(T)), 64);
  }

 private:
  char* next_;
};

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
