// Lanes run one after another, so a warp's request is put together from the accesses of its lanes: the k-th execution of one instruction
// by each of them. Where lanes of a warp take different numbers of turns through a loop this pairs turns that a GPU may run apart.
#include "counters.h"

#include <algorithm>
#include <deque>
#include <unordered_map>
#include <unordered_set>

namespace simt {

Counters counters;

namespace {

constexpr unsigned kSector = 32, kBanks = 32, kBankBytes = 4;
constexpr size_t kPending = 4096;

struct Request {
  unsigned lanes = 0;
  uint64_t address[kWarp];
};

struct Log {  // one instruction of one warp
  Space space;
  bool write;
  unsigned bytes;
  uint64_t executed[kWarp] = {};
  uint64_t first = 0;  // the number of pending.front()
  std::deque<Request> pending;
};

struct Key {
  const Site* site;
  const Warp* warp;
  bool write;
  bool operator==(const Key& o) const { return site == o.site && warp == o.warp && write == o.write; }
};
struct KeyHash {
  size_t operator()(const Key& k) const { return reinterpret_cast<size_t>(k.site) * 31 + reinterpret_cast<size_t>(k.warp) + k.write; }
};

std::unordered_map<Key, Log, KeyHash> logs;
std::unordered_set<uint64_t> sectors_read, sectors_written;

void count_global(const Log& log, const Request& r) {
  std::vector<uint64_t> sectors;
  unsigned lanes = 0;
  for (unsigned l = 0; l < kWarp; l++) {
    if (!(r.lanes >> l & 1)) continue;
    lanes++;
    for (uint64_t s = r.address[l] / kSector; s <= (r.address[l] + log.bytes - 1) / kSector; s++) sectors.push_back(s);
  }
  std::sort(sectors.begin(), sectors.end());
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  auto& seen = log.write ? sectors_written : sectors_read;
  auto& unique = log.write ? counters.unique_write_sectors : counters.unique_read_sectors;
  for (uint64_t s : sectors) unique += seen.insert(s).second;
  (log.write ? counters.global_write_sectors : counters.global_read_sectors) += sectors.size();
  counters.global_requests++;
  // Lanes in a row, wherever they start, touch one sector more than their bytes fill, at most.
  counters.uncoalesced_requests += sectors.size() > (lanes * log.bytes + kSector - 1) / kSector + 1;
}

// Lanes of 8 bytes are served in two passes, of 16 in four; inside a pass, different words of one bank take further ones.
void count_shared(const Log& log, const Request& r) {
  counters.shared_requests++;
  const unsigned per_pass = log.bytes <= 4 ? kWarp : kWarp * 4 / log.bytes;
  for (unsigned first = 0; first < kWarp; first += per_pass) {
    std::vector<uint64_t> words;
    for (unsigned l = first; l < first + per_pass; l++)
      if (r.lanes >> l & 1)
        for (uint64_t w = r.address[l] / kBankBytes; w <= (r.address[l] + log.bytes - 1) / kBankBytes; w++) words.push_back(w);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    unsigned per_bank[kBanks] = {}, most = 0;
    for (uint64_t w : words) most = std::max(most, ++per_bank[w % kBanks]);
    counters.bank_conflicts += most > 1 ? most - 1 : 0;
  }
}

void finish(Log& log, size_t requests) {
  for (; requests; requests--, log.first++) {
    const Request& r = log.pending.front();
    if (r.lanes) log.space == kGlobal ? count_global(log, r) : count_shared(log, r);
    log.pending.pop_front();
  }
}

}  // namespace

void count_access(Thread& t, Space space, bool write, uint64_t address, unsigned bytes, const Site* site) {
  if (space == kGlobal)
    (write ? counters.global_write_bytes : counters.global_read_bytes) += bytes;
  else
    (write ? counters.shared_write_bytes : counters.shared_read_bytes) += bytes;
  Log& log = logs[{site, t.warp, write}];
  log.space = space, log.write = write, log.bytes = bytes;
  const uint64_t number = std::max(log.executed[t.lane], log.first);
  log.executed[t.lane] = number + 1;
  while (log.pending.size() <= number - log.first) log.pending.emplace_back();
  Request& r = log.pending[number - log.first];
  r.lanes |= 1u << t.lane;
  r.address[t.lane] = address;
  if (log.pending.front().lanes == kAllLanes) finish(log, 1);
  if (log.pending.size() > kPending) finish(log, kPending / 2);
}

void count_block_end() {
  counters.blocks++;
  for (auto& entry : logs) finish(entry.second, entry.second.pending.size());
  logs.clear();
}

Counters* ptx_counters() { return &counters; }

void ptx_reset_counters() {
  counters = Counters();
  sectors_read.clear();
  sectors_written.clear();
}

}  // namespace simt
