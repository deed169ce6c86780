// What the kernels of patch.cuh and gradients.cuh ask of the machine, beside threadIdx, __syncthreads and their kind. All
// memory is reached through these few functions: tests/simt has a second set of them, which watches every access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace linearpatch::cuda {

struct Half {};
struct BFloat16 {};

__device__ __forceinline__ float* shared_memory() {
  extern __shared__ float4 memory[];
  return reinterpret_cast<float*>(memory);
}

// A barrier for some of a block's threads, whole warps that use the same number from 0 to 15; __syncthreads has 0.
__device__ __forceinline__ void some_meet(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Floats of a row in shared memory, or of a sum over rows in either memory.
__device__ __forceinline__ float read(const float* p) { return *p; }
__device__ __forceinline__ void write(float* p, float v) { *p = v; }
__device__ __forceinline__ float4 read4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ void write4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }

// 16 bytes of a tensor in global memory.
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// One number of 16 bits.
__device__ __forceinline__ uint32_t load2(const void* p) { return *static_cast<const uint16_t*>(p); }

// Two 16-bit numbers in a register.
__device__ __forceinline__ float2 unpack(Half, uint32_t bits) { return __half22float2(*reinterpret_cast<__half2*>(&bits)); }
__device__ __forceinline__ float2 unpack(BFloat16, uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
__device__ __forceinline__ uint32_t pack(Half, float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t pack(BFloat16, float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

}  // namespace linearpatch::cuda
