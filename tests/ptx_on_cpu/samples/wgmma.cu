// One warpgroup product c[64,n] = a[64,64] b of Hopper, operands in shared memory with 128-byte swizzle. b comes as [n,64] (k in a row)
// or as [64,n] (n in a row).
#include <cuda_bf16.h>

#include <cstdint>

namespace {

constexpr int kM = 64, kN = 64, kK = 64, kRow = 128;  // a row of the pattern: 64 elements of 2 bytes

__device__ uint64_t descriptor(const void* p, int leading, int stride) {
  const uint64_t start = uint64_t(__cvta_generic_to_shared(p));
  return (start & 0x3ffff) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// 16-byte piece q of row r of a 128-byte wide tile lies where piece q ^ r % 8 would.
__device__ void fill(uint8_t* tile, const __nv_bfloat16* x) {
  for (int i = threadIdx.x; i < 64 * 8; i += blockDim.x) {
    const int r = i / 8, q = i % 8;
    *reinterpret_cast<uint4*>(tile + r * kRow + (q ^ r % 8) * 16) = reinterpret_cast<const uint4*>(x)[i];
  }
}

template <bool Transposed>
__global__ void wgmma_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  extern __shared__ __align__(1024) uint8_t tiles[];
  uint8_t *tile_a = tiles, *tile_b = tiles + 64 * kRow;
  fill(tile_a, a);
  fill(tile_b, b);
  asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  float d[32] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  for (int k = 0; k < kK; k += 16) {
    const uint64_t da = descriptor(tile_a + k * 2, 16, 8 * kRow);
    const uint64_t db = Transposed ? descriptor(tile_b + k * kRow, 64 * kRow, 8 * kRow) : descriptor(tile_b + k * 2, 16, 8 * kRow);
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, %35; }\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
          "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
          "+f"(d[30]), "+f"(d[31])
        : "l"(da), "l"(db), "r"(k), "n"(Transposed));
  }
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int i = 0; i < 32; i++) c[(warp * 16 + lane / 4 + (i / 2 % 2) * 8) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <bool Transposed>
cudaError_t launch(const void* a, const void* b, float* c, cudaStream_t s) {
  wgmma_kernel<Transposed><<<1, 128, 2 * 64 * kRow, s>>>(static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), c);
  return cudaGetLastError();
}

}  // namespace

extern "C" {
cudaError_t wgmma_k_rows(const void* a, const void* b, float* c, cudaStream_t s) { return launch<false>(a, b, c, s); }
cudaError_t wgmma_n_rows(const void* a, const void* b, float* c, cudaStream_t s) { return launch<true>(a, b, c, s); }
}
