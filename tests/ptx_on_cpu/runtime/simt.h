// One fiber per GPU thread: blocks, warps, barriers and the one primitive on which all warp-wide instructions are built. README.md says
// what is modelled. Translated kernels include translated.h, which includes this.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define SIMT_TSAN 1
#endif
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#endif

namespace simt {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kBarriers = 16, kAllLanes = ~0u;
constexpr size_t kSharedWindow = 256 << 10;  // a power of two above the largest shared memory of a block

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Where an instruction comes from: the source line of .loc when there is one, and the line of the PTX.
struct Site {
  const char* file;
  int line, ptx_line;
};

// What a launch returns; the values are those of cudaError_t.
enum Status {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidConfiguration = 9,
  kIllegalAddress = 700,
  kLaunchTimeout = 702,
  kAssert = 710,
  kMisalignedAddress = 716,
  kLaunchFailure = 719,
};

struct Block;
struct Fiber;
struct Thread;

// Runs once per meeting of lanes, in the thread that came last: data of each lane, and the lanes that are there.
using Combine = void (*)(void* const* data, unsigned lanes, Thread& last);

struct Slot {  // lanes of one mask on their way to one collective
  unsigned mask, arrived;
  Combine combine;
  const char* kind;
  const Site* site;
  void* data[kWarp];
};

struct Warp {
  unsigned ready = 0, exited = 0, absent = 0;  // lane masks; absent: the block ends before this lane
  unsigned slots = 0;
  unsigned index = 0;
  Slot slot[kWarp];
  char order = 0;  // its address is what __syncwarp synchronises on for ThreadSanitizer
};

struct Copy {  // a cp.async that has not been waited for
  uint64_t to, from;
  unsigned bytes, source_bytes;
};

struct Thread {
  Dim id;
  unsigned linear = 0, lane = 0;
  uint8_t* shared = nullptr;  // base of the block's shared memory
  unsigned shared_bytes = 0;  // what the launch asked for, static part included
  Warp* warp = nullptr;
  Block* block = nullptr;
  Fiber* fiber = nullptr;
  const Site* waiting = nullptr;
  unsigned barrier = 0, barrier_value = 0;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // ends of committed groups in `copies`
};

struct Barrier {
  unsigned arrived = 0, expected = 0, popcount = 0, all = 1, any = 0;
  unsigned last_popcount = 0, last_all = 0, last_any = 0;
  const Site* site = nullptr;
  unsigned waiting[kMaxThreads / kWarp] = {};
  char order = 0;
};

struct Block {
  Dim grid, size, id, cluster;
  unsigned threads = 0, alive = 0, warps = 0;
  Thread* thread = nullptr;
  Warp* warp = nullptr;
  Thread* running = nullptr;
  Barrier barrier[kBarriers];
  uint64_t random = 0;
  const char* kernel = "";
  void (*entry)(Thread&, const uint8_t*) = nullptr;
  const uint8_t* parameters = nullptr;
};

// A kernel of a translated module. The module registers its table when it is loaded.
struct Kernel {
  const char* name;
  void (*entry)(Thread&, const uint8_t*);
  unsigned shared_bytes, shared_align, max_threads, required[3], parameter_bytes, parameters;
  const unsigned* layout;  // offset and size of each parameter
};

struct Variable {
  const char* name;
  void* address;
  size_t bytes;
  bool writable;
};

struct Module {
  const Kernel* kernel;
  unsigned kernels;
  const Variable* variable;
  unsigned variables;
};

enum Schedule { kForward = 0, kReverse = 1 };  // any other number is a seed

struct Options {
  int schedule = kForward;
  int poison = 1;        // shared memory starts as 0xFF bytes, and cp.async targets hold them until waited for
  int early_exits = 0;   // threads may exit before barriers and warp instructions that wait for them
  int order_blocks = 1;  // 0: ThreadSanitizer also looks for races between blocks
  int capability = 80;   // of the device that the stand-in CUDA runtime describes
  int processors = 4;
};

extern "C" {
Options* ptx_options();
const char* ptx_message();  // why the last failed launch failed
void ptx_register(const Module*);
void ptx_unregister(const Module*);
// Runs one kernel of `module`; dynamic_bytes come on top of the kernel's own shared memory.
int ptx_launch(const Kernel*, Dim grid, Dim block, unsigned dynamic_bytes, const void* parameters);
}

// Ends the launch with this status. Never returns: the fibers are abandoned.
[[noreturn, gnu::cold]] void fail(Thread&, const Site*, Status, const std::string& message);
// Static and dynamic shared memory that a block may have on this compute capability.
unsigned shared_limit(int capability);
// For errors outside a thread: remembers the message and returns the status.
int refuse(Status, const std::string& message);

// `mask` lanes meet; the last to arrive runs combine(data of each lane, lanes that are there). `kind` names the instruction: lanes that
// meet with different kinds are an error.
void collective(Thread&, unsigned mask, const char* kind, void* data, Combine combine, const Site*);
// The same for instructions that need the whole warp.
void whole_warp(Thread&, const char* kind, void* data, Combine combine, const Site*);
void sync_warp(Thread&, unsigned mask, const Site*);

// bar.sync and bar.arrive. threads 0: all that have not exited. The value is for bar.red.
void bar_sync(Thread&, unsigned id, unsigned threads, const Site*, bool value = false);
void bar_arrive(Thread&, unsigned id, unsigned threads, const Site*);
// Other fibers may run; for spin loops.
void yield(Thread&);
void fence(Thread&);
// The queue of cp.async.
void queue_copy(Thread&, const Copy&);
void copy_commit(Thread&);
std::vector<Copy> take_copies(Thread&, unsigned groups_left);
bool on_stack(const Thread&, uint64_t address);

inline unsigned barrier_popcount(Thread& t, unsigned id) { return t.block->barrier[id & 15].last_popcount; }
inline bool barrier_all(Thread& t, unsigned id) { return t.block->barrier[id & 15].last_all; }
inline bool barrier_any(Thread& t, unsigned id) { return t.block->barrier[id & 15].last_any; }

}  // namespace simt
