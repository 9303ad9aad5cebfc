// AdamW and SGD with masked gradients or updates, in one pass over memory.
#include "child_update.h"

#include "child_masks.h"
#include "kernel_table.h"
#include "scratch.h"

namespace pykernels::PYKERNELS_TIER {
namespace {

// Elements that are worked on together, so that their lines stay in L1, and how far ahead of them memory is asked for.
constexpr int64_t kStretch = kMostBits;
constexpr int64_t kAhead = 1024;

// A hint, which may be for an address behind the tensor: no pointer is formed to it.
template <class T>
PYKERNELS_INLINE void ask_for(const T* p, int64_t i) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + uintptr_t(i) * sizeof(T)));
}

PYKERNELS_INLINE vfloat square_root(vfloat v) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)v);
#elif defined(__x86_64__)
  return (vfloat)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < kLanes<float>; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

PYKERNELS_INLINE Vec<double> square_root(Vec<double> v) {
  for (int i = 0; i < kLanes<double>; i++) v[i] = __builtin_sqrt(v[i]);
  return v;
}

// What is subtracted from p, before it is masked. m0 and m1 are the moments, which change.
template <class C>
struct AdamW {
  static constexpr bool kSecond = true, kReadsP = false;
  Vec<C> beta1, beta2, rest1, rest2, step_size, root_scale, eps;
  C before, after;
  bool decays_after;
  AdamW(const ChildArgs& a, const ChildTensor& t)
      : beta1(broadcast(C(a.beta1))),
        beta2(broadcast(C(a.beta2))),
        rest1(broadcast(C(1 - a.beta1))),
        rest2(broadcast(C(1 - a.beta2))),
        step_size(broadcast(C(t.step_size))),
        root_scale(broadcast(C(t.root_scale))),
        eps(broadcast(C(a.eps))),
        before(C(a.before)),
        after(C(a.after)),
        decays_after(a.after != 0) {}

  PYKERNELS_INLINE Vec<C> step(Vec<C> g, Vec<C>, Vec<C>& m0, Vec<C>& m1) const {
    m0 = m0 * beta1 + rest1 * g;
    m1 = m1 * beta2 + rest2 * (g * g);
    return step_size * m0 / (square_root(m1) * root_scale + eps);
  }
};

template <class C>
struct Sgd {
  static constexpr bool kSecond = false, kReadsP = true;
  Vec<C> momentum, gain, lr, decay;
  bool has_decay, has_momentum, nesterov, first, decays_after = false;
  C before = 1, after = 0;
  Sgd(const ChildArgs& a, const ChildTensor& t)
      : momentum(broadcast(C(a.momentum))),
        gain(broadcast(C(a.gain))),
        lr(broadcast(C(a.lr))),
        decay(broadcast(C(a.weight_decay))),
        has_decay(a.weight_decay != 0),
        has_momentum(a.momentum != 0),
        nesterov(a.nesterov),
        first(t.first) {}

  PYKERNELS_INLINE Vec<C> step(Vec<C> g, Vec<C> decayed, Vec<C>& m0, Vec<C>&) const {
    if (has_decay) g = g + decay * decayed;
    if (has_momentum) {
      m0 = first ? g : momentum * m0 + gain * g;
      g = nesterov ? g + momentum * m0 : m0;
    }
    return lr * g;
  }
};

// p with its update d. bits select the elements that decay; null for all.
template <class C, class Rule>
PYKERNELS_INLINE Vec<C> apply(const Rule& rule, Vec<C> p, Vec<C> d, const uint8_t* bits, int64_t column) {
  Vec<C> before = broadcast(rule.before), after = broadcast(rule.after);
  if (bits) {
    const Vec<C> one = broadcast(C(1)), kept = keep_columns<C>(one, bits, column);
    before = kept != 0 ? before : one;
    after = after * kept;
  }
  p = before * p - d;
  return rule.decays_after ? p - after * p : p;
}

// To bf16 by a random number below one unit of the last place in place of a half; NaN stays NaN.
PYKERNELS_INLINE vhalf round_by(vfloat v, const uint16_t* draws) {
  vhalf random;
  memcpy(&random, draws, sizeof random);
  const vuint u = bit_cast<vuint>(v), quiet_nan = (u >> 16) | 0x40;
  return __builtin_convertvector((v == v) ? (u + __builtin_convertvector(random, vuint)) >> 16 : quiet_nan, vhalf);
}

template <class T, class V>
PYKERNELS_INLINE void store_rounded(T* p, V v, int64_t n, const uint16_t* draws) {
  if constexpr (__is_same(T, bf16)) {
    if (draws) {
      const vhalf h = round_by(v, draws);
      memcpy(p, &h, size_t(min<int64_t>(n, kLanes<float>)) * sizeof *p);
      return;
    }
  }
  store_columns(p, v, n);
}

// Elements [0, count) with one moment for each, or none. bits may be null.
template <class T, class C, class Rule>
PYKERNELS_INLINE void update_dense(const ChildArgs& a, const Rule& rule, T* p, const T* g, C* m, C* v, const uint8_t* bits,
                                   const uint16_t* draws, int64_t count) {
  const Vec<C> grad_factor = broadcast(C(a.grad_factor)), update_factor = broadcast(C(a.update_factor));
  const bool mask_grad = bits && a.mask_grad, mask_update = bits && a.mask_update;
  const uint8_t* decays = a.reserved_decay ? bits : nullptr;
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    const int64_t n = count - i;
    ask_for(p, i + kAhead);
    ask_for(g, i + kAhead);
    ask_for(m, i + kAhead);
    ask_for(v, i + kAhead);
    const Vec<C> old = load_columns(p + i, n);
    Vec<C> grad = load_columns(g + i, n) * grad_factor;
    if (mask_grad) grad = keep_columns<C>(grad, bits, i);
    Vec<C> m0{}, m1{}, decayed = old;
    if (Rule::kReadsP && decays) decayed = keep_columns<C>(old, decays, i);
    if (m) m0 = load_columns(m + i, n);
    if (Rule::kSecond) m1 = load_columns(v + i, n);
    Vec<C> d = rule.step(grad, decayed, m0, m1);
    if (m) store_columns(m + i, m0, n);
    if (Rule::kSecond) store_columns(v + i, m1, n);
    if (mask_update) d = keep_columns<C>(d * update_factor, bits, i);
    store_rounded(p + i, apply<C>(rule, old, d, decays, i), n, draws ? draws + i : nullptr);
  }
}

// Elements whose moments are those of the selected elements. Their gradients are brought together, the moments are read and written one
// after the other, and the updates go back to where they belong. Returns how many there are.
template <class T, class C, class Rule>
PYKERNELS_INLINE int64_t update_compact(const ChildArgs& a, const Rule& rule, T* p, const T* g, C* m, C* v, const uint8_t* bits,
                                        const uint16_t* draws, int64_t count, C* packed, C* packed_p) {
  const Vec<C> grad_factor = broadcast(C(a.grad_factor));
  const uint8_t* decays = a.reserved_decay ? bits : nullptr;
  const bool packs_p = Rule::kReadsP && a.weight_decay != 0;
  int64_t selected = 0;
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    if (packs_p) compress(packed_p + selected, load_columns(p + i, count - i), bits, i);
    ask_for(p, i);
    // Scaled here, where no sum follows that a compiler could join the product with: the dense update rounds in between too.
    selected += compress(packed + selected, load_columns(g + i, count - i) * grad_factor, bits, i);
  }
  for (int64_t i = 0; i < selected; i += kLanes<C>) {
    const int64_t n = selected - i;
    Vec<C> m0 = load_columns(m + i, n), m1{}, decayed{};
    if (Rule::kSecond) m1 = load_columns(v + i, n);
    if (packs_p) decayed = load(packed_p + i);
    const Vec<C> d = rule.step(load(packed + i), decayed, m0, m1);
    store_columns(m + i, m0, n);
    if (Rule::kSecond) store_columns(v + i, m1, n);
    store(packed + i, d);
  }
  int64_t taken = 0;
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    const int64_t n = count - i;
    Vec<C> d;
    taken += expand(d, packed + taken, bits, i);
    store_rounded(p + i, apply<C>(rule, load_columns(p + i, n), d, decays, i), n, draws ? draws + i : nullptr);
  }
  return selected;
}

template <class T>
struct Buffers {
  using C = Arithmetic<T>;
  uint8_t* bits;
  uint16_t* draws;
  C *packed, *packed_p;
  explicit Buffers(Scratch scratch)
      : bits(scratch.take<uint8_t>(kStretch / 8 + kBitPadding)),
        draws(scratch.take<uint16_t>(kStretch + kDrawsPadding)),
        packed(scratch.take<C>(kStretch + kLanes<C>)),
        packed_p(scratch.take<C>(kStretch + kLanes<C>)) {}
  static int64_t bytes() {
    return Scratch::bytes<uint8_t>(kStretch / 8 + kBitPadding) + Scratch::bytes<uint16_t>(kStretch + kDrawsPadding) +
           2 * Scratch::bytes<C>(kStretch + kLanes<C>);
  }
};

template <class T, template <class> class RuleOf>
void update(const ChildArgs& args, const ChildTensor& t, int64_t first, int64_t count, int64_t selected, void* memory) {
  using C = Arithmetic<T>;
  const Buffers<T> buffers{Scratch(memory)};
  const RuleOf<C> rule(args, t);
  T* p = static_cast<T*>(t.p);
  const T* g = static_cast<const T*>(t.g);
  C *m = static_cast<C*>(t.m), *v = static_cast<C*>(t.v);
  const bool compact = t.mask && t.compact;
  const int64_t end = first + count;
  for (int64_t i = first; i < end; i += kStretch) {
    const int64_t n = min(kStretch, end - i);
    const uint8_t* bits = nullptr;
    const uint16_t* draws = nullptr;
    if (t.mask) {
      stored_bits(buffers.bits, t.mask, i, n);
      clear_behind(buffers.bits, n);
      bits = buffers.bits;
    } else if (args.threshold) {
      drawn_bits(buffers.bits, args, t, i, n);
      bits = buffers.bits;
    }
    if (__is_same(T, bf16) && args.stochastic) {
      rounding_draws(buffers.draws, args, t, i, n);
      draws = buffers.draws;
    }
    if (compact) {
      selected += update_compact<T, C>(args, rule, p + i, g + i, m + selected, v ? v + selected : nullptr, bits, draws, n, buffers.packed,
                                       buffers.packed_p);
    } else {
      update_dense<T, C>(args, rule, p + i, g + i, m ? m + i : nullptr, v ? v + i : nullptr, bits, draws, n);
    }
  }
}

template <class T>
double square_sum(const void* g, int64_t count) {
  using C = Arithmetic<T>;
  using Wide = typename VecOf<double, int(sizeof(double)) * kLanes<C>>::type;
  Wide sum{};
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    const Wide wide = __builtin_convertvector(load_columns(static_cast<const T*>(g) + i, count - i), Wide);
    sum += wide * wide;
  }
  double lanes[kLanes<C>], total = 0;
  memcpy(lanes, &sum, sizeof lanes);
  for (double lane : lanes) total += lane;
  return total;
}

}  // namespace

template <class T, class P>
void add_child_update(ChildKernels& table) {
  table.adamw = update<T, AdamW>;
  table.sgd = update<T, Sgd>;
  table.scratch = Buffers<T>::bytes();
  table.square_sum = square_sum<T>;
  table.set_bits = [](const uint8_t* mask, int64_t count) { return set_bits(mask, count); };
}

const ChildKernels* child_kernels(Dtype dtype) {
  return table_for<ChildKernels>(dtype, false, []<class T, class P>(ChildKernels& table) { add_child_update<T, P>(table); });
}

}  // namespace pykernels::PYKERNELS_TIER
