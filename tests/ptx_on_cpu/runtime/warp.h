// Instructions in which the lanes of a warp exchange values.
#pragma once
#include "numbers.h"
#include "simt.h"

namespace simt {

enum Shuffle { kUp32, kDown32, kButterfly32, kIndex32 };
// shfl.sync with the operands of PTX; `valid` is the predicate result. Lanes that are not there give 0xFFFFFFFF.
u32 shuffle(Thread&, Shuffle, u32 value, u32 b, u32 c, u32 mask, bool& valid, const Site*);

u32 ballot(Thread&, bool value, u32 mask, const Site*);  // vote.sync.ballot; all, any and uni follow from it
u32 match_any(Thread&, u64 value, u32 mask, const Site*);
u32 match_all(Thread&, u64 value, u32 mask, bool& all, const Site*);

enum Reduction { kAdd, kMin, kMax, kAnd, kOr, kXor };
u32 reduce_u32(Thread&, Reduction, u32 value, u32 mask, const Site*);
s32 reduce_s32(Thread&, Reduction, s32 value, u32 mask, const Site*);

// True in the lowest lane of the mask that is there.
bool elect(Thread&, u32 mask, u32& leader, const Site*);

// ldmatrix: `row` is the 16 bytes at the lane's own address, `registers` receives `count` of them. stmatrix is the reverse.
struct Row {
  u32 word[4];
};
void exchange_rows(Thread&, u32 count, bool transposed, const Row& row, u32* registers, const Site*);
void exchange_fragments(Thread&, u32 count, bool transposed, const u32* registers, Row& row, const Site*);
u32 move_matrix(Thread&, u32 fragment, const Site*);

}  // namespace simt
