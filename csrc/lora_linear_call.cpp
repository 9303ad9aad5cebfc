#include "lora_linear_call.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace pykernels {

LoraLinearCall::LoraLinearCall(const LoraLinearInputs& in, uint32_t stream) {
  args.stream = stream;
  check(in, args);
  kernels = PYKERNELS_OF_TIER(tier_for(dtype), lora_linear_kernels)(dtype, dtype == Dtype::float32 && float32_allows_bf16());
  x = rows_of(in.x, args.in);
  args.x = elements_of(x);
  args.x_row = x.stride(0);

  args.weight_transposed = args.out > 1 && in.weight.stride(0) == 1 && in.weight.stride(1) == args.out;
  keep_.push_back(args.weight_transposed ? in.weight : in.weight.contiguous());
  args.weight = elements_of(keep_.back());
  if (in.bias) {
    keep_.push_back(in.bias->contiguous());
    args.bias = elements_of(keep_.back());
  }
  set_adapters(in);
  set_dropout(in, args);
  args.keep_row = (args.in + 7) / 8;
}

void LoraLinearCall::set_adapters(const LoraLinearInputs& in) {
  constexpr int64_t kColumns = 32;  // two vectors of the widest tier
  args.a_row = (args.in + kColumns - 1) / kColumns * kColumns;
  args.b_row = (args.out + kColumns - 1) / kColumns * kColumns;
  if (in.scales) {
    const at::Tensor scales = in.scales->to(at::kDouble).contiguous();
    scales_.assign(scales.const_data_ptr<double>(), scales.const_data_ptr<double>() + args.adapters);
    for (double scale : scales_) TORCH_CHECK_VALUE(std::isfinite(scale), "scale: expected finite numbers, got ", scale);
  } else {
    scales_.assign(args.adapters, in.scale);
  }
  if (in.adapter_index) {
    const at::Tensor& index = *in.adapter_index;
    const at::Tensor wide = index.to(at::kLong).contiguous();
    const auto* of = wide.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < wide.numel(); i++) {
      TORCH_CHECK_VALUE(of[i] >= -1 && of[i] < args.adapters, "adapter_index: expected values from -1 to E - 1 = ", args.adapters - 1,
                        ", got ", of[i]);
    }
    const int64_t repeats = wide.numel() ? args.rows / wide.numel() : 0;
    at::Tensor rows = at::empty({args.rows}, at::kLong);
    for (int64_t i = 0; i < args.rows; i++) rows.mutable_data_ptr<int64_t>()[i] = of[i / repeats];
    keep_.push_back(rows);
    args.adapter_of = rows.const_data_ptr<int64_t>();
  }
  const at::Tensor a = in.lora_a.contiguous(), b = in.lora_b.contiguous();
  adapters = {elements_of(a), elements_of(b), a.scalar_type() == at::kFloat, scales_.data()};
  const int64_t of_a = args.adapters * args.rank * args.a_row, of_b = args.adapters * args.rank * args.b_row;
  at::Tensor arranged = at::empty({of_a + of_b}, at::TensorOptions(sum_type));
  auto* to = static_cast<char*>(elements_of(arranged));
  kernels->arrange(args, adapters, to, to + of_a * kernels->sum_size);
  args.a = to;
  args.b = to + of_a * kernels->sum_size;
  keep_.push_back(arranged);
}

namespace {

Work cut_rows(int64_t total, int64_t rows) {
  std::vector<Block> blocks;
  const int64_t pieces = (total + rows - 1) / rows;
  for (int64_t i = 0, first = 0; i < pieces; i++) {
    const int64_t n = (total - first + pieces - i - 1) / (pieces - i);
    blocks.push_back({0, first, n});
    first += n;
  }
  return Work(std::move(blocks), 0);
}

}  // namespace

Work LoraLinearCall::low_rank_work(int64_t rows) const { return cut_rows(args.rows, rows); }

Work LoraLinearCall::product_work() const {
  constexpr int64_t kMost = 256, kUnitsPerThread = 2;
  const int64_t share = args.rows / (kUnitsPerThread * at::get_num_threads());
  return cut_rows(args.rows, std::clamp(share, 2 * kernels->row_tile, kMost));
}

void few_rows(int64_t (*scratch_of)(int64_t, int64_t, int64_t), int64_t rows, int64_t depth, int64_t outputs,
              const std::function<void(int64_t begin, int64_t end, void* scratch)>& run) {
  constexpr int64_t kColumns = 32, kSharesPerThread = 4;
  const int64_t blocks = (outputs + kColumns - 1) / kColumns, items = std::min<int64_t>(blocks, kSharesPerThread * at::get_num_threads());
  const int64_t most = (blocks + items - 1) / items * kColumns;
  parallel_items(items, scratch_of(rows, depth, most), [&](int64_t item, void* scratch) {
    run(blocks * item / items * kColumns, std::min(outputs, blocks * (item + 1) / items * kColumns), scratch);
  });
}

std::vector<LoraLinearCall> stacked_calls(const StackedInputs& in) {
  const size_t count = check_stacked(in);
  const OptionalTensor none;
  std::vector<LoraLinearCall> calls;
  calls.reserve(count);  // args of a call point into it
  for (size_t i = 0; i < count; i++) {
    const OptionalTensor bias = in.biases.get(i);
    calls.emplace_back(
        LoraLinearInputs{in.x, in.weights[i], in.lora_a[i], in.lora_b[i], bias, none, none, in.seed, in.scales[i], in.dropout},
        static_cast<uint32_t>(i));
  }
  return calls;
}

void* elements_of(const at::Tensor& t) {
  alignas(64) static char nothing[64];
  return t.numel() ? const_cast<void*>(t.const_data_ptr()) : nothing;
}

}  // namespace pykernels
