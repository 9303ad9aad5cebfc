#include "mma.h"

#include <algorithm>
#include <vector>

#include "memory.h"

namespace simt {
namespace {

constexpr u32 kM = 16, kN = 8;
using Row8 = f32 __attribute__((vector_size(32)));

f32 decode(Element e, u16 bits) { return e == kBf16 ? to_f32(bf16{bits}) : to_f32(PTX_BITS(f16, bits)); }
f32 decode_tf32(u32 bits) { return PTX_BITS(f32, bits & 0xffffe000u); }
u32 half_pair(f32 low, f32 high) { return u32(PTX_BITS(u16, to_f16(high))) << 16 | PTX_BITS(u16, to_f16(low)); }
f32 half_of(u32 pair, u32 h) { return decode(kF16, u16(pair >> 16 * h)); }

struct Product {
  Element element;
  u32 k;
  bool half_sums;
  u32* d;
  const u32 *a, *b, *c;
};

// Elements of a register of A: rows g and g + 8, then the next columns. g = lane / 4, t = lane % 4.
template <Element E>
void load_a(const Product& p, u32 lane, f32 (*a)[16]) {
  const u32 g = lane / 4, t = lane % 4, per = E == kTf32 ? 1 : 2, registers = p.k / (2 * per);
  for (u32 r = 0; r < registers; r++) {
    f32* row = a[g + r % 2 * 8] + t * per + r / 2 * 4 * per;
    if (E == kTf32)
      row[0] = decode_tf32(p.a[r]);
    else
      row[0] = decode(E, u16(p.a[r])), row[1] = decode(E, u16(p.a[r] >> 16));
  }
}

template <Element E>
void load_b(const Product& p, u32 lane, Row8* b) {
  const u32 g = lane / 4, t = lane % 4, per = E == kTf32 ? 1 : 2, registers = p.k / (4 * per);
  for (u32 r = 0; r < registers; r++) {
    Row8* row = b + t * per + r * 4 * per;
    if (E == kTf32)
      row[0][g] = decode_tf32(p.b[r]);
    else
      row[0][g] = decode(E, u16(p.b[r])), row[1][g] = decode(E, u16(p.b[r] >> 16));
  }
}

template <Element E>
void combine_mma(void* const* data, unsigned, Thread& last) {
  const Product& shape = *static_cast<Product*>(data[last.lane]);
  f32 a[kM][16];
  Row8 b[16];
  for (u32 l = 0; l < kWarp; l++) {
    const Product& p = *static_cast<Product*>(data[l]);
    load_a<E>(p, l, a);
    load_b<E>(p, l, b);
  }
  alignas(32) f32 sum[kM][kN];
  for (u32 i = 0; i < kM; i++) {
    Row8 s = {};
    for (u32 k = 0; k < shape.k; k++) s += a[i][k] * b[k];
    std::memcpy(sum[i], &s, sizeof s);
  }
  for (u32 l = 0; l < kWarp; l++) {
    const Product& p = *static_cast<Product*>(data[l]);
    const u32 g = l / 4, t = l % 4 * 2;
    for (u32 r = 0; r < 2; r++) {
      const f32* row = sum[g + 8 * r] + t;
      if (shape.half_sums) {
        p.d[r] = half_pair(row[0] + half_of(p.c[r], 0), row[1] + half_of(p.c[r], 1));
      } else {
        p.d[2 * r] = PTX_BITS(u32, row[0] + PTX_BITS(f32, p.c[2 * r]));
        p.d[2 * r + 1] = PTX_BITS(u32, row[1] + PTX_BITS(f32, p.c[2 * r + 1]));
      }
    }
  }
}

struct Opaque {
  Element element;
  u32 m, n, k;
  bool half_c, half_d;
  u32* d;
  const u32 *a, *b, *c;
};

f32 opaque_element(Element e, const u32* registers, u32 i) {
  return e == kTf32 ? decode_tf32(registers[i]) : decode(e, u16(registers[i / 2] >> 16 * (i & 1)));
}

void combine_wmma(void* const* data, unsigned, Thread& last) {
  const Opaque s = *static_cast<Opaque*>(data[last.lane]);
  std::vector<f32> a(s.m * s.k), b(s.k * s.n), d(s.m * s.n);
  const u32 in_a = s.m * s.k / kWarp, in_b = s.k * s.n / kWarp, in_d = s.m * s.n / kWarp;
  for (u32 l = 0; l < kWarp; l++) {
    const Opaque& o = *static_cast<Opaque*>(data[l]);
    for (u32 i = 0; i < in_a; i++) a[l * in_a + i] = opaque_element(s.element, o.a, i);
    for (u32 i = 0; i < in_b; i++) b[l * in_b + i] = opaque_element(s.element, o.b, i);
  }
  for (u32 i = 0; i < s.m; i++)
    for (u32 k = 0; k < s.k; k++)
      for (u32 j = 0; j < s.n; j++) d[i * s.n + j] += a[i * s.k + k] * b[k * s.n + j];
  for (u32 l = 0; l < kWarp; l++) {
    const Opaque& o = *static_cast<Opaque*>(data[l]);
    for (u32 i = 0; i < in_d; i++) d[l * in_d + i] += s.half_c ? half_of(o.c[i / 2], i & 1) : PTX_BITS(f32, o.c[i]);
    for (u32 i = 0; i < in_d; i += 2) {
      const f32* x = &d[l * in_d + i];
      if (s.half_d)
        o.d[i / 2] = half_pair(x[0], x[1]);
      else
        o.d[i] = PTX_BITS(u32, x[0]), o.d[i + 1] = PTX_BITS(u32, x[1]);
    }
  }
}

}  // namespace

void mma(Thread& t, Element e, u32 k, bool half_sums, u32* d, const u32* a, const u32* b, const u32* c, const Site* site) {
  Product own{e, k, half_sums, d, a, b, c};
  switch (e) {
    case kF16: return whole_warp(t, "mma.sync f16", &own, combine_mma<kF16>, site);
    case kBf16: return whole_warp(t, "mma.sync bf16", &own, combine_mma<kBf16>, site);
    case kTf32: return whole_warp(t, "mma.sync tf32", &own, combine_mma<kTf32>, site);
  }
}

u64 fragment_address(Thread& t, const Fragment& f, u32 e, bool column_major, u64 base, u32 stride) {
  const u32 index = t.lane * (f.rows * f.columns / kWarp) + e, i = index / f.columns, j = index % f.columns;
  return base + (column_major ? u64(j) * stride + i : u64(i) * stride + j) * f.element_bytes;
}

void wmma(Thread& t, Element e, u32 m, u32 n, u32 k, bool half_c, bool half_d, u32* d, const u32* a, const u32* b, const u32* c,
          const Site* site) {
  Opaque own{e, m, n, k, half_c, half_d, d, a, b, c};
  whole_warp(t, "wmma.mma", &own, combine_wmma, site);
}

}  // namespace simt
