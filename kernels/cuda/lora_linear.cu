// lora_linear: the choice of the dtype.
#include "lora_linear_dtype.cuh"

namespace pykernels::cuda {
namespace {

const LoraLinearLaunchers& launchers_of(const LoraCall& call) {
  switch (call.dtype) {
    case Dtype::bfloat16: return lora_linear_bfloat16;
    case Dtype::float16: return lora_linear_float16;
    default: return call.tf32 ? lora_linear_tf32 : lora_linear_float32;
  }
}

}  // namespace

extern "C" {

cudaError_t pykernels_cuda_lora_linear_arrange(const LoraArrange* p, cudaStream_t stream) {
  return launchers_of(p->call).arrange(*p, stream);
}
cudaError_t pykernels_cuda_lora_linear_shrink(const LoraShrink* p, cudaStream_t stream) { return launchers_of(p->call).shrink(*p, stream); }
cudaError_t pykernels_cuda_lora_linear_spread(const LoraShrink* p, cudaStream_t stream) { return launchers_of(p->call).spread(*p, stream); }
cudaError_t pykernels_cuda_lora_linear_product(const LoraProduct* p, cudaStream_t stream) {
  return launchers_of(p->call).product(*p, stream);
}
cudaError_t pykernels_cuda_lora_linear_sums(const LoraSums* p, cudaStream_t stream) { return launchers_of(p->call).sums(*p, stream); }
cudaError_t pykernels_cuda_lora_linear_shrink_and_sums(const LoraShrink* low, const LoraSums* p, cudaStream_t stream) {
  return launchers_of(p->call).shrink_and_sums(*low, *p, stream);
}
cudaError_t pykernels_cuda_lora_linear_few(const LoraFew* p, cudaStream_t stream) {
  LoraCall call = p->call;
  call.tf32 = false;
  return launchers_of(call).few(*p, stream);
}

}  // extern "C"

}  // namespace pykernels::cuda
