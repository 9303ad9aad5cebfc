// attention_pool: the layouts that its products read, what is done once for a sequence or a score, and the choice of the dtype.
#include "attention_pool_dtype.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) parameters_kernel(const __grid_constant__ AttentionPool p) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = index / p.padded_hidden, unit = index % p.padded_hidden;
  if (row >= 2 + p.heads) return;
  const T* from = static_cast<const T*>(row == 0 ? p.bias : row == 1 ? p.gate_bias : p.query);
  if (row > 1) from += (row - 2) * p.hidden;
  p.parameters[index] = from && unit < p.hidden ? to_float(from[unit]) : 0.f;
}

// Weights to [input column][halves][hidden_width].
template <class T>
__global__ void __launch_bounds__(kThreads) pack_transposed_kernel(const __grid_constant__ AttentionPool p) {
  constexpr int kTile = 32;
  __shared__ T tile[kTile][kTile + 2];
  const int64_t column0 = int64_t(blockIdx.x) * kTile, unit0 = int64_t(blockIdx.y) * kTile;
  const T* from = static_cast<const T*>(blockIdx.z ? p.gate_weight : p.weight);
  for (int i = threadIdx.x / kTile; i < kTile; i += kThreads / kTile) {
    const int64_t unit = unit0 + i, column = column0 + threadIdx.x % kTile;
    tile[i][threadIdx.x % kTile] = unit < p.hidden && column < p.width ? from[unit * p.in_width + column] : from_float<T>(0.f);
  }
  __syncthreads();
  for (int i = threadIdx.x / kTile; i < kTile; i += kThreads / kTile) {
    const int64_t unit = unit0 + threadIdx.x % kTile, row = column0 + permuted_column(i);
    if (unit < p.hidden_width) {
      static_cast<T*>(p.packed_transposed)[(row * p.halves + blockIdx.z) * p.hidden_width + unit] = tile[threadIdx.x % kTile][i];
    }
  }
}

// Sum over the threads of a block, the same for all of them.
__device__ __forceinline__ float block_sum(float mine) {
  __shared__ float partial[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < kThreads / 32; i++) sum += partial[i];
  __syncthreads();
  return sum;
}

__device__ __forceinline__ float block_max(float mine) {
  __shared__ float partial[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, mine, step);
    mine = other > mine ? other : mine;
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
  __syncthreads();
  float largest = mine;
  for (int i = 0; i < kThreads / 32; i++) largest = partial[i] > largest ? partial[i] : largest;
  __syncthreads();
  return largest;
}

// The chunks of one sequence and head put together, for 32 columns of out. Each of eight warps sums every eighth chunk.
template <class T>
__global__ void __launch_bounds__(kThreads, 5) combine_kernel(const __grid_constant__ AttentionPool p) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float scales[kThreads], partial[kWarps][32];
  const float kLowest = __int_as_float(0xff800000);
  const int64_t at = blockIdx.x, sequence = at / p.heads;
  const SequenceRows those = sequence_rows(p.batch, sequence);
  if (those.live <= p.chunk_rows) return;
  const int count = int((those.live + p.chunk_rows - 1) / p.chunk_rows), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = first_chunk(p, sequence, those.first) * p.heads + at % p.heads;

  float largest = kLowest;
  bool live = false;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float2 end = p.ends[first + i * p.heads];
    if (end.x < 0.f) continue;
    live = true;
    largest = end.y > largest ? end.y : largest;
  }
  const bool any = __syncthreads_or(live);
  largest = block_max(largest);
  const float base = largest == kLowest ? 0.f : largest;

  const int64_t column = int64_t(blockIdx.y) * 32 + lane;
  float total = 0.f, sum = 0.f;
  for (int begin = 0; begin < count; begin += kThreads) {
    float scale = 0.f;
    if (begin + int(threadIdx.x) < count) {
      const float2 end = p.ends[first + (begin + threadIdx.x) * p.heads];
      if (!(end.x < 0.f)) {
        scale = expf((end.y == kLowest ? 0.f : end.y) - base);
        total += end.x * scale;
      } else {
        scale = -1.f;  // nothing to read
      }
    }
    scales[threadIdx.x] = scale;
    __syncthreads();
    const int end = count - begin < kThreads ? count - begin : kThreads;
    for (int i = warp; i < end && column < p.width; i += kWarps) {
      if (!(scales[i] < 0.f)) sum = fmaf(p.parts[(first + (begin + i) * p.heads) * p.width + column], scales[i], sum);
    }
    __syncthreads();
  }
  partial[warp][lane] = sum;
  total = block_sum(total);
  if (warp == 0 && column < p.width) {
    sum = 0.f;
    for (int i = 0; i < kWarps; i++) sum += partial[i][lane];
    sum = any ? sum / total : 0.f;
    static_cast<T*>(p.out)[at * p.width + column] = from_float<T>(sum);
    if (p.pooled) static_cast<float*>(p.pooled)[at * p.width + column] = sum;
  }
  if (threadIdx.x == 0 && blockIdx.y == 0) {
    static_cast<float*>(p.max_sum)[2 * at] = any ? base : 0.f;
    static_cast<float*>(p.max_sum)[2 * at + 1] = any ? total : 0.f;
  }
}

// a from s; a thread for each row, blockIdx.y for heads.
__global__ void __launch_bounds__(kThreads) normalize_kernel(const __grid_constant__ AttentionPool p) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.batch.rows) return;
  const auto [sequence, t] = place_of(p.batch, row, p.batch.length);
  const bool live = exists(sequence_rows(p.batch, sequence), t);
  for (int64_t head = blockIdx.y; head < p.heads; head += gridDim.y) {
    const int64_t at = score_index(p, row, t, head);
    static_cast<float*>(p.weights)[at] = live ? weight_of(p, sequence, head, static_cast<const float*>(p.scores)[at]) : 0.f;
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------------------------

// A block for each sequence and head.
template <class T>
__global__ void __launch_bounds__(kThreads) delta_kernel(const __grid_constant__ AttentionPool p) {
  const int64_t at = blockIdx.x, sequence = at / p.heads, head = at % p.heads;
  float sum = 0.f;
  if (p.dout) {
    const T* dout = static_cast<const T*>(p.dout) + at * p.width;
    const float* out = static_cast<const float*>(p.pooled) + at * p.width;
    for (int64_t i = threadIdx.x; i < p.width; i += kThreads) sum = fmaf(to_float(dout[i]), out[i], sum);
  }
  if (p.dscores && p.softmax_returned) {
    const SequenceRows those = sequence_rows(p.batch, sequence);
    for (int64_t t = threadIdx.x; t < those.live; t += kThreads) {
      if (!exists(those, t)) continue;
      const int64_t score = score_index(p, those.first + t, t, head);
      const float a = weight_of(p, sequence, head, static_cast<const float*>(p.scores)[score]);
      sum = fmaf(a, static_cast<const float*>(p.dscores)[score], sum);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) static_cast<float*>(p.delta)[at] = sum;
}

// a and ds; a warp for each row.
template <class T>
__global__ void __launch_bounds__(kThreads) score_gradient_kernel(const __grid_constant__ AttentionPool p) {
  constexpr int kTogether = 4;  // heads that share the loads of x
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.batch.rows) return;
  const auto [sequence, t] = place_of(p.batch, row, p.batch.length);
  const SequenceRows those = sequence_rows(p.batch, sequence);
  if (!exists(those, t)) return;
  const T* const x = reinterpret_cast<const T*>(row_of_x<T>(p, sequence, those.first, t));
  for (int64_t first = 0; first < p.heads; first += kTogether) {
    const int count = int(p.heads - first < kTogether ? p.heads - first : kTogether);
    float sum[kTogether] = {};
    for (int64_t column = lane * 8; column < p.width && p.dout; column += 32 * 8) {
      float of_x[8], of_dout[8];
      const int n = units_left(p.in_width, column);
      load_eight(of_x, x + column, n, n == 8);
#pragma unroll
      for (int j = 0; j < kTogether; j++) {
        if (j >= count) break;
        const T* dout = static_cast<const T*>(p.dout) + (sequence * p.heads + first + j) * p.width + column;
        load_eight(of_dout, dout, units_left(p.width, column), p.wide);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[j] = fmaf(of_x[i], of_dout[i], sum[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], step);
      if (lane != 0 || j >= count) continue;
      const int64_t score = score_index(p, row, t, first + j);
      const float given = p.dscores ? static_cast<const float*>(p.dscores)[score] : 0.f;
      const float a = weight_of(p, sequence, first + j, static_cast<const float*>(p.scores)[score]);
      const float da = sum[j] + (p.softmax_returned ? given : 0.f);
      const float ds = a * (da - static_cast<const float*>(p.delta)[sequence * p.heads + first + j]);
      p.row_weights[(first + j) * p.batch.rows + row] = a;
      p.row_gradients[(first + j) * p.batch.rows + row] = ds + (p.softmax_returned ? 0.f : given);
    }
  }
}

// dweight and dgate_weight: the partials in their order.
template <class T>
__global__ void __launch_bounds__(kThreads) reduce_weight_kernel(const __grid_constant__ AttentionPool p) {
  const int64_t elements = p.halves * p.hidden_width * p.in_width, index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= elements) return;
  const int64_t column = index % p.in_width, row = index / p.in_width;
  const bool gate = row >= p.hidden_width;
  const int64_t unit = gate ? row - p.hidden_width : row;
  T* to = static_cast<T*>(gate ? p.dgate_weight : p.dweight);
  if (column >= p.width || unit >= p.hidden || !to) return;
  float sum = 0.f;
  for (int64_t split = 0; split < p.splits; split++) sum += p.partials[split * elements + index];
  to[unit * p.width + column] = from_float<T>(sum);
}

// dbias, dgate_bias and dquery (blockIdx.y: which of them): 32 units, of which each of 32 warps sums every 32nd partial.
constexpr int kReduceWarps = 32;
template <class T>
__global__ void __launch_bounds__(32 * kReduceWarps) reduce_sums_kernel(const __grid_constant__ AttentionPool p) {
  __shared__ float partial[kReduceWarps][32];
  T* to = static_cast<T*>(blockIdx.y == 0 ? p.dbias : blockIdx.y == 1 ? p.dgate_bias : p.dquery);
  if (!to) return;
  if (blockIdx.y > 1) to += (blockIdx.y - 2) * p.hidden;
  const int64_t unit = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
  float sum = 0.f;
  if (unit < p.hidden) {
    for (int64_t i = threadIdx.x / 32; i < p.sum_blocks; i += kReduceWarps) {
      sum += p.sums[(i * (2 + p.heads) + blockIdx.y) * p.padded_hidden + unit];
    }
  }
  partial[threadIdx.x / 32][threadIdx.x % 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || unit >= p.hidden) return;
  sum = 0.f;
  for (int i = 0; i < kReduceWarps; i++) sum += partial[i][threadIdx.x];
  to[unit] = from_float<T>(sum);
}

const AttentionPoolLaunchers& launchers_of(const AttentionPool& p) {
  switch (p.dtype) {
    case Dtype::bfloat16: return attention_pool_bfloat16;
    case Dtype::float16: return attention_pool_float16;
    default: return p.tf32 ? attention_pool_tf32 : attention_pool_float32;
  }
}

using Kernel = void (*)(AttentionPool);

// The kernel of the dtype.
Kernel choose(Dtype dtype, Kernel wide, Kernel bfloat, Kernel half) {
  return dtype == Dtype::float32 ? wide : dtype == Dtype::bfloat16 ? bfloat : half;
}

unsigned head_blocks(const AttentionPool& p) { return unsigned(p.heads < 65535 ? p.heads : 65535); }

}  // namespace

extern "C" {

cudaError_t pykernels_cuda_attention_pool_parameters(const AttentionPool* p, cudaStream_t stream) {
  const int64_t elements = (2 + p->heads) * p->padded_hidden;
  if (elements == 0) return cudaSuccess;
  const Kernel kernel = choose(p->dtype, parameters_kernel<float>, parameters_kernel<bfloat16>, parameters_kernel<float16>);
  return launch(kernel, dim3(blocks_of(elements, kThreads)), dim3(kThreads), 0, stream, *p);
}

cudaError_t pykernels_cuda_attention_pool_forward(const AttentionPool* p, cudaStream_t stream) {
  cudaError_t error = launchers_of(*p).forward(*p, stream);
  if (error == cudaSuccess && p->parts) {
    const Kernel kernel = choose(p->dtype, combine_kernel<float>, combine_kernel<bfloat16>, combine_kernel<float16>);
    const dim3 grid(unsigned(p->batch.sequences * p->heads), p->width > 0 ? blocks_of(p->width, 32) : 1);
    error = launch(kernel, grid, dim3(kThreads), 0, stream, *p);
  }
  if (error == cudaSuccess && p->weights && p->batch.rows > 0) {
    error = launch(normalize_kernel, dim3(blocks_of(p->batch.rows, kThreads), head_blocks(*p)), dim3(kThreads), 0, stream, *p);
  }
  return error;
}

cudaError_t pykernels_cuda_attention_pool_backward_scores(const AttentionPool* p, cudaStream_t stream) {
  const Kernel delta = choose(p->dtype, delta_kernel<float>, delta_kernel<bfloat16>, delta_kernel<float16>);
  const Kernel scores = choose(p->dtype, score_gradient_kernel<float>, score_gradient_kernel<bfloat16>, score_gradient_kernel<float16>);
  const cudaError_t error = launch(delta, dim3(unsigned(p->batch.sequences * p->heads)), dim3(kThreads), 0, stream, *p);
  if (error != cudaSuccess || p->batch.rows == 0) return error;
  return launch(scores, dim3(blocks_of(p->batch.rows, kThreads / 32)), dim3(kThreads), 0, stream, *p);
}

cudaError_t pykernels_cuda_attention_pool_pack_transposed(const AttentionPool* p, cudaStream_t stream) {
  const Kernel kernel = choose(p->dtype, pack_transposed_kernel<float>, pack_transposed_kernel<bfloat16>, pack_transposed_kernel<float16>);
  const dim3 grid(blocks_of(p->width, 32), blocks_of(p->hidden_width, 32), unsigned(p->halves));
  return launch(kernel, grid, dim3(kThreads), 0, stream, *p);
}

cudaError_t pykernels_cuda_attention_pool_backward_hidden(const AttentionPool* p, cudaStream_t stream) {
  return launchers_of(*p).backward_hidden(*p, stream);
}

cudaError_t pykernels_cuda_attention_pool_backward_input(const AttentionPool* p, cudaStream_t stream) {
  return launchers_of(*p).backward_input(*p, stream);
}

cudaError_t pykernels_cuda_attention_pool_backward_weight(const AttentionPool* p, cudaStream_t stream) {
  return launchers_of(*p).backward_weight(*p, stream);
}

cudaError_t pykernels_cuda_attention_pool_reduce(const AttentionPool* p, cudaStream_t stream) {
  if (p->partials) {
    const Kernel kernel = choose(p->dtype, reduce_weight_kernel<float>, reduce_weight_kernel<bfloat16>, reduce_weight_kernel<float16>);
    const unsigned blocks = blocks_of(p->halves * p->hidden_width * p->in_width, kThreads);
    const cudaError_t error = launch(kernel, dim3(blocks), dim3(kThreads), 0, stream, *p);
    if (error != cudaSuccess) return error;
  }
  const Kernel kernel = choose(p->dtype, reduce_sums_kernel<float>, reduce_sums_kernel<bfloat16>, reduce_sums_kernel<float16>);
  return launch(kernel, dim3(blocks_of(p->hidden, 32), unsigned(2 + p->heads)), dim3(32 * kReduceWarps), 0, stream, *p);
}

}  // extern "C"

}  // namespace pykernels::cuda
