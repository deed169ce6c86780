// The gradients of the patch of rows; ops/hadamard_patch/reference.py has the maths and the names u, a, b and w.
//
// Sums over rows need no atomics: every element of a sum belongs to one thread of a row of threads, which adds its rows up
// in their order, and a second kernel adds those parts up in theirs.
#pragma once

#include "stages.cuh"

namespace linearpatch::cuda {

// Sums over the rows that these threads have: an element is at `place` in shared memory, laid out as a row is, or at its
// index in global memory.
template <class Shape>
struct Sums {
  const Shape& shape;
  float* data;  // or null: not wanted
  bool in_shared;

  DEVICE explicit operator bool() const { return data; }
  DEVICE int at(int index) const { return in_shared ? swizzled(shape, index) : index; }
  DEVICE void add(int index, float v) const { write(data + at(index), read(data + at(index)) + v); }
  DEVICE void add8(int index, const float* a, const float* b) const {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float* const p = data + at(index + i);
      const float4 old = read4(p);
      write4(p, make_float4(old.x + a[i] * b[i], old.y + a[i + 1] * b[i + 1], old.z + a[i + 2] * b[i + 2],
                            old.w + a[i + 3] * b[i + 3]));
    }
  }
  DEVICE void clear(int thread) const {
    for (int i = 4 * thread; data && i < shape.size(); i += 4 * shape.threads) write4(data + i, make_float4(0, 0, 0, 0));
  }
  DEVICE void copy_to(float* out, int thread) const {
    if (!data || !in_shared) return;
    for (int i = 4 * thread; i < shape.size(); i += 4 * shape.threads) {
      const float4 v = read4(data + at(i));
      store16(out + i, make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)));
    }
  }
};

// u and a come in as what their outer and inner stages made of x and dy, and go out scaled and on their way back.
template <class Shape>
DEVICE void differentiate(const Shape& shape, float* u, float* a, float* spare, int thread, const Scales<Shape>& scales,
                          const Sums<Shape>& sums, bool u_there, bool a_back, bool u_back, const GradientRows& call) {
  if constexpr (Shape::m == 0) {
    const auto as_it_is = [](int, float v) { return v; };
    if (u_there) multiply_by_table(shape, call.signs_there, u, spare, thread, as_it_is);
    row_meets(shape);
    multiply_by_table(shape, call.signs_there, a, u, thread, as_it_is);
    row_meets(shape);
    for (int i = thread; i < shape.size(); i += shape.threads) {
      const int p = swizzled(shape, i);
      const float by = Any(scales.plain.dtype).one(scales.plain.data, scales.first + i) * scales.norm, of_a = read(u + p);
      if (u_there) {
        const float of_u = read(spare + p);
        if (sums) sums.add(i, of_a * of_u);
        write(spare + p, of_u * by);
      }
      write(u + p, of_a * by);
    }
    row_meets(shape);
    if (a_back) multiply_by_table(shape, call.signs_back, u, a, thread, as_it_is);
    row_meets(shape);
    if (u_back) multiply_by_table(shape, call.signs_back, spare, u, thread, as_it_is);
  } else {
    const Middle<Shape> middle{shape};
    each_unit(shape, middle.units(), thread, [&](int unit) {
      constexpr int count = Middle<Shape>::count;
      float of_u[count], of_a[count];
      middle.load(a, unit, of_a);
      middle.there(of_a);
      if (u_there) {
        middle.load(u, unit, of_u);
        middle.there(of_u);
        if (sums)
#pragma unroll
          for (int i = 0; i < count; ++i) sums.add(middle.start(unit) + middle.offset(i), of_a[i] * of_u[i]);
      }
      if (u_back) {
        scales.each(middle, unit, [&](int i, float by) { of_u[i] *= by; });
        middle.back(of_u);
        middle.store(u, unit, of_u);
      }
      if (a_back) {
        scales.each(middle, unit, [&](int i, float by) { of_a[i] *= by; });
        middle.back(of_a);
        middle.store(a, unit, of_a);
      }
    });
  }
}

template <class Shape>
__global__ void __launch_bounds__(resident_gradients(Shape::m), 1) patch_gradients(const GradientRows call) {
  const Shape shape(call.shape);
  const Any in(call.in), out(call.out);
  const int n = shape.size(), thread = threadIdx.x % shape.threads, lane = threadIdx.x / shape.threads;
  const int element = static_cast<int>(blockIdx.y) * n;
  const int64_t part = (static_cast<int64_t>(blockIdx.x) * call.rows_together + lane) * (static_cast<int64_t>(gridDim.y) * n);
  float* memory = shared_memory();
  const auto take = [&] {
    float* const here = memory + lane * shape.stride;
    memory += call.rows_together * shape.stride;
    return here;
  };
  float *const u = take(), *const a = take(), *const spare = Shape::m == 0 ? take() : nullptr;
  const auto sums_in = [&](float* parts) {
    if (!parts) return Sums<Shape>{shape, nullptr, false};
    return Sums<Shape>{shape, call.sums_in_shared ? take() : parts + part + element, call.sums_in_shared};
  };
  const Sums<Shape> scale_sums = sums_in(call.scale_sums), pre_sums = sums_in(call.pre_sums), post_sums = sums_in(call.post_sums);
  const Scales<Shape> scales{nullptr, call.scale, element, 1.0f / static_cast<float>(n)};
  const bool a_back = call.dx || call.pre_sums, u_back = call.post_sums, u_there = call.scale_sums || call.post_sums;
  scale_sums.clear(thread);
  pre_sums.clear(thread);
  post_sums.clear(thread);
  row_meets(shape);

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * call.rows_together; first < call.rows;
       first += static_cast<int64_t>(gridDim.x) * call.rows_together) {
    const int64_t index = first + lane;
    const bool there = index < call.rows;
    const char* const x = call.x + index * call.x_stride;
    const char* const grad = call.grad + index * call.grad_stride;
    char* const dx = call.dx + index * call.dx_stride;
    const auto fetch = [&](const auto& type, const char* row, const auto& tile) {
      return there ? fetch_tile(type, row, tile, element) : Vectors<std::decay_t<decltype(tile)>::count>{};
    };
    // Both rows by the same instructions: they are many.
    const auto stages = [&](bool of_u, bool of_a, auto stage) {
#pragma unroll 1
      for (int which = of_u ? 0 : 1; which < (of_a ? 2 : 1); ++which) stage(which == 0);
    };
    const auto inner_stages = [&](bool of_u, bool of_a) {
      if (shape.b) {
        stages(of_u, of_a, [&](bool first) { inner(shape, first ? u : a, thread); });
        row_meets(shape);
      }
    };

    stages(u_there, true, [&](bool first) {
      const char* const of = first ? x : grad;
      const Numbers factors = first ? call.pre : call.post;
      outer_there(
          shape, first ? u : a, thread, in, [&](const auto& type, const auto& tile) { return fetch(type, of, tile); },
          [&](const auto& type, const auto& tile, const auto& vectors, float* v) {
            type.each(vectors.raw, [&](int e, float value) { v[e] = value; });
            if (there && factors.data) multiply_tile(factors, element, tile, v);
          });
    });
    row_meets(shape);
    inner_stages(u_there, true);
    differentiate(shape, u, a, spare, thread, scales, scale_sums, u_there, a_back, u_back, call);
    row_meets(shape);
    inner_stages(u_back, a_back);
    stages(u_back, a_back, [&](bool first) {
      const char* const with = first ? grad : x;
      const Sums<Shape> sums{shape, first ? post_sums.data : pre_sums.data, call.sums_in_shared};
      outer_back(shape, first ? u : a, thread, [&](const auto& tile, float* v) {
        if (!there) return;
        if (sums) {
          // Eight at a time: a tile's beside v is more than a thread has registers for at m = 36 on sm_80.
#pragma unroll
          for (int h = 0; h < tile.count; ++h) {
            float other[8];
            in.load(with, element + tile.at(h), other);
            sums.add8(tile.at(h), v + 8 * h, other);
          }
        }
        if (first || !call.dx) return;
        if (call.pre.data) multiply_tile(call.pre, element, tile, v);
        store_tile(out, dx, tile, v, element);
      });
    });
  }
  row_meets(shape);
  scale_sums.copy_to(call.scale_sums + part + element, thread);
  pre_sums.copy_to(call.pre_sums + part + element, thread);
  post_sums.copy_to(call.post_sums + part + element, thread);
}

// total = factor * the sum of the parts, each [d], in their order within each of kPartLanes threads, whose sums are added
// last. A thread has four columns, which eight neighbours read as one line of the cache; a block of few columns, so that
// enough blocks ask the memory at a time.
__global__ void __launch_bounds__(kPartThreads) add_parts(const PartSums call) {
  constexpr int neighbours = kPartColumns / 4;
  float* const sums = shared_memory();
  const int lane = threadIdx.x / neighbours, column = (blockIdx.x * neighbours + threadIdx.x % neighbours) * 4;
  double total[4] = {};
  if (column < call.d) {
#pragma unroll 4
    for (int64_t i = lane; i < call.parts; i += kPartLanes) {
      const uint4 four = load16(call.sums + i * call.d + column);
      total[0] += __uint_as_float(four.x), total[1] += __uint_as_float(four.y);
      total[2] += __uint_as_float(four.z), total[3] += __uint_as_float(four.w);
    }
  }
  write4(sums + 4 * threadIdx.x, make_float4(total[0], total[1], total[2], total[3]));
  __syncthreads();
  if (lane || column >= call.d) return;
  float4 all = make_float4(0, 0, 0, 0);
  for (int i = 0; i < kPartLanes; ++i) {
    const float4 one = read4(sums + 4 * (threadIdx.x + neighbours * i));
    all.x += one.x, all.y += one.y, all.z += one.z, all.w += one.w;
  }
  const float by = call.factor;
  store16(call.total + column, make_uint4(__float_as_uint(all.x * by), __float_as_uint(all.y * by),
                                          __float_as_uint(all.z * by), __float_as_uint(all.w * by)));
}

template <class Run>
void with_gradient_kernel(const GradientRows& call, Run run) {
  if (call.signs_there) return run(patch_gradients<Staged<0>>);
  switch (call.shape.m) {
    case 1: return run(patch_gradients<Staged<1>>);
    case 12: return run(patch_gradients<Staged<12>>);
    case 20: return run(patch_gradients<Staged<20>>);
    case 28: return run(patch_gradients<Staged<28>>);
    case 36: return run(patch_gradients<Staged<36>>);
  }
}

}  // namespace linearpatch::cuda
