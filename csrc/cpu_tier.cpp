#include "cpu_tier.h"

#include <stdexcept>

#if defined(PYKERNELS_X86_TIERS)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace pykernels {
namespace {

#if defined(PYKERNELS_X86_TIERS)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero where the processor has no such leaf.
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(unsigned reg, int n) { return reg >> n & 1; }

// XCR0: the register state that the operating system saves when it switches threads. A processor may have instructions
// that the system does not support; executing them would fault.
uint64_t saved_state(bool osxsave) {
  if (!osxsave) return 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Linux gives tile registers only to processes that ask, and a sandbox may forbid the question.
bool request_amx() {
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
}

// Why this machine cannot run the tier; empty if it can.
std::string why_not(CpuTier tier) {
  const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
  const uint64_t state = saved_state(bit(leaf1.ecx, 27));
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;

  // Exactly what the compiler flags of each tier allow the compiler to use.
  const struct {
    CpuTier tier;
    const char* name;
    bool present;
  } instructions[] = {
      {CpuTier::avx2, "avx", bit(leaf1.ecx, 28)},
      {CpuTier::avx2, "avx2", bit(leaf7.ebx, 5)},
      {CpuTier::avx2, "fma", bit(leaf1.ecx, 12)},
      {CpuTier::avx2, "f16c", bit(leaf1.ecx, 29)},
      {CpuTier::avx512, "avx512f", bit(leaf7.ebx, 16)},
      {CpuTier::avx512, "avx512bw", bit(leaf7.ebx, 30)},
      {CpuTier::avx512, "avx512dq", bit(leaf7.ebx, 17)},
      {CpuTier::avx512, "avx512vl", bit(leaf7.ebx, 31)},
      {CpuTier::avx512_bf16, "avx512_bf16", bit(leaf7_1.eax, 5)},
      {CpuTier::amx, "amx_tile", bit(leaf7.edx, 24)},
      {CpuTier::amx, "amx_bf16", bit(leaf7.edx, 22)},
  };
  for (const auto& i : instructions)
    if (i.tier <= tier && !i.present) return std::string("the processor has no ") + i.name;

  const struct {
    CpuTier tier;
    const char* name;
    uint64_t mask;
  } states[] = {
      {CpuTier::avx2, "ymm", kYmm},
      {CpuTier::avx512, "zmm", kZmm},
      {CpuTier::amx, "tile", kTiles},
  };
  for (const auto& s : states)
    if (s.tier <= tier && (state & s.mask) != s.mask) return std::string("the operating system does not save ") + s.name + " registers";

  if (tier == CpuTier::amx && !request_amx()) return "the operating system refused the use of AMX (arch_prctl ARCH_REQ_XCOMP_PERM)";
  return "";
}

#else

std::string why_not(CpuTier tier) { return tier == CpuTier::generic ? "" : "built for another processor architecture"; }

#endif

std::vector<CpuTierInfo> detect() {
  std::vector<CpuTierInfo> tiers;
  for (CpuTier t : {CpuTier::generic, CpuTier::avx2, CpuTier::avx512, CpuTier::avx512_bf16, CpuTier::amx})
    tiers.push_back({t, cpu_tier_name(t), why_not(t)});
  return tiers;
}

CpuTier best() {
  CpuTier tier = CpuTier::generic;
  for (const CpuTierInfo& info : cpu_tiers())
    if (info.usable()) tier = info.tier;
  return tier;
}

std::string usable_names() {
  std::string names;
  for (const CpuTierInfo& info : cpu_tiers())
    if (info.usable()) names += (names.empty() ? "" : ", ") + std::string(info.name);
  return names;
}

}  // namespace

std::atomic<CpuTier> detail::cpu_tier{best()};

const std::vector<CpuTierInfo>& cpu_tiers() {
  static const std::vector<CpuTierInfo> tiers = detect();
  return tiers;
}

const char* cpu_tier_name(CpuTier tier) {
  switch (tier) {
    case CpuTier::generic: return "generic";
    case CpuTier::avx2: return "avx2";
    case CpuTier::avx512: return "avx512";
    case CpuTier::avx512_bf16: return "avx512_bf16";
    case CpuTier::amx: return "amx";
  }
  return "unknown";
}

void set_cpu_tier(const std::string& name, bool checked) {
  for (const CpuTierInfo& info : cpu_tiers()) {
    if (info.name != name) continue;
    if (checked && !info.usable())
      throw std::runtime_error("CPU tier '" + name + "' cannot be used here: " + info.why_not + "; choose one of " + usable_names());
    detail::cpu_tier.store(info.tier, std::memory_order_relaxed);
    return;
  }
  throw std::runtime_error("CPU tier '" + name + "' does not exist; choose one of " + usable_names());
}

}  // namespace pykernels
