// wgmma: operands in shared memory, found through matrix descriptors. Instrumented in the sanitizer builds, as memory.cpp.
#include <vector>

#include "memory.h"
#include "mma.h"

namespace simt {
namespace {

constexpr u32 kRows = 16;

struct Descriptor {
  u32 start, leading, stride, row_bytes;  // row_bytes: the swizzle's width, 16 without one

  explicit Descriptor(u64 bits)
      : start(u32(bits & 0x3fff) << 4), leading(u32(bits >> 16 & 0x3fff) << 4), stride(u32(bits >> 32 & 0x3fff) << 4) {
    constexpr u32 kWidths[] = {16, 128, 64, 32};
    row_bytes = kWidths[bits >> 62];
  }

  // The hardware exchanges 16-byte pieces of 8 rows: address bits 4.. are xored with the row's, bits 7...
  u32 swizzled(u32 address) const { return address ^ (address >> 3 & (row_bytes - 16)); }
};

f32 operand(Thread& t, Element e, u64 descriptor, u32 row, u32 k, bool transposed, const Site* site) {
  const u32 bytes = e == kTf32 ? 4 : 2;
  const u64 at = at_shared<false>(t, wgmma_offset(descriptor, row, k, bytes, transposed), bytes, site);
  if (e == kTf32) return PTX_BITS(f32, load<u32>(at) & 0xffffe000u);
  const u16 bits = load<u16>(at);
  return e == kBf16 ? to_f32(bf16{bits}) : to_f32(PTX_BITS(f16, bits));
}

struct Call {
  Wgmma* w;
  const Site* site;
};

void combine(void* const* data, unsigned, Thread& last) {
  const Call& call = *static_cast<Call*>(data[last.lane]);
  const Wgmma& w = *call.w;
  const u32 depth = w.element == kTf32 ? 8 : 16, per = w.element == kTf32 ? 1 : 2;
  f32 a[kRows][16];
  if (w.a) {
    for (u32 l = 0; l < kWarp; l++) {
      const u32* r = static_cast<Call*>(data[l])->w->a;
      for (u32 i = 0; i < 4; i++)
        for (u32 h = 0; h < per; h++) {
          const u16 bits = u16(r[i] >> 16 * h);
          f32 x = w.element == kTf32   ? PTX_BITS(f32, r[i] & 0xffffe000u)
                  : w.element == kBf16 ? to_f32(bf16{bits})
                                       : to_f32(PTX_BITS(f16, bits));
          a[l / 4 + i % 2 * 8][l % 4 * per + h + i / 2 * 4 * per] = w.negate_a ? -x : x;
        }
    }
  } else {
    const u32 first = (last.linear / kWarp & 3) * kRows;
    for (u32 i = 0; i < kRows; i++)
      for (u32 k = 0; k < depth; k++) {
        const f32 x = operand(last, w.element, w.a_descriptor, first + i, k, w.transpose_a, call.site);
        a[i][k] = w.negate_a ? -x : x;
      }
  }
  std::vector<f32> sum(kRows * w.n), b(w.n);
  for (u32 k = 0; k < depth; k++) {
    for (u32 j = 0; j < w.n; j++) {
      const f32 x = operand(last, w.element, w.b_descriptor, j, k, w.transpose_b, call.site);
      b[j] = w.negate_b ? -x : x;
    }
    for (u32 i = 0; i < kRows; i++)
      for (u32 j = 0; j < w.n; j++) sum[i * w.n + j] += a[i][k] * b[j];
  }
  for (u32 l = 0; l < kWarp; l++) {
    const Wgmma& own = *static_cast<Call*>(data[l])->w;
    for (u32 i = 0; i < w.n / 2; i++) {  // pairs of columns, rows g and g + 8, then the next 8 columns
      const f32 s = sum[(l / 4 + 8 * (i / 2 % 2)) * w.n + i / 4 * 8 + l % 4 * 2 + i % 2];
      if (w.half_sums) {
        u32& pair = own.d[i / 2];
        const f32 before = own.accumulate ? to_f32(PTX_BITS(f16, u16(pair >> 16 * (i & 1)))) : 0;
        const u32 bits = PTX_BITS(u16, to_f16(before + s));
        pair = i & 1 ? (pair & 0xffff) | bits << 16 : (pair & 0xffff0000u) | bits;
      } else {
        own.d[i] = PTX_BITS(u32, (own.accumulate ? PTX_BITS(f32, own.d[i]) : 0) + s);
      }
    }
  }
}

}  // namespace

u32 wgmma_offset(u64 bits, u32 row, u32 k, u32 element_bytes, bool transposed) {
  const Descriptor d(bits);
  const u32 width = d.row_bytes / element_bytes, eight = 16 / element_bytes;  // elements in a row of the pattern, and in 16 bytes
  u32 offset;
  if (!transposed) {
    offset = row / 8 * d.stride + row % 8 * d.row_bytes;
    offset += d.row_bytes == 16 ? k / eight * d.leading + k % eight * element_bytes : k * element_bytes;
  } else if (d.row_bytes == 16) {
    offset = row / width * d.stride + k / 8 * d.leading + k % 8 * 16 + row % width * element_bytes;
  } else {
    offset = row / width * d.leading + k / 8 * d.stride + k % 8 * d.row_bytes + row % width * element_bytes;
  }
  return d.swizzled(d.start + offset);
}

void wgmma(Thread& t, Wgmma& w, const Site* site) {
  Call own{&w, site};
  whole_warp(t, "wgmma.mma_async", &own, combine, site);
}

}  // namespace simt
