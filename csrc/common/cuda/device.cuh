// What the kernels ask of the machine, beside threadIdx, __syncthreads and their kind.
// All memory is reached through these few functions: tests/simt has a second set of them, which watches every access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace linearpatch::cuda {

struct Half {};
struct BFloat16 {};
struct TensorFloat32 {};  // a float of whose mantissa the products read ten bits

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

// 16 bytes of a tensor, in global or in shared memory.
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// One number of 16 bits.
__device__ __forceinline__ uint32_t load2(const void* p) { return *static_cast<const uint16_t*>(p); }

// Two 16-bit numbers in a register.
__device__ __forceinline__ float2 unpack(Half, uint32_t bits) {
  return __half22float2(*reinterpret_cast<__half2*>(&bits));
}
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

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define LINEARPATCH_PTX(...) asm(__VA_ARGS__)
#else
#define LINEARPATCH_PTX(...) __trap()  // not before compute capability 8.0
#endif

// 16 bytes from global to shared memory. They are there for the thread that asked for them, after it has waited: for
// all of its groups but the last `later`.
__device__ __forceinline__ void copy16(void* to, const void* from) {
  [[maybe_unused]] const auto place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  LINEARPATCH_PTX("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
}
__device__ __forceinline__ void end_group_of_copies() { LINEARPATCH_PTX("cp.async.commit_group;" ::: "memory"); }
template <int later>
__device__ __forceinline__ void wait_for_copies() {
  LINEARPATCH_PTX("cp.async.wait_group %0;" ::"n"(later) : "memory");
}

// Rounded to a finite number, unless they are NaN.
__device__ __forceinline__ uint32_t pack_finite(BFloat16, float low, float high) {
  uint32_t bits = 0;
  LINEARPATCH_PTX("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// The warp's product A B + c of a 16 x 16 and a 16 x 8 matrix of 16-bit numbers, in float32. A thread has the
// elements that PTX gives it in mma.m16n8k16: with g = lane / 4 and q = 2 (lane % 4), a pair of columns q, q + 1 in
// each word of a, at rows g, g + 8, g, g + 8, the last two words eight columns on; a pair of rows q, q + 1 and q + 8,
// q + 9 of column g in b; and of c columns q, q + 1 of rows g and g + 8.
//
// Of TensorFloat32 numbers, A is 16 x 8 and B 8 x 8 (mma.m16n8k8): with q = lane % 4, the words of a are at rows g and g + 8
// of column q, then of q + 4, those of b at rows q and q + 4 of column g.
#define LINEARPATCH_MULTIPLY_ADD(shape, types)                            \
  LINEARPATCH_PTX("mma.sync.aligned." shape ".row.col.f32." types ".f32 "      \
                  "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"      \
                  : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)                 \
                  : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y))
__device__ __forceinline__ float4 multiply_add(Half, uint4 a, uint2 b, float4 c) {
  LINEARPATCH_MULTIPLY_ADD("m16n8k16", "f16.f16");
  return c;
}
__device__ __forceinline__ float4 multiply_add(BFloat16, uint4 a, uint2 b, float4 c) {
  LINEARPATCH_MULTIPLY_ADD("m16n8k16", "bf16.bf16");
  return c;
}
__device__ __forceinline__ float4 multiply_add(TensorFloat32, uint4 a, uint2 b, float4 c) {
  LINEARPATCH_MULTIPLY_ADD("m16n8k8", "tf32.tf32");
  return c;
}
#undef LINEARPATCH_MULTIPLY_ADD
#undef LINEARPATCH_PTX

}  // namespace linearpatch::cuda
