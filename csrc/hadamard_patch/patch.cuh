// The patch of rows, alone or between the residual's addition and a norm; ops/hadamard_patch/reference.py has the maths.
#pragma once

#include "stages.cuh"

namespace linearpatch::cuda {

// The sum over the threads of a row, for each of them; `partial` has a float for every warp. Every thread of the block.
template <class Shape>
DEVICE float sum_over_row(const Shape& shape, float v, float* partial) {
  for (int lanes = (shape.threads < 32 ? shape.threads : 32) / 2; lanes > 0; lanes /= 2)
    v += __shfl_xor_sync(0xffffffffu, v, lanes);
  if (shape.threads <= 32) return v;
  const int warp = threadIdx.x / 32, warps = shape.threads / 32;
  if (threadIdx.x % 32 == 0) write(partial + warp, v);
  __syncthreads();
  float total = 0;
  for (int i = 0; i < warps; ++i) total += read(partial + warp / warps * warps + i);
  return total;
}

template <class Shape>
DEVICE void to_basis_scale_and_back(const Shape& shape, float* row, float* other, int thread, const Scales<Shape>& scales,
                                    const PatchRows& call, int64_t element) {
  if constexpr (Shape::m == 0) {
    multiply_by_table(shape, call.signs_there, row, other, thread,
                      [&](int i, float v) { return v * read(call.scale + element + i) * scales.norm; });
    __syncthreads();
    multiply_by_table(shape, call.signs_back, other, row, thread, [](int, float v) { return v; });
  } else {
    const Middle<Shape> middle{shape};
    each_unit(shape, middle.units(), thread, [&](int unit) {
      float v[Middle<Shape>::count];
      middle.load(row, unit, v);
      middle.there(v);
      scales.each(middle, unit, [&](int i, float scale) { v[i] *= scale; });
      middle.back(v);
      middle.store(row, unit, v);
    });
  }
}

// Blocks of threads stay and go from row to row; blockIdx.y is a diagonal block of H.
template <class In, class Out, class Shape>
__global__ void __launch_bounds__(Shape::block_threads, Shape::least_blocks) patch_rows(const PatchRows call) {
  const Shape shape(call.shape);
  const In in(call.in);
  const Out out(call.out);
  const int n = shape.size(), thread = threadIdx.x % shape.threads, lane = threadIdx.x / shape.threads;
  const int64_t element = static_cast<int64_t>(blockIdx.y) * n;
  float* memory = shared_memory();
  const auto take = [&](int floats) {
    float* const here = memory;
    memory += floats;
    return here;
  };
  const float norm = 1.0f / static_cast<float>(n);
  Scales<Shape> scales{nullptr, call.scale + element, norm};
  float* const row = take(call.rows_together * shape.stride) + lane * shape.stride;
  float* const other = Shape::m == 0 ? take(call.rows_together * shape.stride) + lane * shape.stride : nullptr;
  if constexpr (Shape::m != 0)
    if (Shape::known || call.scale_in_shared) {
      float* const quads = take(n);
      fill_quads(Middle<Shape>{shape}, scales.plain, norm, quads);
      scales.quads = quads;
      __syncthreads();
    }

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * call.rows_together; first < call.rows;
       first += static_cast<int64_t>(gridDim.x) * call.rows_together) {
    const int64_t index = first + lane;
    const bool there = index < call.rows;  // threads without a row do as if theirs were the first, but write none
    const int64_t from = there ? index : first;
    const char* const x = call.x + from * call.x_stride;
    const char* const residual = call.residual + from * call.residual_stride;
    char* const y = call.y + index * call.y_stride;
    char* const normed = call.normed + index * call.normed_stride;
    const auto at = [&](int i) { return static_cast<int>(element) + i; };

    outer_there(shape, row, thread, call.pre ? call.pre + element : nullptr, [&](int i, float* v) {
      in.load(x, at(i), v);
      if (!Shape::known && call.fused) {
        float more[8];
        in.load(residual, at(i), more);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] += more[e];
      }
    });
    __syncthreads();
    inner(shape, row, thread);
    if (shape.b) __syncthreads();
    to_basis_scale_and_back(shape, row, other, thread, scales, call, element);
    __syncthreads();
    inner(shape, row, thread);
    if (shape.b) __syncthreads();

    float squares = 0;
    outer_back(shape, row, thread, call.post ? call.post + element : nullptr, [&](int i, float* v) {
      if (there) out.store(y, at(i), v);
      if (!Shape::known && call.fused) {
#pragma unroll
        for (int e = 0; e < 8; ++e) squares += v[e] * v[e];
        const int from = swizzled(shape, i);
        write4(row + from, make_float4(v[0], v[1], v[2], v[3]));
        write4(row + (from ^ 4), make_float4(v[4], v[5], v[6], v[7]));
      }
    });
    if constexpr (!Shape::known)
      if (call.fused) {
        const float mean = sum_over_row(shape, squares, memory) / static_cast<float>(n);
        const float inverse = 1.0f / sqrtf(mean + call.eps);
        with_outer_bits(shape, [&](auto bits) {
          constexpr int a = decltype(bits)::value;
          each_outer_unit<Shape, a>(shape, thread, [&](int start) {
            for (int h = 0; h < 1 << a; ++h) {
              const int i = start + (h << (shape.k - a)), from = swizzled(shape, i);
              const float4 low = read4(row + from), high = read4(row + (from ^ 4));
              float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
              for (int e = 0; e < 8; ++e) v[e] *= inverse;
              multiply8(v, call.norm_weight, i);
              if (there) out.store(normed, i, v);
            }
          });
        });
      }
  }
}

// --- which kernel ---

template <class T, class Run>
void with_power_kernel_of(int k, Run run) {
  if constexpr (sizeof(T) < sizeof(float))
    if (k == 10) return run(patch_rows<Known<T>, Known<T>, Fixed<1, 10>>);
  switch (k) {
    case 11: return run(patch_rows<Known<T>, Known<T>, Fixed<1, 11>>);
    case 12: return run(patch_rows<Known<T>, Known<T>, Fixed<1, 12>>);
    case 13: return run(patch_rows<Known<T>, Known<T>, Fixed<1, 13>>);
  }
}

template <class Run>
void with_power_kernel(const PatchRows& call, Run run) {
  switch (call.in) {
    case Dtype::float32: return with_power_kernel_of<float>(call.shape.k, run);
    case Dtype::float16: return with_power_kernel_of<Half>(call.shape.k, run);
    case Dtype::bfloat16: return with_power_kernel_of<BFloat16>(call.shape.k, run);
  }
}

template <class T, class Run>
void with_factor_kernel_of(int n, Run run) {
  switch (n) {
    case 576: return run(patch_rows<Known<T>, Known<T>, Fixed<36, 4>>);
    case 896: return run(patch_rows<Known<T>, Known<T>, Fixed<28, 5>>);
    case 1536: return run(patch_rows<Known<T>, Known<T>, Fixed<12, 7>>);
    case 2560: return run(patch_rows<Known<T>, Known<T>, Fixed<20, 7>>);
    case 3072: return run(patch_rows<Known<T>, Known<T>, Fixed<12, 8>>);
    case 3584: return run(patch_rows<Known<T>, Known<T>, Fixed<28, 7>>);
    case 5120: return run(patch_rows<Known<T>, Known<T>, Fixed<20, 8>>);
  }
}

template <class Run>
void with_factor_kernel(const PatchRows& call, Run run) {
  const int n = call.shape.m << call.shape.k;
  if (call.in == Dtype::float16) return with_factor_kernel_of<Half>(n, run);
  with_factor_kernel_of<BFloat16>(n, run);
}

template <class Run>
void with_staged_kernel(const PatchRows& call, Run run) {
  if (call.signs_there) return run(patch_rows<Any, Any, Staged<0>>);
  switch (call.shape.m) {
    case 1: return run(patch_rows<Any, Any, Staged<1>>);
    case 12: return run(patch_rows<Any, Any, Staged<12>>);
    case 20: return run(patch_rows<Any, Any, Staged<20>>);
    case 28: return run(patch_rows<Any, Any, Staged<28>>);
    case 36: return run(patch_rows<Any, Any, Staged<36>>);
  }
}

}  // namespace linearpatch::cuda
