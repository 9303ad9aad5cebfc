// The scheduler: runs the threads of one block as fibers until all have ended, block after block. Compiled without ThreadSanitizer's
// instrumentation, so that only what the kernel itself reads and writes is looked at.
#include "simt.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "counters.h"
#include "fiber.h"

namespace simt {
namespace {

// All that launches share. One launch at a time: the mutex is held from start to end.
struct Engine {
  std::mutex mutex;
  Options options;
  std::string message;
  Fiber main;
  Block block;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<uint8_t*> shared;  // aligned windows; more than one only where blocks must not share
  bool failed = false;
  Status status = kSuccess;
  char launch_order = 0, done_order = 0, fence_order = 0;
};

Engine& e = *new Engine;  // never destroyed: libraries may launch during exit

uint64_t next_random(Block& b) {
  b.random ^= b.random << 13;
  b.random ^= b.random >> 7;
  b.random ^= b.random << 17;
  return b.random;
}

unsigned pick_lane(Block& b, unsigned ready) {
  switch (e.options.schedule) {
    case kForward: return unsigned(__builtin_ctz(ready));
    case kReverse: return 31 - unsigned(__builtin_clz(ready));
    default: {
      const unsigned by = next_random(b) & 31;
      return (unsigned(__builtin_ctz(ready >> by | (by ? ready << (32 - by) : 0))) + by) & 31;
    }
  }
}

// The next ready thread of the warp, taken from the ready set; null when there is none, and now and then in a random schedule, so that
// warps interleave.
Thread* next_of_warp(Block& b, Warp& w) {
  if (!w.ready) return nullptr;
  if (e.options.schedule > kReverse && (next_random(b) & 7) == 0) return nullptr;
  const unsigned lane = pick_lane(b, w.ready);
  w.ready &= ~(1u << lane);
  return &b.thread[w.index * kWarp + lane];
}

// Leaves `t`, which is waiting or done, for another ready thread of its warp or for the scheduler.
void leave(Thread& t) {
  Block& b = *t.block;
  Thread* next = next_of_warp(b, *t.warp);
  b.running = next;
  switch_fiber(*t.fiber, next ? *next->fiber : e.main);
}

std::string at(const Site* s) {
  if (!s) return "?";
  const std::string ptx = "PTX line " + std::to_string(s->ptx_line);
  return s->line ? std::string(s->file) + ":" + std::to_string(s->line) + " (" + ptx + ")" : ptx;
}

std::string hexadecimal(unsigned value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

std::string name(const Dim& d) { return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")"; }

void finish_slot(Warp& w, unsigned k, Thread& last) {
  const Slot s = w.slot[k];
  w.slot[k] = w.slot[--w.slots];
  if (s.combine) s.combine(s.data, s.arrived, last);
  w.ready |= s.arrived & ~(1u << last.lane);
}

void release(Block& b, Barrier& bar) {
  bar.last_popcount = bar.popcount, bar.last_all = bar.all, bar.last_any = bar.any;
  bar.popcount = 0, bar.all = 1, bar.any = 0, bar.arrived = 0, bar.site = nullptr;
  for (unsigned i = 0; i < b.warps; i++) {
    b.warp[i].ready |= bar.waiting[i];
    bar.waiting[i] = 0;
  }
}

void thread_done(Thread& t) {
  Block& b = *t.block;
  Warp& w = *t.warp;
  b.alive--;
  w.exited |= 1u << t.lane;
  for (unsigned k = 0; k < w.slots; k++) {
    const Slot& s = w.slot[k];
    if (!(s.mask >> t.lane & 1)) continue;
    if (!e.options.early_exits)
      fail(t, s.site, kLaunchFailure, std::string("this thread exits while ") + s.kind + " of its warp waits for it");
    if (s.arrived == (s.mask & ~w.exited)) finish_slot(w, k--, t);
  }
  for (Barrier& bar : b.barrier) {
    if (!bar.arrived || bar.expected) continue;
    if (!e.options.early_exits) fail(t, bar.site, kLaunchFailure, "this thread exits while others wait at a barrier for the whole block");
    if (bar.arrived == b.alive) release(b, bar);
  }
}

void fiber_main() {
  {
    Fiber& own = *e.block.running->fiber;
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(own.fake_stack, nullptr, nullptr);
#endif
    (void)own;
  }
  for (;;) {
    Thread& t = *e.block.running;
    order_acquire(&e.launch_order);
    t.block->entry(t, t.block->parameters);
    order_release(&e.done_order);
    thread_done(t);
    leave(t);
  }
}

uint8_t* shared_window(size_t k) {
  auto& windows = e.shared;
  while (windows.size() <= k) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kSharedWindow, kSharedWindow)) throw std::bad_alloc();
    windows.push_back(static_cast<uint8_t*>(memory));
  }
  return windows[k];
}

void prepare_block(uint8_t* shared, unsigned shared_bytes) {
  Block& b = e.block;
  b.alive = b.threads;
  for (Barrier& bar : b.barrier) bar = Barrier();
  for (unsigned i = 0; i < b.warps; i++) {
    Warp& w = e.warps[i];
    const unsigned lanes = std::min(kWarp, b.threads - i * kWarp);
    w.index = i;
    w.slots = 0;
    w.ready = lanes == kWarp ? kAllLanes : (1u << lanes) - 1;
    w.exited = w.absent = ~w.ready;
  }
  // Another fiber for every thread in each block, else races of a thread with itself in the next block would be missed.
  const unsigned turn = e.options.order_blocks ? 0 : b.id.x + b.id.y + b.id.z;
  for (unsigned i = 0; i < b.threads; i++) {
    Thread& t = e.threads[i];
    t.id = {i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y)};
    t.linear = i;
    t.lane = i % kWarp;
    t.shared = shared;
    t.shared_bytes = shared_bytes;
    t.warp = &e.warps[i / kWarp];
    t.block = &b;
    t.fiber = e.fibers[(i + turn) % b.threads].get();
    t.fiber->thread = &t;
    t.copies.clear();
    t.groups.clear();
  }
  if (e.options.poison) std::fill_n(shared, shared_bytes, uint8_t(0xFF));
}

void report_deadlock() {
  std::string text = "deadlock, no thread can run:";
  int shown = 0;
  for (unsigned i = 0; i < e.block.threads && shown < 6; i++) {
    const Thread& t = e.threads[i];
    if (t.warp->exited >> t.lane & 1) continue;
    text += (shown++ ? ", thread " : " thread ") + name(t.id) + " waits at " + at(t.waiting);
  }
  e.failed = true;
  e.status = kLaunchTimeout;
  e.message = std::string(e.block.kernel) + ": block " + name(e.block.id) + ": " + text;
}

// Runs the block until its threads have ended or one has failed.
void run_block() {
  Block& b = e.block;
  unsigned at_warp = 0;
  while (b.alive && !e.failed) {
    const bool seeded = e.options.schedule > kReverse;
    if (seeded) at_warp = unsigned(next_random(b) % b.warps);
    Warp* w = nullptr;
    for (unsigned i = 0; i < b.warps && !w; i++) {
      const unsigned k = (at_warp + i) % b.warps;
      Warp& candidate = e.warps[e.options.schedule == kReverse ? b.warps - 1 - k : k];
      if (!candidate.ready) continue;
      w = &candidate;
      at_warp = (k + 1) % b.warps;
    }
    if (!w) return report_deadlock();
    const unsigned lane = pick_lane(b, w->ready);
    w->ready &= ~(1u << lane);
    b.running = &b.thread[w->index * kWarp + lane];
    switch_fiber(e.main, *b.running->fiber);
  }
}

Status check_launch(const Kernel& k, Dim grid, Dim size, uint64_t shared_bytes) {
  const uint64_t threads = uint64_t(size.x) * size.y * size.z;
  if (!threads || !grid.x || !grid.y || !grid.z)
    return Status(refuse(kInvalidConfiguration, std::string(k.name) + ": launch of grid " + name(grid) + ", block " + name(size)));
  if (threads > kMaxThreads || size.x > 1024 || size.y > 1024 || size.z > 64)
    return Status(refuse(kInvalidConfiguration, std::string(k.name) + ": block " + name(size) + " is larger than 1024 threads, 64 in z"));
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return Status(refuse(kInvalidConfiguration, std::string(k.name) + ": grid " + name(grid) + " is larger than (2^31-1,65535,65535)"));
  if (k.max_threads && threads > k.max_threads)
    return Status(refuse(kInvalidValue, std::string(k.name) + ": block " + name(size) + " exceeds its __launch_bounds__ of " +
                                            std::to_string(k.max_threads)));
  const unsigned* r = k.required;
  if (r[0] && (size.x != r[0] || size.y != r[1] || size.z != r[2]))
    return Status(refuse(kInvalidValue, std::string(k.name) + ": block " + name(size) + " is not the required one"));
  if (shared_bytes > shared_limit(ptx_options()->capability))
    return Status(
        refuse(kInvalidValue, std::string(k.name) + ": " + std::to_string(shared_bytes) + " bytes of shared memory are too many"));
  return kSuccess;
}

}  // namespace

unsigned shared_limit(int capability) {
  switch (capability / 10 * 10 == 80 ? capability : capability / 10 * 10) {
    case 86:
    case 89: return 99 << 10;
    case 80:
    case 87: return 163 << 10;
    case 70: return 64 << 10;
    case 120: return 99 << 10;
    default: return 227 << 10;
  }
}

void fail(Thread& t, const Site* site, Status status, const std::string& message) {
  e.failed = true;
  e.status = status;
  e.message = std::string(t.block->kernel) + ": block " + name(t.block->id) + " thread " + name(t.id) + " at " + at(site) + ": " + message;
  order_release(&e.done_order);
  switch_fiber(*t.fiber, e.main);
  __builtin_unreachable();
}

int refuse(Status status, const std::string& message) {
  e.message = message;
  return status;
}

void collective(Thread& t, unsigned mask, const char* kind, void* data, Combine combine, const Site* site) {
  Warp& w = *t.warp;
  if (!(mask >> t.lane & 1)) fail(t, site, kLaunchFailure, std::string("this lane is not in the mask of its own ") + kind);
  if (mask & w.exited & ~w.absent && !e.options.early_exits)
    fail(t, site, kLaunchFailure,
         std::string(kind) + " names lanes that have exited: mask " + hexadecimal(mask) + ", exited " + hexadecimal(w.exited));
  unsigned k = 0;
  while (k < w.slots && w.slot[k].mask != mask) k++;
  Slot& s = w.slot[k];
  if (k == w.slots) {
    w.slots++;
    s.mask = mask, s.arrived = 0, s.kind = kind, s.site = site, s.combine = combine;
  } else if (std::strcmp(s.kind, kind)) {
    fail(t, site, kLaunchFailure,
         std::string("lanes of a warp meet at different instructions: ") + kind + " here, " + s.kind + " at " + at(s.site));
  }
  s.data[t.lane] = data;
  s.arrived |= 1u << t.lane;
  if (s.arrived == (mask & ~w.exited)) return finish_slot(w, k, t);
  t.waiting = site;
  leave(t);
}

void whole_warp(Thread& t, const char* kind, void* data, Combine combine, const Site* site) {
  if (t.warp->exited) fail(t, site, kLaunchFailure, std::string(kind) + " needs all 32 lanes, but some have exited or do not exist");
  collective(t, kAllLanes, kind, data, combine, site);
}

void sync_warp(Thread& t, unsigned mask, const Site* site) {
  order_release(&t.warp->order);
  collective(t, mask, "bar.warp.sync", nullptr, nullptr, site);
  order_acquire(&t.warp->order);
}

static Barrier& arrive(Thread& t, unsigned id, unsigned threads, const Site* site, bool value) {
  Block& b = *t.block;
  if (id >= kBarriers) fail(t, site, kLaunchFailure, "barrier " + std::to_string(id) + " does not exist");
  if (threads % kWarp) fail(t, site, kLaunchFailure, "barrier for " + std::to_string(threads) + " threads, not a multiple of 32");
  Barrier& bar = b.barrier[id];
  if (bar.arrived && bar.expected != threads)
    fail(t, site, kLaunchFailure, "divergent barrier: other threads wait at " + at(bar.site) + " with another thread count");
  if (!threads) {
    if (bar.arrived && bar.site != site) fail(t, site, kLaunchFailure, "divergent barrier: other threads wait at " + at(bar.site));
    if (!e.options.early_exits && b.alive != b.threads)
      fail(t, site, kLaunchFailure, "barrier for the whole block after " + std::to_string(b.threads - b.alive) + " threads have exited");
  }
  bar.site = site;
  bar.expected = threads;
  bar.arrived++;
  bar.popcount += value;
  bar.all &= value;
  bar.any |= value;
  return bar;
}

void bar_sync(Thread& t, unsigned id, unsigned threads, const Site* site, bool value) {
  Block& b = *t.block;
  Barrier& bar = arrive(t, id, threads, site, value);
  order_release(&bar.order);
  if (bar.arrived == (threads ? threads : b.alive)) {
    release(b, bar);
  } else {
    bar.waiting[t.warp->index] |= 1u << t.lane;
    t.waiting = site;
    leave(t);
  }
  order_acquire(&bar.order);
}

void bar_arrive(Thread& t, unsigned id, unsigned threads, const Site* site) {
  Barrier& bar = arrive(t, id, threads, site, false);
  order_release(&bar.order);
  if (bar.arrived == threads) release(*t.block, bar);
}

void yield(Thread& t) {
  Warp& w = *t.warp;
  const unsigned higher = w.ready & ~((2u << t.lane) - 1);  // in turn, so that none starves
  Thread* next = higher ? &t.block->thread[w.index * kWarp + unsigned(__builtin_ctz(higher))] : nullptr;
  w.ready |= 1u << t.lane;
  if (next) w.ready &= ~(1u << next->lane);
  t.block->running = next;
  switch_fiber(*t.fiber, next ? *next->fiber : e.main);
}

void fence(Thread&) {
  order_release(&e.fence_order);
  order_acquire(&e.fence_order);
}

void queue_copy(Thread& t, const Copy& c) { t.copies.push_back(c); }

void copy_commit(Thread& t) { t.groups.push_back(t.copies.size()); }

std::vector<Copy> take_copies(Thread& t, unsigned groups_left) {
  if (t.groups.size() <= groups_left) return {};
  const size_t groups = t.groups.size() - groups_left, copies = t.groups[groups - 1];
  std::vector<Copy> taken(t.copies.begin(), t.copies.begin() + long(copies));
  t.copies.erase(t.copies.begin(), t.copies.begin() + long(copies));
  t.groups.erase(t.groups.begin(), t.groups.begin() + long(groups));
  for (size_t& end : t.groups) end -= copies;
  return taken;
}

bool on_stack(const Thread& t, uint64_t address) { return address - reinterpret_cast<uint64_t>(t.fiber->stack) < t.fiber->size; }

Options* ptx_options() { return &e.options; }

const char* ptx_message() { return e.message.c_str(); }

int ptx_launch(const Kernel* kernel, Dim grid, Dim size, unsigned dynamic_bytes, const void* parameters) {
  std::lock_guard<std::mutex> lock(e.mutex);
  e.message.clear();
  const uint64_t shared_bytes = uint64_t(kernel->shared_bytes) + dynamic_bytes;
  if (const Status refused = check_launch(*kernel, grid, size, shared_bytes)) return refused;

  Block& b = e.block;
  b.grid = grid, b.size = size;
  b.threads = size.x * size.y * size.z;
  b.warps = (b.threads + kWarp - 1) / kWarp;
  b.kernel = kernel->name, b.entry = kernel->entry;
  b.parameters = static_cast<const uint8_t*>(parameters);
  if (e.threads.size() < b.threads) e.threads.resize(b.threads);
  if (e.warps.size() < b.warps) e.warps.resize(b.warps);
  while (e.fibers.size() < b.threads) {
    e.fibers.push_back(std::make_unique<Fiber>());
    reset_fiber(*e.fibers.back(), fiber_main);
  }
  b.thread = e.threads.data(), b.warp = e.warps.data();
  describe_own_stack(e.main);
  e.failed = false;
  e.status = kSuccess;

  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  b.random = 0x9E3779B97F4A7C15ull * (uint64_t(e.options.schedule) + 1);
  for (uint64_t k = 0; k < blocks && !e.failed; k++) {
    const uint64_t i = e.options.schedule == kReverse ? blocks - 1 - k : k;
    b.id = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (uint64_t(grid.x) * grid.y))};
    if (e.options.order_blocks) order_acquire(&e.done_order);
    prepare_block(shared_window(e.options.order_blocks ? 0 : k), unsigned(shared_bytes));
    order_release(&e.launch_order);
    run_block();
    PTX_BLOCK_END();
  }
  PTX_LAUNCH_END();
  order_acquire(&e.done_order);
  while (e.shared.size() > 1) {
    std::free(e.shared.back());
    e.shared.pop_back();
  }
  if (e.failed)
    for (auto& fiber : e.fibers) reset_fiber(*fiber, fiber_main);
  return e.status;
}

}  // namespace simt
