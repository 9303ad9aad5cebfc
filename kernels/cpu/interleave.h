// Weights lie as [output, channel, tap] and products want one tap at a time: vectors of channels with their taps interleaved to one vector
// for each tap, and back.
#pragma once

#include "vec.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

// `count` interleaved streams. Each output vector takes lanes out of `count` input vectors, a shuffle for each; from kMost streams on
// single lanes are moved one by one.
template <class C>
class Interleaved {
  static constexpr int W = kLanes<C>, kMost = 8;
  using Index = typename ShuffleIndex<Vec<C>>::type;

  int64_t count_;
  Index split_[kMost * kMost], merge_[kMost * kMost];

 public:
  explicit Interleaved(int64_t count) : count_(count) {
    for (int64_t i = 0; i < count * count && count <= kMost; i++) {
      const int64_t output = i / count, input = i % count;
      for (int64_t lane = 0; lane < W; lane++) {
        const int64_t from = lane * count + output, to = output * W + lane;
        // A lane that this input does not hold keeps what it has.
        split_[i][lane] = from / W == input ? W + from % W : lane;
        merge_[i][lane] = to % count == input ? W + to / count : lane;
      }
    }
  }

  // Elements 0 ... n - 1 of one stream, zeros behind them. n <= W.
  template <class T>
  PYKERNELS_INLINE Vec<C> load(const T* from, int64_t stream, int64_t n) const {
    Vec<C> out{};
    if (count_ > kMost) {
      for (int64_t i = 0; i < n; i++) out[i] = load_scalar(from + i * count_ + stream);
      return out;
    }
    for (int64_t i = 0; i < count_ && i * W < n * count_; i++)
      out = __builtin_shuffle(out, load_columns(from + i * W, n * count_ - i * W), split_[stream * count_ + i]);
    return out;
  }

  // The first n elements of all streams: get(stream) returns them in a vector. n <= W.
  template <class T, class Get>
  PYKERNELS_INLINE void store(T* to, int64_t n, Get get) const {
    if (count_ > kMost) {
      for (int64_t stream = 0; stream < count_; stream++) {
        const Vec<C> v = get(stream);
        for (int64_t i = 0; i < n; i++) store_scalar(to + i * count_ + stream, v[i]);
      }
      return;
    }
    Vec<C> v[kMost];
    for (int64_t stream = 0; stream < count_; stream++) v[stream] = get(stream);
    for (int64_t o = 0; o < count_ && o * W < n * count_; o++) {
      Vec<C> out{};
      for (int64_t i = 0; i < count_; i++) out = __builtin_shuffle(out, v[i], merge_[o * count_ + i]);
      store_columns(to + o * W, out, n * count_ - o * W);
    }
  }
};

}  // namespace
}  // namespace pykernels::PYKERNELS_TIER
