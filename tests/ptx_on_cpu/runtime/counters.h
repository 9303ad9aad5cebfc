// What the counting build counts. Fields are read from Python by this order (build.py).
#pragma once
#include "simt.h"

namespace simt {

struct Counters {
  uint64_t launches, blocks;
  uint64_t global_read_bytes, global_write_bytes;      // what the lanes asked for
  uint64_t global_read_sectors, global_write_sectors;  // 32-byte sectors per warp request: traffic to L2
  uint64_t unique_read_sectors, unique_write_sectors;  // each sector counted once: traffic to DRAM with a perfect cache
  uint64_t global_requests, uncoalesced_requests;      // a request is one instruction of one warp
  uint64_t shared_read_bytes, shared_write_bytes;
  uint64_t shared_requests, bank_conflicts;  // conflicts: further passes that a request needs
  uint64_t atomics;
  uint64_t tensor_flops, fp32_flops, fp64_flops, half_flops;
};

enum Space { kGlobal, kShared };

extern "C" {
Counters* ptx_counters();
void ptx_reset_counters();
}

extern Counters counters;
// One access of one lane. `bytes` is that of the whole vector.
void count_access(Thread&, Space, bool write, uint64_t address, unsigned bytes, const Site*);
void count_block_end();

#if defined(PTX_COUNT)
#define PTX_FLOPS(kind, n) (::simt::counters.kind##_flops += (n))
#define PTX_ACCESS(...) ::simt::count_access(__VA_ARGS__)
#define PTX_ATOMIC() (::simt::counters.atomics++)
#define PTX_BLOCK_END() (::simt::count_block_end())
#define PTX_LAUNCH_END() (::simt::counters.launches++)
#else
#define PTX_FLOPS(kind, n) ((void)0)
#define PTX_ACCESS(...) ((void)0)
#define PTX_ATOMIC() ((void)0)
#define PTX_BLOCK_END() ((void)0)
#define PTX_LAUNCH_END() ((void)0)
#endif

}  // namespace simt
