// gated_conv1d: the layouts that its products read, and the choice of the dtype.
#include "gated_conv_dtype.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kTile = 32, kTileRows = 8;

// [c_out, c_in, taps] of value and gate to [groups of 32 values and their gates][tap][in_width].
template <class T>
__global__ void __launch_bounds__(256) pack_kernel(const __grid_constant__ GatedConv p) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x, rows = (p.c_out + 31) / 32 * 64;
  if (index >= rows * p.in_width) return;
  const int64_t row = index / p.in_width, column = index % p.in_width;
  const int64_t output = row / 64 * 32 + row % 32;
  T* to = static_cast<T*>(p.packed) + (row - row % 32 + permuted_column(row % 32)) * p.taps * p.in_width + column;
  const bool inside = output < p.c_out && column < p.c_in;
  const T* from = static_cast<const T*>(row % 64 < 32 ? p.value_weight : p.gate_weight) + (inside ? output * p.c_in + column : 0) * p.taps;
  for (int64_t tap = 0; tap < p.taps; tap++) to[tap * p.in_width] = inside ? from[tap] : from_float<T>(0.f);
}

// To [input][tap][values, gates], each half of out_width.
template <class T>
__global__ void __launch_bounds__(kTile* kTileRows) pack_transposed_kernel(const __grid_constant__ GatedConv p) {
  __shared__ T tile[kTile][kTile + 2];
  const int64_t input0 = int64_t(blockIdx.x) * kTile, inner0 = int64_t(blockIdx.y) * kTile, depth = 2 * p.out_width;
  for (int64_t tap = blockIdx.z; tap < p.taps; tap += gridDim.z) {
    for (int i = threadIdx.y; i < kTile; i += kTileRows) {
      const int64_t inner = inner0 + i, input = input0 + threadIdx.x, output = inner % p.out_width;
      const bool inside = inner < depth && output < p.c_out && input < p.c_in;
      const T* from = static_cast<const T*>(inner < p.out_width ? p.value_weight : p.gate_weight);
      tile[i][threadIdx.x] = inside ? from[(output * p.c_in + input) * p.taps + tap] : from_float<T>(0.f);
    }
    __syncthreads();
    for (int i = threadIdx.y; i < kTile; i += kTileRows) {
      const int64_t inner = inner0 + threadIdx.x;
      if (inner < depth) {
        static_cast<T*>(p.packed_transposed)[(input0 + permuted_column(i)) * p.taps * depth + tap * depth + inner] = tile[threadIdx.x][i];
      }
    }
    __syncthreads();
  }
}

const GatedConvLaunchers& launchers_of(const GatedConv& p) {
  switch (p.dtype) {
    case Dtype::bfloat16: return gated_conv_bfloat16;
    case Dtype::float16: return gated_conv_float16;
    default: return p.tf32 ? gated_conv_tf32 : gated_conv_float32;
  }
}

}  // namespace

extern "C" {

cudaError_t pykernels_cuda_gated_conv_pack(const GatedConv* p, cudaStream_t stream) {
  const auto kernel = element_size(p->dtype) == 4 ? pack_kernel<float> : pack_kernel<bfloat16>;
  return launch(kernel, dim3(blocks_of(round_up(p->c_out, 32) * 2 * p->in_width, 256)), dim3(256), 0, stream, *p);
}

cudaError_t pykernels_cuda_gated_conv_forward(const GatedConv* p, cudaStream_t stream) { return launchers_of(*p).forward(*p, stream); }

cudaError_t pykernels_cuda_gated_conv_backward_gate(const GatedConv* p, cudaStream_t stream) {
  return launchers_of(*p).backward_gate(*p, stream);
}

cudaError_t pykernels_cuda_gated_conv_backward_input(const GatedConv* p, cudaStream_t stream) {
  const auto kernel = element_size(p->dtype) == 4 ? pack_transposed_kernel<float> : pack_transposed_kernel<bfloat16>;
  const dim3 grid(blocks_of(p->c_in, kTile), blocks_of(2 * p->out_width, kTile), unsigned(p->taps < 65535 ? p->taps : 65535));
  const cudaError_t error = launch(kernel, grid, dim3(kTile, kTileRows), 0, stream, *p);
  return error == cudaSuccess ? launchers_of(*p).backward_input(*p, stream) : error;
}

cudaError_t pykernels_cuda_gated_conv_backward_weight(const GatedConv* p, cudaStream_t stream) {
  return launchers_of(*p).backward_weight(*p, stream);
}

}  // extern "C"

}  // namespace pykernels::cuda
