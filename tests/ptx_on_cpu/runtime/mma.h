// Matrix products of a warp (mma.sync, wmma) and of a warpgroup (wgmma). Products are exact, sums are fp32 in the order of k, then plus C.
#pragma once
#include "numbers.h"
#include "simt.h"

namespace simt {

enum Element { kF16, kBf16, kTf32 };

// mma.sync m16n8kK: registers as in PTX, C and D of 4 fp32 or of 2 packed fp16 pairs.
void mma(Thread&, Element, u32 k, bool half_sums, u32* d, const u32* a, const u32* b, const u32* c, const Site*);

// wmma fragments are opaque: element e of a matrix lives in lane e / (elements / 32). `words` registers per lane.
struct Fragment {
  u32 rows, columns, element_bytes;
};
u64 fragment_address(Thread&, const Fragment&, u32 element, bool column_major, u64 base, u32 stride);
void wmma(Thread&, Element, u32 m, u32 n, u32 k, bool half_c, bool half_d, u32* d, const u32* a, const u32* b, const u32* c, const Site*);

// wgmma m64nNkK with A in registers (a != null) or in shared memory; each warp does its 16 rows.
struct Wgmma {
  Element element;
  u32 n;
  bool half_sums, accumulate, negate_a, negate_b, transpose_a, transpose_b;
  const u32* a;
  u64 a_descriptor, b_descriptor;
  u32* d;
};
void wgmma(Thread&, Wgmma&, const Site*);
// Where element (row, k) of a wgmma operand lies in shared memory; for tests too.
u32 wgmma_offset(u64 descriptor, u32 row, u32 k, u32 element_bytes, bool transposed);

}  // namespace simt
