// What comes with the toolkit: CUB, cooperative groups, wmma, pipeline copies.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>

#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>

namespace cg = cooperative_groups;

namespace {

__global__ void cub_kernel(const int* x, int* scan, int* sorted) {
  using Scan = cub::BlockScan<int, 128>;
  using Sort = cub::BlockRadixSort<int, 128, 2>;
  __shared__ union {
    typename Scan::TempStorage scan;
    typename Sort::TempStorage sort;
  } memory;
  int sum;
  Scan(memory.scan).ExclusiveSum(x[threadIdx.x], sum);
  scan[threadIdx.x] = sum;
  __syncthreads();
  int keys[2] = {x[threadIdx.x * 2], x[threadIdx.x * 2 + 1]};
  Sort(memory.sort).Sort(keys);
  sorted[threadIdx.x * 2] = keys[0];
  sorted[threadIdx.x * 2 + 1] = keys[1];
}

__global__ void groups_kernel(const float* x, float* sum, float* swapped, int n) {
  const cg::thread_block block = cg::this_thread_block();
  const auto warp = cg::tiled_partition<32>(block);
  const auto eight = cg::tiled_partition<8>(block);
  float s = 0;
  for (int i = block.thread_rank(); i < n; i += block.size()) s += x[i];
  s = cg::reduce(warp, s, cg::plus<float>());
  if (warp.thread_rank() == 0) atomicAdd(sum, s);
  swapped[block.thread_rank()] = eight.shfl_xor(x[block.thread_rank()], 1);
}

template <class Accumulator>
__global__ void wmma_kernel(const __half* a, const __half* b, Accumulator* c) {
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, __half, row_major> fa;
  fragment<matrix_b, 16, 16, 16, __half, col_major> fb;
  fragment<accumulator, 16, 16, 16, Accumulator> fc;
  fill_fragment(fc, Accumulator(1.0f));
  load_matrix_sync(fa, a, 16);
  load_matrix_sync(fb, b, 16);
  mma_sync(fc, fa, fb, fc);
  store_matrix_sync(c, fc, 16, mem_row_major);
}

__global__ void pipeline_kernel(const float4* x, float4* y) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}

}  // namespace

extern "C" {

cudaError_t cub_scan_sort(const int* x, int* scan, int* sorted, cudaStream_t s) {
  cub_kernel<<<1, 128, 0, s>>>(x, scan, sorted);
  return cudaGetLastError();
}
cudaError_t groups(const float* x, float* sum, float* swapped, int n, cudaStream_t s) {
  groups_kernel<<<1, 128, 0, s>>>(x, sum, swapped, n);
  return cudaGetLastError();
}
cudaError_t wmma_f32(const void* a, const void* b, float* c, cudaStream_t s) {
  wmma_kernel<<<1, 32, 0, s>>>(static_cast<const __half*>(a), static_cast<const __half*>(b), c);
  return cudaGetLastError();
}
cudaError_t wmma_f16(const void* a, const void* b, void* c, cudaStream_t s) {
  wmma_kernel<<<1, 32, 0, s>>>(static_cast<const __half*>(a), static_cast<const __half*>(b), static_cast<__half*>(c));
  return cudaGetLastError();
}
cudaError_t pipeline(const void* x, void* y, cudaStream_t s) {
  pipeline_kernel<<<1, 64, 0, s>>>(static_cast<const float4*>(x), static_cast<float4*>(y));
  return cudaGetLastError();
}

}  // extern "C"
