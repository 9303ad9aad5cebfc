// Which instruction set the CPU kernels use. Every kernel is compiled once per tier (CMakeLists.txt); the best tier that the
// processor and the operating system offer is chosen when the library is loaded, and may be lowered afterwards.
#pragma once

#include <atomic>
#include <string>
#include <vector>

namespace pykernels {

// In ascending order: each tier includes the instructions of the ones before it.
enum class CpuTier : int { generic, avx2, avx512, avx512_bf16, amx };

struct CpuTierInfo {
  CpuTier tier;
  const char* name;
  std::string why_not;  // empty: usable here

  bool usable() const { return why_not.empty(); }
};

// All tiers in ascending order, each with the reason where it cannot run here. Asks the processor once.
const std::vector<CpuTierInfo>& cpu_tiers();

// Makes later calls use the tier of that name. Throws std::runtime_error for an unknown name, and, when checked, for a tier
// that cannot run here. Unchecked is for instruction emulators whose CPUID does not tell what they execute.
void set_cpu_tier(const std::string& name, bool checked = true);

const char* cpu_tier_name(CpuTier tier);

namespace detail {
extern std::atomic<CpuTier> cpu_tier;
}

// The tier in use: one relaxed load, cheap enough for every call of an operator.
inline CpuTier cpu_tier() { return detail::cpu_tier.load(std::memory_order_relaxed); }

}  // namespace pykernels

// `name` in the namespace of that tier (kernels/cpu/tiers.h).
#if defined(PYKERNELS_X86_TIERS)
#define PYKERNELS_OF_TIER(tier, name)                                \
  ((tier) == ::pykernels::CpuTier::amx           ? amx::name         \
   : (tier) == ::pykernels::CpuTier::avx512_bf16 ? avx512_bf16::name \
   : (tier) == ::pykernels::CpuTier::avx512      ? avx512::name      \
   : (tier) == ::pykernels::CpuTier::avx2        ? avx2::name        \
                                                 : generic::name)
#else
#define PYKERNELS_OF_TIER(tier, name) generic::name
#endif
