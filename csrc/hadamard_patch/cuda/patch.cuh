// The patch of rows, alone or between the residual's addition and a norm; ops/hadamard_patch/reference.py has the maths.
#pragma once

#include "stages.cuh"

namespace linearpatch::cuda {

// The sum over the threads of a row, for each of them; `partial` has a float for every warp.
template <class Shape>
DEVICE float sum_over_row(const Shape& shape, float v, float* partial) {
  for (int lanes = (shape.threads < 32 ? shape.threads : 32) / 2; lanes > 0; lanes /= 2)
    v += __shfl_xor_sync(0xffffffffu, v, lanes);
  if (shape.threads <= 32) return v;
  const int warp = threadIdx.x / 32, warps = shape.threads / 32;
  if (threadIdx.x % 32 == 0) write(partial + warp, v);
  row_meets(shape);
  float total = 0;
  for (int i = 0; i < warps; ++i) total += read(partial + warp / warps * warps + i);
  return total;
}

template <class Shape>
DEVICE void to_basis_scale_and_back(const Shape& shape, float* row, float* other, int thread, const Scales<Shape>& scales,
                                    const PatchRows& call) {
  if constexpr (Shape::m == 0) {
    multiply_by_table(shape, call.signs_there, row, other, thread,
                      [&](int i, float v) { return v * Any(scales.plain.dtype).one(scales.plain.data, scales.first + i) * scales.norm; });
    row_meets(shape);
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

// Blocks of threads stay and go from row to row; blockIdx.y is a diagonal block of H. Without `channels` there are no scales
// of channels; with them, either may be there.
template <class In, class Out, class Shape, bool channels>
__global__ void __launch_bounds__(Shape::block_threads, Shape::least_blocks(channels)) patch_rows(const PatchRows call) {
  const Shape shape(call.shape);
  const In in(call.in);
  const Out out(call.out);
  const int n = shape.size(), thread = threadIdx.x % shape.threads, lane = threadIdx.x / shape.threads;
  const int element = static_cast<int>(blockIdx.y) * n;
  float* memory = shared_memory();
  const auto take = [&](int floats) {
    float* const here = memory;
    memory += floats;
    return here;
  };
  const float norm = 1.0f / static_cast<float>(n);
  Scales<Shape> scales{nullptr, call.scale, element, norm};
  float* const row = take(call.rows_together * shape.stride) + lane * shape.stride;
  float* const other = Shape::m == 0 ? take(call.rows_together * shape.stride) + lane * shape.stride : nullptr;
  if constexpr (Shape::m != 0)
    if (Shape::known || call.scale_in_shared) {
      float* const quads = take(n);
      fill_quads(Middle<Shape>{shape}, scales, quads);
      scales.quads = quads;
      __syncthreads();
    }

  const int beside = shape.threads < 32 ? lane % (32 / shape.threads) : 0;  // how many rows a warp has before this one
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * call.rows_together + lane - beside; first < call.rows;
       first += static_cast<int64_t>(gridDim.x) * call.rows_together) {
    const int64_t index = first + beside;
    const bool there = index < call.rows;  // threads without a row do as if theirs were the warp's first, but write none
    const int64_t from = there ? index : first;
    const char* const x = call.x + from * call.x_stride;
    const char* const residual = call.residual + from * call.residual_stride;
    char* const y = call.y + index * call.y_stride;
    char* const normed = call.normed + index * call.normed_stride;

    const auto fetch = [&](const auto& type, const auto& tile) {
      return fetch_tile(type, x, tile, element);
    };
    outer_there(shape, row, thread, in, fetch, [&](const auto& type, const auto& tile, const auto& fetched, float* v) {
      type.each(fetched.raw, [&](int e, float value) { v[e] = value; });
      if (!Shape::known && call.fused)
        type.each(fetch_tile(type, residual, tile, 0).raw, [&](int e, float value) { v[e] += value; });
      if (channels && call.pre.data) multiply_tile(call.pre, element, tile, v);
    });
    row_meets(shape);
    inner(shape, row, thread);
    if (shape.b) row_meets(shape);
    to_basis_scale_and_back(shape, row, other, thread, scales, call);
    row_meets(shape);
    inner(shape, row, thread);
    if (shape.b) row_meets(shape);

    float squares = 0;
    outer_back(shape, row, thread, [&](const auto& tile, float* v) {
      if (channels && call.post.data) multiply_tile(call.post, element, tile, v);
      if (there) store_tile(out, y, tile, v, element);
      if constexpr (!Shape::known) {
        if (!call.fused) return;
#pragma unroll
        for (int h = 0; h < tile.count; ++h) {
          const float* const w = v + 8 * h;
#pragma unroll
          for (int e = 0; e < 8; ++e) squares += w[e] * w[e];
          const int from = swizzled(shape, tile.at(h));
          write4(row + from, make_float4(w[0], w[1], w[2], w[3]));
          write4(row + (from ^ 4), make_float4(w[4], w[5], w[6], w[7]));
        }
      }
    });
    if constexpr (!Shape::known)
      if (call.fused) {
        const float mean = sum_over_row(shape, squares, memory) / static_cast<float>(n);
        const float inverse = 1.0f / sqrtf(mean + call.eps);
        with_outer_bits(shape, [&](auto bits) {
          constexpr int a = decltype(bits)::value;
          each_unit(shape, n >> (3 + a), thread, [&](int unit) {
            const auto tile = outer_tile<a>(shape, unit);
            float v[8 << a];
#pragma unroll
            for (int h = 0; h < 1 << a; ++h) {
              const int from = swizzled(shape, tile.at(h));
              const float4 low = read4(row + from), high = read4(row + (from ^ 4));
              const float eight[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
              for (int e = 0; e < 8; ++e) v[8 * h + e] = eight[e] * inverse;
            }
            multiply_tile(call.norm_weight, 0, tile, v);
            if (there) store_tile(out, normed, tile, v, 0);
          });
        });
      }
  }
}

// --- which kernel ---

// The kernel for one width, with channel scales or without: to ask for them for every tile costs registers.
template <class T, class Shape, class Run>
void with_fixed_kernel(const PatchRows& call, Run run) {
  if (call.pre.data || call.post.data) return run(patch_rows<Known<T>, Known<T>, Shape, true>);
  run(patch_rows<Known<T>, Known<T>, Shape, false>);
}

template <class T, class Run>
void with_power_kernel_of(const PatchRows& call, Run run) {
  if constexpr (sizeof(T) < sizeof(float))
    if (call.shape.k == 10) return with_fixed_kernel<T, Fixed<1, 10>>(call, run);
  switch (call.shape.k) {
    case 11: return with_fixed_kernel<T, Fixed<1, 11>>(call, run);
    case 12: return with_fixed_kernel<T, Fixed<1, 12>>(call, run);
    case 13: return run(patch_rows<Known<T>, Known<T>, Fixed<1, 13>, false>);  // with channel scales sm_120 spills
  }
}

template <class Run>
void with_power_kernel(const PatchRows& call, Run run) {
  switch (call.in) {
    case Dtype::float32: return with_power_kernel_of<float>(call, run);
    case Dtype::float16: return with_power_kernel_of<Half>(call, run);
    case Dtype::bfloat16: return with_power_kernel_of<BFloat16>(call, run);
  }
}

template <class T, class Run>
void with_factor_kernel_of(const PatchRows& call, Run run) {
  switch (call.shape.m << call.shape.k) {
    case 576: return with_fixed_kernel<T, Fixed<36, 4>>(call, run);
    case 896: return with_fixed_kernel<T, Fixed<28, 5>>(call, run);
    case 1536: return with_fixed_kernel<T, Fixed<12, 7>>(call, run);
    case 2560: return with_fixed_kernel<T, Fixed<20, 7>>(call, run);
    case 3072: return with_fixed_kernel<T, Fixed<12, 8>>(call, run);
    case 3584: return with_fixed_kernel<T, Fixed<28, 7>>(call, run);
    case 5120: return with_fixed_kernel<T, Fixed<20, 8>>(call, run);
  }
}

template <class Run>
void with_factor_kernel(const PatchRows& call, Run run) {
  if (call.in == Dtype::float16) return with_factor_kernel_of<Half>(call, run);
  with_factor_kernel_of<BFloat16>(call, run);
}

template <class Run>
void with_staged_kernel(const PatchRows& call, Run run) {
  if (call.signs_there) return run(patch_rows<Any, Any, Staged<0>, true>);
  switch (call.shape.m) {
    case 1: return run(patch_rows<Any, Any, Staged<1>, true>);
    case 12: return run(patch_rows<Any, Any, Staged<12>, true>);
    case 20: return run(patch_rows<Any, Any, Staged<20>, true>);
    case 28: return run(patch_rows<Any, Any, Staged<28>, true>);
    case 36: return run(patch_rows<Any, Any, Staged<36>, true>);
  }
}

}  // namespace linearpatch::cuda
