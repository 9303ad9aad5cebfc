// AdamW and SGD with masked gradients or updates, in one pass over memory.
#include "child_masks.cuh"
#include "child_rules.cuh"
#include "elements.cuh"
#include "launch.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kThreads = 256, kStretch = kThreads * 8;  // elements that a block works on together

// The tensor that a chunk belongs to; those without elements have none.
__device__ __forceinline__ const ChildSlice& slice_of(const ChildLaunch& launch, int64_t chunk) {
  int low = 0, high = launch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (launch.tensors[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return launch.tensors[low];
}

// What gradients are multiplied with: clipped as torch.nn.utils.clip_grad_norm_ does.
__device__ __forceinline__ float grad_factor(const ChildLaunch& launch) {
  double factor = launch.args.grad_factor;
  if (launch.square_sum) {
    const double clip = launch.max_grad_norm / (sqrt(*launch.square_sum) * launch.norm_factor + 1e-6);
    if (clip < 1 || clip != clip) factor *= clip;
  }
  return float(factor);
}

template <class T>
__device__ __forceinline__ void store_parameters(const ChildArgs& args, const ChildSlice& t, int64_t at, int n, float (&p)[8]) {
  if constexpr (sizeof(T) == 2) {
    if (args.stochastic && n > 0) {
      const Draws draws = draw_eight(args.seed, t, at, n, t.stream | 0x80000000u);
#pragma unroll
      for (int k = 0; k < 8; k++) {
        if (k < n) p[k] = round_by(p[k], draws[k]);
      }
    }
  }
  if (n > 0) store_eight(static_cast<T*>(t.p) + at, p, n, t.wide && n == 8);
}

// Eight elements of a thread with one moment for each, or none.
template <class T, class Rule>
__device__ __forceinline__ void update_dense(const ChildArgs& args, const ChildSlice& t, const Rule& rule, float factor, int64_t at,
                                             int n) {
  if (n <= 0) return;
  const bool wide = t.wide && n == 8, masked = t.mask || args.threshold;
  const uint32_t bits = bits_of_eight(args, t, at, n);
  float p[8], g[8], m[8] = {}, v[8] = {};
  load_eight(p, static_cast<const T*>(t.p) + at, n, wide);
  load_eight(g, static_cast<const T*>(t.g) + at, n, wide);
  if (t.m) load_eight(m, static_cast<const float*>(t.m) + at, n, wide);
  if (Rule::kSecond) load_eight(v, static_cast<const float*>(t.v) + at, n, wide);
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const bool selected = bits >> k & 1, decays = selected || !masked || !args.reserved_decay;
    float grad = __fmul_rn(g[k], factor);
    if (masked && args.mask_grad && !selected) grad = 0;
    float d = rule.step(grad, decays ? p[k] : 0.f, m[k], v[k]);
    if (masked && args.mask_update) d = selected ? __fmul_rn(d, float(args.update_factor)) : 0.f;
    p[k] = apply(rule, p[k], d, decays);
  }
  if (t.m) store_eight(static_cast<float*>(t.m) + at, m, n, wide);
  if (Rule::kSecond) store_eight(static_cast<float*>(t.v) + at, v, n, wide);
  store_parameters<T>(args, t, at, n, p);
}

struct Stretch {
  float gradients[kStretch], parameters[kStretch];
  int warp_sums[kThreads / 32];
};

// A block's stretch, whose moments are those of the selected elements: gradients are brought together, threads take one after the other
// with its moments, and the updates go back to where they belong. Returns how many there are.
template <class T, class Rule>
__device__ __forceinline__ int update_compact(const ChildArgs& args, const ChildSlice& t, const Rule& rule, float factor, int64_t at, int n,
                                              int64_t before, Stretch& shared) {
  const bool wide = t.wide && n == 8;
  const uint32_t bits = bits_of_eight(args, t, at, n);
  float p[8] = {}, g[8] = {};
  if (n > 0) {
    load_eight(p, static_cast<const T*>(t.p) + at, n, wide);
    load_eight(g, static_cast<const T*>(t.g) + at, n, wide);
  }
  int count;
  const int mine = sum_before<kThreads>(__popc(bits), shared.warp_sums, count);
  int place = mine;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    if (bits >> k & 1) {
      shared.gradients[place] = __fmul_rn(g[k], factor);
      shared.parameters[place++] = p[k];
    }
  }
  __syncthreads();
  const int64_t most = t.moment_elements - before;
  for (int i = threadIdx.x; i < count && i < most; i += kThreads) {
    float* m = static_cast<float*>(t.m) + before + i;
    float* v = static_cast<float*>(t.v) + before + i;
    float first = t.m ? *m : 0.f, second = Rule::kSecond ? *v : 0.f;
    shared.gradients[i] = rule.step(shared.gradients[i], shared.parameters[i], first, second);
    if (t.m) *m = first;
    if (Rule::kSecond) *v = second;
  }
  __syncthreads();
  place = mine;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const bool selected = bits >> k & 1;
    p[k] = apply(rule, p[k], selected ? shared.gradients[place++] : 0.f, selected || !args.reserved_decay);
  }
  store_parameters<T>(args, t, at, n, p);
  __syncthreads();
  return count;
}

template <class T, class Rule>
__global__ void __launch_bounds__(kThreads, 3) child_update_kernel(const __grid_constant__ ChildLaunch launch) {
  __shared__ Stretch shared;
  __shared__ float shared_factor;
  const ChildSlice& t = slice_of(launch, blockIdx.x);
  if (threadIdx.x == 0) shared_factor = grad_factor(launch);
  __syncthreads();
  const Rule rule(launch.args, t);
  const int64_t first = (blockIdx.x - t.first_chunk) * kChildChunk;
  const int64_t end = first + kChildChunk < t.elements ? first + kChildChunk : t.elements;
  const bool compact = t.mask && t.compact;
  int64_t before = compact ? launch.selected[blockIdx.x] : 0;
  for (int64_t i = first; i < end; i += kStretch) {
    const int64_t at = i + threadIdx.x * 8, left = end - at;
    const int n = left < 0 ? 0 : left < 8 ? int(left) : 8;
    if (compact) {
      before += update_compact<T>(launch.args, t, rule, shared_factor, at, n, before, shared);
    } else {
      update_dense<T>(launch.args, t, rule, shared_factor, at, n);
    }
  }
}

// How many elements each chunk selects.
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ ChildLaunch launch) {
  __shared__ int warp_sums[kThreads / 32];
  const ChildSlice& t = slice_of(launch, blockIdx.x);
  int own = 0, all;
  if (t.mask && t.compact) {
    const int64_t first = (blockIdx.x - t.first_chunk) * kChildChunk + threadIdx.x * (kChildChunk / kThreads);
    for (int64_t i = first; i < first + kChildChunk / kThreads && i < t.elements; i += 8) {
      own += __popc(bits_of_eight(launch.args, t, i, int(t.elements - i < 8 ? t.elements - i : 8)));
    }
  }
  sum_before<kThreads>(own, warp_sums, all);
  if (threadIdx.x == 0) launch.selected[blockIdx.x] = all;
}

// From the counts of a tensor's chunks to their sums before each.
__global__ void __launch_bounds__(kThreads) scan_kernel(const __grid_constant__ ChildLaunch launch) {
  __shared__ int warp_sums[kThreads / 32];
  const ChildSlice& t = launch.tensors[blockIdx.x];
  const int64_t chunks = (t.elements + kChildChunk - 1) / kChildChunk;
  int64_t total = 0;
  for (int64_t c = 0; c < chunks; c += kThreads) {
    const bool there = c + threadIdx.x < chunks;
    int64_t* to = launch.selected + t.first_chunk + c + threadIdx.x;
    int all;
    const int before = sum_before<kThreads>(there ? int(*to) : 0, warp_sums, all);
    if (there) *to = total + before;
    total += all;
  }
}

// Sums over a block, by halves: the same order always.
__device__ __forceinline__ double block_sum(double own, double* shared) {
  shared[threadIdx.x] = own;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

template <class T>
__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ ChildLaunch launch) {
  __shared__ double shared[kThreads];
  const ChildSlice& t = slice_of(launch, blockIdx.x);
  const int64_t first = (blockIdx.x - t.first_chunk) * kChildChunk;
  double sum = 0;
  for (int64_t i = first; i < first + kChildChunk && i < t.elements; i += kStretch) {
    const int64_t at = i + threadIdx.x * 8, left = t.elements - at;
    if (left <= 0) continue;
    float g[8];
    load_eight(g, static_cast<const T*>(t.g) + at, int(left < 8 ? left : 8), t.wide && left >= 8);
#pragma unroll
    for (int k = 0; k < 8; k++) sum += double(g[k]) * g[k];
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) launch.partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const double* partials, int64_t count, double* to) {
  __shared__ double shared[kThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) *to = sum;
}

template <class T>
cudaError_t update(const ChildLaunch& l, cudaStream_t stream) {
  return launch(l.sgd ? child_update_kernel<T, Sgd> : child_update_kernel<T, AdamW>, dim3(unsigned(l.chunks)), dim3(kThreads), 0, stream,
                l);
}

}  // namespace

extern "C" {

cudaError_t pykernels_cuda_child_update_count(const ChildLaunch* l, cudaStream_t stream) {
  const cudaError_t error = launch(count_kernel, dim3(unsigned(l->chunks)), dim3(kThreads), 0, stream, *l);
  return error == cudaSuccess ? launch(scan_kernel, dim3(unsigned(l->count)), dim3(kThreads), 0, stream, *l) : error;
}

cudaError_t pykernels_cuda_child_update(const ChildLaunch* l, cudaStream_t stream) {
  switch (l->dtype) {
    case Dtype::bfloat16: return update<bfloat16>(*l, stream);
    case Dtype::float16: return update<float16>(*l, stream);
    default: return update<float>(*l, stream);
  }
}

cudaError_t pykernels_cuda_child_update_squares(const ChildLaunch* l, cudaStream_t stream) {
  const auto kernel = l->dtype == Dtype::float32    ? squares_kernel<float>
                      : l->dtype == Dtype::bfloat16 ? squares_kernel<bfloat16>
                                                    : squares_kernel<float16>;
  return launch(kernel, dim3(unsigned(l->chunks)), dim3(kThreads), 0, stream, *l);
}

cudaError_t pykernels_cuda_child_update_sum(const double* partials, int64_t count, double* sum, cudaStream_t stream) {
  return launch(sum_kernel, dim3(1), dim3(kThreads), 0, stream, partials, count, sum);
}

}  // extern "C"

}  // namespace pykernels::cuda
