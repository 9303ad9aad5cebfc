#include "random_bits.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include "cpu_tier.h"
#include "parallel.h"
#include "tiers.h"

namespace pykernels {

PYKERNELS_IN_EVERY_TIER(extern const RandomBits random_bits;)

namespace {

at::Tensor seed() {
  auto generator = at::detail::getDefaultCPUGenerator();
  std::lock_guard<std::mutex> lock(generator.mutex());
  const uint64_t bits = at::check_generator<at::CPUGeneratorImpl>(generator)->random64();
  return at::scalar_tensor(static_cast<int64_t>(bits), at::kLong);
}

at::Tensor random_bits(const at::Tensor& seed, int64_t rows, int64_t n, int64_t stream, int64_t step) {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong && seed.dim() == 0, "seed: expected a 0-d int64 tensor, got ", seed.dim(), "-d ",
                   seed.scalar_type());
  TORCH_CHECK_VALUE(rows >= 0 && n >= 0, "rows, n: expected sizes >= 0, got ", rows, " and ", n);
  at::Tensor draws = at::empty({rows, n}, at::kInt);
  if (draws.numel() == 0) return draws;
  const RandomBits kernel = PYKERNELS_OF_TIER(cpu_tier(), random_bits);
  const auto bits = static_cast<uint64_t>(seed.item<int64_t>());
  constexpr int64_t kRows = 64;
  const int64_t scratch_bytes = ((n + 7) / 8 * 8 + kDrawsScratch) * int64_t(sizeof(uint16_t));
  parallel_items((rows + kRows - 1) / kRows, scratch_bytes, [&](int64_t item, void* scratch) {
    kernel(draws.mutable_data_ptr<int32_t>(), bits, item * kRows, std::min(rows, (item + 1) * kRows), n, uint32_t(stream), uint32_t(step),
           static_cast<uint16_t*>(scratch));
  });
  return draws;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("_random_bits", &random_bits); }
TORCH_LIBRARY_IMPL(pykernels, CompositeExplicitAutograd, m) { m.impl("_seed", &seed); }

}  // namespace pykernels
