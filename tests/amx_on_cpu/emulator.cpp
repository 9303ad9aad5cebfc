// Executes AMX instructions on an x86-64 Linux CPU that has none. The CPU raises #UD, Linux sends SIGILL, the handler below decodes the
// instruction at RIP, does its work on tile registers in memory and moves RIP behind it. README.md says what this proves and what not.
//
// The handler allocates nothing, takes no lock and calls only write, abort, raise, sigaction, memcpy and memset. The signal frame restores
// every register (MXCSR, vector and mask registers too), so the code below may use any of them; it changes RIP alone.
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64, kConfigBytes = 64;

enum Kind { kLdtilecfg, kSttilecfg, kTilerelease, kTilezero, kTileloadd, kTileloaddt1, kTilestored, kTdpbf16ps, kTraps, kKinds };
constexpr const char* kNames[kKinds] = {"LDTILECFG",   "STTILECFG",  "TILERELEASE", "TILEZERO", "TILELOADD",
                                        "TILELOADDT1", "TILESTORED", "TDPBF16PS",   "traps"};

std::atomic<uint64_t> counts[kKinds];
std::atomic<bool> poison;
struct sigaction previous;

// One thread's tile registers. rows[t] == 0: the configuration has no such tile.
struct alignas(64) State {
  std::atomic<bool> taken;
  uint8_t config[kConfigBytes];
  int rows[kTiles], row_bytes[kTiles];
  alignas(64) uint32_t data[kTiles][kMaxRows][kMaxRowBytes / 4];
};

// A thread owns a state from LDTILECFG to TILERELEASE. 8 KiB of initial-exec TLS would not fit a library loaded by dlopen, a pointer does.
constexpr int kStates = 256;
State states[kStates];
thread_local State* own __attribute__((tls_model("initial-exec"))) = nullptr;

struct Hex {
  uint64_t value;
};

// Text built without the C library's formatting, which a signal handler must not call.
class Message {
 public:
  Message& operator<<(const char* s) {
    while (*s && size_ < sizeof text_) text_[size_++] = *s++;
    return *this;
  }
  Message& operator<<(uint64_t value) { return number(value, 10, 1); }
  Message& operator<<(int value) { return *this << uint64_t(value); }
  Message& operator<<(Hex h) { return number(h.value, 16, 2); }
  void print() {
    *this << "\n";
    for (size_t done = 0; done < size_;) {
      const ssize_t n = write(STDERR_FILENO, text_ + done, size_ - done);
      if (n <= 0) return;
      done += size_t(n);
    }
  }

 private:
  Message& number(uint64_t value, unsigned base, int width) {
    char digits[24];
    int n = sizeof digits - 1;
    digits[n] = 0;
    for (; value || width > 0; value /= base, width--) digits[--n] = "0123456789abcdef"[value % base];
    return *this << digits + n;
  }

  char text_[512];
  size_t size_ = 0;
};

struct Instruction {
  Kind kind;
  int length;
  int dst, src1, src2;       // tile numbers
  uint64_t address, stride;  // of the memory operand
  const uint8_t* code;
};

template <class... Pieces>
[[noreturn]] void fail(const Instruction& in, Pieces... pieces) {
  Message m;
  m << "amx_on_cpu: " << kNames[in.kind] << " at 0x" << Hex{uint64_t(in.code)} << ": ";
  (m << ... << pieces).print();
  abort();
}

// Intel SDM volume 2, 2.3 and 2.1.5: VEX prefix, ModRM, SIB, displacement. Reads no byte behind `available`, and none that the instruction
// does not have. False for everything that is not one of the eight instructions, also where a CPU with AMX would raise #UD by encoding.
bool decode(const greg_t* reg, const uint8_t* code, int64_t available, Instruction& in) {
  constexpr int kRegister[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const auto value = [&](int number) { return uint64_t(reg[kRegister[number]]); };
  if (available < 5 || code[0] != 0xc4) return false;
  const int r = ~code[1] >> 7 & 1, x = ~code[1] >> 6 & 1, b = ~code[1] >> 5 & 1, map = code[1] & 31;
  const int w = code[2] >> 7, vvvv = ~code[2] >> 3 & 15, l = code[2] >> 2 & 1, pp = code[2] & 3;
  const int opcode = code[3], mod = code[4] >> 6, field = code[4] >> 3 & 7, rm = code[4] & 7;
  const bool memory = mod != 3;
  if (map != 2 || w || l || r) return false;

  enum { kNone, k66, kF3, kF2 };
  in = {};
  in.code = code;
  in.dst = field;
  if (opcode == 0x49 && !vvvv && memory && !field && pp == kNone) {
    in.kind = kLdtilecfg;
  } else if (opcode == 0x49 && !vvvv && memory && !field && pp == k66) {
    in.kind = kSttilecfg;
  } else if (opcode == 0x49 && !vvvv && !memory && !rm && !b && !field && pp == kNone) {
    in.kind = kTilerelease;
  } else if (opcode == 0x49 && !vvvv && !memory && !rm && !b && pp == kF2) {
    in.kind = kTilezero;
  } else if (opcode == 0x4b && !vvvv && memory && rm == 4 && pp != kNone) {
    in.kind = pp == kF2 ? kTileloadd : pp == k66 ? kTileloaddt1 : kTilestored;
  } else if (opcode == 0x5c && vvvv < kTiles && !memory && !b && pp == kF3) {
    in.kind = kTdpbf16ps;
    in.src1 = rm;
    in.src2 = vvvv;
  } else {
    return false;
  }
  in.length = 5;
  if (!memory) return true;

  bool has_base = true, rip = false;
  int base = rm | b << 3;
  uint64_t index = 0;
  if (rm == 4) {
    if (available < 6) return false;
    const int sib = code[in.length++], number = (sib >> 3 & 7) | x << 3;
    if (number != 4) index = value(number) << (sib >> 6);
    base = (sib & 7) | b << 3;
    has_base = mod != 0 || (sib & 7) != 5;
  } else {
    rip = mod == 0 && rm == 5;
  }
  const int bytes = mod == 1 ? 1 : mod == 2 || !has_base || rip ? 4 : 0;
  if (available < in.length + bytes) return false;
  int32_t displacement = 0;
  if (bytes == 1) displacement = int8_t(code[in.length]);
  if (bytes == 4) memcpy(&displacement, code + in.length, 4);
  in.length += bytes;
  in.address = uint64_t(int64_t(displacement));
  if (rip)
    in.address += uint64_t(code) + uint64_t(in.length);
  else if (has_base)
    in.address += value(base);
  // Only the tile instructions read the index register as the distance between rows.
  if (in.kind == kLdtilecfg || in.kind == kSttilecfg)
    in.address += index;
  else
    in.stride = index;
  return true;
}

State* free_state(const Instruction& in) {
  for (State& s : states)
    if (!s.taken.load(std::memory_order_relaxed) && !s.taken.exchange(true, std::memory_order_acquire)) return &s;
  fail(in, kStates, " threads hold a tile configuration; did some end without TILERELEASE?");
}

void load_config(const Instruction& in) {
  uint8_t c[kConfigBytes];
  memcpy(c, reinterpret_cast<const void*>(in.address), sizeof c);
  if (c[0] != 1) fail(in, "#GP: palette ", int(c[0]), ", want 1");
  if (c[1] != 0) fail(in, "start_row ", int(c[1]), ", want 0");
  int rows[kTiles], row_bytes[kTiles];
  for (int i = 2; i < kConfigBytes; i++)
    if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && c[i]) fail(in, "#GP: reserved byte ", i, " is ", int(c[i]), ", want 0");
  for (int t = 0; t < kTiles; t++) {
    rows[t] = c[48 + t];
    row_bytes[t] = c[16 + 2 * t] | c[17 + 2 * t] << 8;
    if (rows[t] > kMaxRows) fail(in, "#GP: tile ", t, " has ", rows[t], " rows, want at most ", kMaxRows);
    if (row_bytes[t] > kMaxRowBytes) fail(in, "#GP: tile ", t, " has colsb ", row_bytes[t], ", want at most ", kMaxRowBytes);
    if (!rows[t] != !row_bytes[t]) fail(in, "#GP: tile ", t, " has ", rows[t], " rows but colsb ", row_bytes[t]);
  }
  if (!own) own = free_state(in);
  memcpy(own->config, c, sizeof c);
  memcpy(own->rows, rows, sizeof rows);
  memcpy(own->row_bytes, row_bytes, sizeof row_bytes);
  memset(own->data, poison.load(std::memory_order_relaxed) ? 0xff : 0, sizeof own->data);  // 0xff...: NaN as bf16 and as fp32
}

void release() {
  if (!own) return;
  own->taken.store(false, std::memory_order_release);
  own = nullptr;
}

void check_tile(const Instruction& in, int tile) {
  if (!own) fail(in, "#UD: no tile configuration is loaded");
  if (!own->rows[tile]) fail(in, "#UD: tile ", tile, " is not in the configuration");
  if (in.kind != kTilezero && own->row_bytes[tile] % 4)
    fail(in, "#UD: tile ", tile, " has colsb ", own->row_bytes[tile], ", want a multiple of 4");
}

// Every access is rows x colsb bytes exactly, so that an unmapped page behind a buffer catches a kernel that reads too far.
void load(const Instruction& in) {
  check_tile(in, in.dst);
  const size_t bytes = size_t(own->row_bytes[in.dst]);
  uint32_t (*tile)[kMaxRowBytes / 4] = own->data[in.dst];
  for (int i = 0; i < kMaxRows; i++) {
    uint8_t* row = reinterpret_cast<uint8_t*>(tile[i]);
    const size_t n = i < own->rows[in.dst] ? bytes : 0;
    if (n) memcpy(row, reinterpret_cast<const void*>(in.address + uint64_t(i) * in.stride), n);
    memset(row + n, 0, kMaxRowBytes - n);
  }
}

void store(const Instruction& in) {
  check_tile(in, in.dst);
  for (int i = 0; i < own->rows[in.dst]; i++)
    memcpy(reinterpret_cast<void*>(in.address + uint64_t(i) * in.stride), own->data[in.dst][i], size_t(own->row_bytes[in.dst]));
}

// Intel SDM volume 2, TDPBF16PS, "Operation" (https://www.felixcloutier.com/x86/tdpbf16ps): within one instruction the even and the odd
// elements of the pairs have sums of their own that start at zero, each step of k adds one product by a fused multiply-add, and only then
//   tmp := even + odd;  dst := dst + tmp
// every operation in fp32, round to nearest even, denormal operands and results zero. The caller sets MXCSR accordingly and this is not
// inlined, so no operation can move out of that setting.
__attribute__((noinline)) void dot_bf16(uint32_t (*c)[16], const uint32_t (*a)[16], const uint32_t (*b)[16], int rows, int pairs,
                                        int columns) {
  constexpr uint32_t kOdd = 0xffff0000;
  float b_even[kMaxRows][16], b_odd[kMaxRows][16];
  for (int k = 0; k < pairs; k++)
    for (int n = 0; n < 16; n++) {
      b_even[k][n] = std::bit_cast<float>(b[k][n] << 16);
      b_odd[k][n] = std::bit_cast<float>(b[k][n] & kOdd);
    }
  for (int m = 0; m < rows; m++) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < pairs; k++) {
      const float a_even = std::bit_cast<float>(a[m][k] << 16), a_odd = std::bit_cast<float>(a[m][k] & kOdd);
      for (int n = 0; n < 16; n++) even[n] = __builtin_fmaf(a_even, b_even[k][n], even[n]);
      for (int n = 0; n < 16; n++) odd[n] = __builtin_fmaf(a_odd, b_odd[k][n], odd[n]);
    }
    for (int n = 0; n < columns; n++) c[m][n] = std::bit_cast<uint32_t>(std::bit_cast<float>(c[m][n]) + (even[n] + odd[n]));
  }
}

void product(const Instruction& in) {
  const int c = in.dst, a = in.src1, b = in.src2;
  if (c == a || c == b || a == b) fail(in, "#UD: tiles ", c, ", ", a, ", ", b, " are not distinct");
  for (int tile : {c, a, b}) check_tile(in, tile);
  const int pairs = own->row_bytes[a] / 4;
  if (pairs != own->rows[b]) fail(in, "#UD: tile ", a, " (A) has colsb / 4 = ", pairs, " but tile ", b, " (B) has ", own->rows[b], " rows");
  if (own->row_bytes[c] != own->row_bytes[b])
    fail(in, "#UD: tile ", c, " (C) has colsb ", own->row_bytes[c], " but tile ", b, " (B) has colsb ", own->row_bytes[b]);
  if (own->rows[c] != own->rows[a]) fail(in, "#UD: tile ", c, " (C) has ", own->rows[c], " rows but tile ", a, " (A) has ", own->rows[a]);
  // MXCSR of the interrupted code comes back with the signal frame.
  constexpr unsigned kMasked = 0x1f80, kDenormalsAreZero = 1 << 6, kFlushToZero = 1 << 15, kNearest = 0;
  _mm_setcsr(kMasked | kDenormalsAreZero | kFlushToZero | kNearest);
  dot_bf16(own->data[c], own->data[a], own->data[b], own->rows[c], pairs, own->row_bytes[c] / 4);
}

void execute(const Instruction& in) {
  switch (in.kind) {
    case kLdtilecfg: load_config(in); break;
    case kSttilecfg: {
      static constexpr uint8_t kNoConfig[kConfigBytes] = {};
      memcpy(reinterpret_cast<void*>(in.address), own ? own->config : kNoConfig, kConfigBytes);
      break;
    }
    case kTilerelease: release(); break;
    case kTilezero:
      check_tile(in, in.dst);
      memset(own->data[in.dst], 0, sizeof own->data[in.dst]);
      break;
    case kTileloadd:
    case kTileloaddt1: load(in); break;
    case kTilestored: store(in); break;
    case kTdpbf16ps: product(in); break;
    default: abort();
  }
}

// x86-64 pages have 4 KiB at least: the bytes from `code` to the end of the page that holds the byte before it are mapped.
int64_t readable(const uint8_t* code) { return int64_t((((uint64_t(code) - 1) | 4095) + 1) - uint64_t(code)); }

// Gives way to the previous action, which by default kills the process: the instruction is executed again under it, a signal that was sent
// is sent again. Only once, as the previous handler may give way to this one in turn (Python's faulthandler does).
void refuse(const siginfo_t* info, const uint8_t* code) {
  const bool sent = info->si_code <= 0;
  if (!sent) {
    Message m;
    m << "amx_on_cpu: illegal instruction at 0x" << Hex{uint64_t(code)} << ", not one that is emulated:";
    const int64_t n = readable(code + 1) + 1;
    for (int64_t i = 0; i < n && i < 15; i++) m << " " << Hex{code[i]};
    m.print();
  }
  sigaction(SIGILL, &previous, nullptr);
  previous = {};
  if (sent) raise(SIGILL);
}

void on_sigill(int, siginfo_t* info, void* context) {
  greg_t* reg = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint8_t* code = reinterpret_cast<const uint8_t*>(reg[REG_RIP]);
  Instruction in;
  if (info->si_code <= 0 || !decode(reg, code, 15, in)) return refuse(info, code);
  counts[kTraps].fetch_add(1, std::memory_order_relaxed);
  // A trap costs more than an instruction: those that follow directly are executed in the same one.
  do {
    execute(in);
    counts[in.kind].fetch_add(1, std::memory_order_relaxed);
    code += in.length;
    reg[REG_RIP] = greg_t(code);
  } while (decode(reg, code, readable(code), in));
}

}  // namespace

// Installs the handler, again if another took its place. 0, or -1 with errno.
EXPORT int amx_install() {
  struct sigaction current, action = {};
  if (sigaction(SIGILL, nullptr, &current)) return -1;
  if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_sigill) return 0;
  previous = current;
  action.sa_sigaction = on_sigill;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, nullptr);
}

// Name of count `kind`, null behind the last.
EXPORT const char* amx_name(int kind) { return kind >= 0 && kind < kKinds ? kNames[kind] : nullptr; }

// Instructions executed by all threads so far, in the order of amx_name; the last is the number of traps.
EXPORT void amx_counts(uint64_t* out) {
  for (int i = 0; i < kKinds; i++) out[i] = counts[i].load(std::memory_order_relaxed);
}

// With poison on, LDTILECFG leaves NaN in the tiles (a CPU leaves zeros), so that a tile read before it was written shows.
EXPORT void amx_poison(int on) { poison.store(on != 0, std::memory_order_relaxed); }

// All 16 x 64 bytes of one tile register of the calling thread, for tests and debuggers. -1: no configuration is loaded.
EXPORT int amx_tile(int tile, void* out) {
  if (!own || tile < 0 || tile >= kTiles) return -1;
  memcpy(out, own->data[tile], sizeof own->data[tile]);
  return 0;
}
