// Matrix products with tensor cores: c[m,n] = a[m,k] b[k,n]. Seeded bugs are switched on by -D, see test_seeded_bugs.py.
#include <cuda_bf16.h>

#include <cstdint>

namespace {

__device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes, zeros where !inside.
__device__ void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0));
}
__device__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int Left>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left));
}

__device__ void load_a(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p)));
}
__device__ void load_b(uint32_t (&r)[2], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(p)));
}
__device__ void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

constexpr int kM = 64, kN = 64, kK = 32, kPadA = kK + 8, kPadB = kN + 8;

__global__ void __launch_bounds__(128)
    gemm_bf16_kernel(const __nv_bfloat16* __restrict__ a, const __nv_bfloat16* __restrict__ b, float* __restrict__ c, int m, int n, int k) {
  extern __shared__ __align__(16) __nv_bfloat16 tiles[];
  __nv_bfloat16 *tile_a = tiles, *tile_b = tiles + 2 * kM * kPadA;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int row0 = blockIdx.y * kM, column0 = blockIdx.x * kN, warp_row = (warp >> 1) * 32, warp_column = (warp & 1) * 32;
  float sums[2][4][4] = {};
  auto load = [&](int stage, int k0) {
    for (int i = thread; i < kM * kK / 8; i += 128) {
      const int r = i / (kK / 8), q = i % (kK / 8) * 8;
#ifdef BUG_OUT_OF_BOUNDS
      const bool inside = row0 + r <= m && k0 + q < k;
#else
      const bool inside = row0 + r < m && k0 + q < k;
#endif
      copy_async(tile_a + stage * kM * kPadA + r * kPadA + q, inside ? a + int64_t(row0 + r) * k + k0 + q : a, inside);
    }
    for (int i = thread; i < kK * kN / 8; i += 128) {
      const int r = i / (kN / 8), q = i % (kN / 8) * 8;
      const bool inside = k0 + r < k && column0 + q < n;
      copy_async(tile_b + stage * kK * kPadB + r * kPadB + q, inside ? b + int64_t(k0 + r) * n + column0 + q : b, inside);
    }
    commit();
  };
  const int steps = (k + kK - 1) / kK;
  load(0, 0);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) {
      load((step + 1) & 1, (step + 1) * kK);
#ifdef BUG_WAIT
      wait<2>();
#else
      wait<1>();
#endif
    } else {
      wait<0>();
    }
    __syncthreads();
    const __nv_bfloat16 *own_a = tile_a + (step & 1) * kM * kPadA, *own_b = tile_b + (step & 1) * kK * kPadB;
#pragma unroll
    for (int kk = 0; kk < kK; kk += 16) {
      uint32_t fragment_a[2][4], fragment_b[4][2];
#ifdef BUG_MISALIGNED
      constexpr int kShift = 4;
#else
      constexpr int kShift = 8;
#endif
      for (int i = 0; i < 2; i++) load_a(fragment_a[i], own_a + (warp_row + i * 16 + (lane & 15)) * kPadA + kk + (lane >> 4) * kShift);
      for (int j = 0; j < 4; j++) load_b(fragment_b[j], own_b + (kk + (lane & 15)) * kPadB + warp_column + j * 8);
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) multiply_bf16(sums[i][j], fragment_a[i], fragment_b[j]);
    }
#ifndef BUG_LOOP_BARRIER
    __syncthreads();
#endif
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++)
      for (int r = 0; r < 4; r++) {
        const int row = row0 + warp_row + i * 16 + (lane >> 2) + (r >> 1) * 8,
                  column = column0 + warp_column + j * 8 + (lane & 3) * 2 + (r & 1);
        if (row < m && column < n) c[int64_t(row) * n + column] = sums[i][j][r];
      }
}

__device__ uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// One warp, 16 x 8 of c; fragments straight from global memory. K 8 or 4.
template <int K>
__global__ void gemm_tf32_kernel(const float* a, const float* b, float* c, int m, int n, int k) {
  const int lane = threadIdx.x, g = lane >> 2, t = lane & 3, row0 = blockIdx.y * 16, column0 = blockIdx.x * 8;
  auto at_a = [&](int r, int q) { return r < m && q < k ? to_tf32(a[int64_t(r) * k + q]) : 0u; };
  auto at_b = [&](int q, int j) { return q < k && j < n ? to_tf32(b[int64_t(q) * n + j]) : 0u; };
  float d[4] = {};
  for (int k0 = 0; k0 < k; k0 += K) {
    if constexpr (K == 8)
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(at_a(row0 + g, k0 + t)), "r"(at_a(row0 + g + 8, k0 + t)), "r"(at_a(row0 + g, k0 + t + 4)),
                     "r"(at_a(row0 + g + 8, k0 + t + 4)), "r"(at_b(k0 + t, column0 + g)), "r"(at_b(k0 + t + 4, column0 + g)));
    else
      asm volatile("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(at_a(row0 + g, k0 + t)), "r"(at_a(row0 + g + 8, k0 + t)), "r"(at_b(k0 + t, column0 + g)));
  }
  for (int r = 0; r < 4; r++) {
    const int row = row0 + g + (r >> 1) * 8, column = column0 + t * 2 + (r & 1);
    if (row < m && column < n) c[int64_t(row) * n + column] = d[r];
  }
}

}  // namespace

extern "C" {

cudaError_t gemm_bf16(const void* a, const void* b, float* c, int m, int n, int k, cudaStream_t s) {
  const dim3 grid((n + kN - 1) / kN, (m + kM - 1) / kM);
  gemm_bf16_kernel<<<grid, 128, 2 * (kM * kPadA + kK * kPadB) * 2, s>>>(static_cast<const __nv_bfloat16*>(a),
                                                                        static_cast<const __nv_bfloat16*>(b), c, m, n, k);
  return cudaGetLastError();
}

cudaError_t gemm_tf32(const float* a, const float* b, float* c, int m, int n, int k, int step, cudaStream_t s) {
  const dim3 grid((n + 7) / 8, (m + 15) / 16);
  if (step == 8)
    gemm_tf32_kernel<8><<<grid, 32, 0, s>>>(a, b, c, m, n, k);
  else
    gemm_tf32_kernel<4><<<grid, 32, 0, s>>>(a, b, c, m, n, k);
  return cudaGetLastError();
}

}  // extern "C"
