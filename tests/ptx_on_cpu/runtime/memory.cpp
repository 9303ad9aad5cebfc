// Allowed ranges, and the copies of cp.async. Instrumented in the sanitizer builds: its accesses are those of the kernel.
#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>

namespace simt {

Window windows[2] = {{kLowest, ~u64(0)}, {kLowest, ~u64(0)}};

namespace {

struct Ranges {
  std::mutex mutex;  // modules and allocations come from any thread
  bool limited = false;
  std::vector<Range> given;
  std::map<u64, Range> always;  // variables of modules, memory of cudaMalloc

  void forget_hits() {
    for (Window& w : windows) w = limited ? Window{1, 0} : Window{kLowest, ~u64(0)};
  }
};

Ranges& ranges() {
  static Ranges* r = new Ranges;
  return *r;
}

std::string describe(u64 address, u32 bytes, bool write) {
  char text[96];
  std::snprintf(text, sizeof text, "%s of %u bytes at 0x%llx", write ? "write" : "read", bytes, static_cast<unsigned long long>(address));
  return text;
}

bool holds(const Range& r, u64 address, u32 bytes) { return address >= r.low && address + bytes <= r.high; }

// Words, so that ThreadSanitizer sees them; a loop that the compiler may not turn into memcpy.
void copy_words(u64 to, u64 from, u32 bytes) {
  for (u32 i = 0; i < bytes; i += 4) {
    store<u32>(to + i, load<u32>(from + i));
    asm volatile("" ::: "memory");
  }
}
void fill_words(u64 to, u32 bytes, u32 value) {
  for (u32 i = 0; i < bytes; i += 4) {
    store<u32>(to + i, value);
    asm volatile("" ::: "memory");
  }
}

void perform(const Copy& c) {
  const u32 whole = c.source_bytes & ~3u;
  copy_words(c.to, c.from, whole);
  fill_words(c.to + whole, c.bytes - whole, 0);
  for (u32 i = whole; i < c.source_bytes; i++) store<u8>(c.to + i, load<u8>(c.from + i));
}

}  // namespace

void find_range(Thread& t, u64 address, u32 bytes, bool write, const Site* site) {
  Ranges& r = ranges();
  const Range* hit = nullptr;
  {
    std::lock_guard<std::mutex> lock(r.mutex);
    if (r.limited) {
      const Range* refused = nullptr;  // what was given as not writable may lie in a range that always is
      for (const Range& range : r.given)
        if (holds(range, address, bytes)) (range.writable || !write ? hit : refused) = &range;
      if (!hit && !refused && !r.always.empty()) {
        auto next = r.always.upper_bound(address);
        if (next != r.always.begin() && holds((--next)->second, address, bytes) && (next->second.writable || !write)) hit = &next->second;
      }
      if (hit) windows[write] = {hit->low, hit->high};
    }
  }
  if (!hit) fail(t, site, kIllegalAddress, describe(address, bytes, write) + (r.limited ? ", outside of the allowed memory" : ""));
}

void misaligned(Thread& t, u64 address, u32 bytes, const Site* site) {
  char text[64];
  std::snprintf(text, sizeof text, "address 0x%llx is not aligned to %u bytes", static_cast<unsigned long long>(address), bytes);
  fail(t, site, kMisalignedAddress, text);
}

void outside_shared(Thread& t, u64 offset, u32 bytes, const Site* site) {
  fail(t, site, kIllegalAddress,
       std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of the block's " + std::to_string(t.shared_bytes) +
           " bytes of shared memory");
}

void ptx_set_ranges(int count, const Range* given) {
  Ranges& r = ranges();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.limited = count >= 0;
  r.given.assign(given, given + std::max(count, 0));
  r.forget_hits();
}

void ptx_add_range(u64 low, u64 bytes, int writable) {
  Ranges& r = ranges();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.always[low] = {low, low + bytes, u64(writable)};
}

void ptx_remove_range(u64 low) {
  Ranges& r = ranges();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.always.erase(low);
  r.forget_hits();
}

void ptx_register(const Module* m) {
  for (unsigned i = 0; i < m->variables; i++) ptx_add_range(u64(m->variable[i].address), m->variable[i].bytes, m->variable[i].writable);
}

void ptx_unregister(const Module* m) {
  for (unsigned i = 0; i < m->variables; i++) ptx_remove_range(u64(m->variable[i].address));
}

void copy_async(Thread& t, u64 to_shared, u64 from, u32 bytes, u32 source_bytes, const Site* site) {
  if (source_bytes > bytes)
    fail(t, site, kLaunchFailure,
         "cp.async: source size " + std::to_string(source_bytes) + " exceeds its " + std::to_string(bytes) + " bytes");
  const u64 to = at_shared<true>(t, to_shared, bytes, site);
  if (from & (bytes - 1)) misaligned(t, from, bytes, site);
  if (source_bytes) {
    const Window& w = windows[0];
    if (from < w.low || from + source_bytes > w.high) find_range(t, from, source_bytes, false, site);
    PTX_ACCESS(t, kGlobal, false, from, source_bytes, site);
  }
  if (ptx_options()->poison) fill_words(to, bytes, ~0u);
  queue_copy(t, {to, from, bytes, source_bytes});
}

void copy_wait(Thread& t, u32 groups_left) {
  for (const Copy& c : take_copies(t, groups_left)) perform(c);
}

}  // namespace simt
