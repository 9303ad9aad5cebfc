// Elements of tensors: conversion to float32, in which all arithmetic but the products is done, and access to eight at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pykernels::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
  return __float2half_rn(x);
}

// Eight neighbours in 16-byte pieces.
template <class T>
union Eight {
  static constexpr int kPieces = sizeof(T) / 2;
  uint4 pieces[kPieces];
  T elements[8];

  __device__ Eight() {}
};

// v[i] = p[i] for i < n, else 0. wide: n is 8 and p is aligned to 16 bytes.
template <class T>
__device__ __forceinline__ void load_eight(float (&v)[8], const T* p, int n, bool wide) {
  Eight<T> eight;
  if (wide) {
#pragma unroll
    for (int i = 0; i < Eight<T>::kPieces; i++) eight.pieces[i] = reinterpret_cast<const uint4*>(p)[i];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_float(eight.elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = i < n ? to_float(p[i]) : 0.f;
  }
}

// As one instruction: left to itself, the compiler splits a 16-byte store into its elements.
__device__ __forceinline__ void store_piece(uint4* p, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// p[i] = v[i] for i < n.
template <class T>
__device__ __forceinline__ void store_eight(T* p, const float (&v)[8], int n, bool wide) {
  Eight<T> eight;
#pragma unroll
  for (int i = 0; i < 8; i++) eight.elements[i] = from_float<T>(v[i]);
  if (wide) {
#pragma unroll
    for (int i = 0; i < Eight<T>::kPieces; i++) store_piece(reinterpret_cast<uint4*>(p) + i, eight.pieces[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i < n) p[i] = eight.elements[i];
    }
  }
}

// Of a result that is rounded to T: float32 takes the forms that are right to the last bits.
template <class T>
__device__ __forceinline__ float sigmoid_to(float x) {
  if constexpr (sizeof(T) == 4) return 1.f / (1.f + expf(-x));
  return __fdividef(1.f, 1.f + __expf(-x));
}

}  // namespace pykernels::cuda
