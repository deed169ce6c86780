// A row's way to the basis of H and back, y = H (scale (H^T x)), for the threads of a block. The includer has device.cuh
// or tests/simt/simt.h before it; nothing here knows which.
//
// H = kron(H_m, S), S a product of butterflies, one for each bit of the index. All commute, so they are done in stages
// that suit the machine, and undone in the opposite order: no permutation is ever undone, and every stage reads and
// writes a row of shared memory in the same places. A stage is a loop over units: one thread, one tile of values that
// differ in some digits of the index, all other digits fixed. With the index j 2^k + c, and the bits of c from the left
//
//   j | a bits | b bits | middle bits | 3 bits
//
//   outer   the lowest 3 bits, which are the 16-byte vectors of global memory (two of them for float32), and the top a
//   inner   the b bits; skipped for b = 0
//   middle  H_m, or for m = 1 the middle bits; scale; H_m^T or the middle bits again
//
// So a row makes outer, inner, middle, inner, outer, and its threads meet between two stages, not those of other rows. The
// same thread has the same tiles on the way back, so they need not meet between the end of one row and the beginning of
// the next.
#pragma once

#include <type_traits>
#include <utility>

#include "../../common/cuda/elements.cuh"
#include "../orders.h"
#include "calls.h"

namespace linearpatch::cuda {

template <int value_>
struct Int {
  static constexpr int value = value_;
};

// --- shapes: how an index is cut into stages ---

// Known to the compiler. A power of two has one tile a thread in the outer stage, and no inner stage.
template <int m_, int k_>
struct Fixed {
  static constexpr bool known = true;
  static constexpr RowShape shape = fixed_shape(m_, k_);
  static constexpr int m = m_, k = k_, a = shape.a, b = shape.b, threads = shape.threads, stride = shape.stride;
  static constexpr int middle_bits = m == 1 ? k - 3 - a : 0, inner_at = 3 + middle_bits;
  static constexpr int block_threads = kFixedThreads;
  static constexpr int least_blocks(bool channels) { return resident_fixed(m, k, channels) / block_threads; }
  DEVICE explicit Fixed(const RowShape&) {}
  static DEVICE constexpr int order() { return m; }
  static DEVICE constexpr int size() { return m << k; }
};

// Known at run time, but for m; an m of 0 is one without a program, whose signs are a table.
template <int m_>
struct Staged {
  static constexpr bool known = false;
  static constexpr int m = m_, middle_bits = m == 1 ? kMiddleBits : 0, inner_at = 3 + middle_bits;
  static constexpr int block_threads = kMostThreads;
  static constexpr int least_blocks(bool) { return resident_staged(m) / block_threads; }
  int k, a, b, order_, threads, stride;
  DEVICE explicit Staged(const RowShape& shape)
      : k(shape.k), a(shape.a), b(shape.b), order_(shape.m), threads(shape.threads), stride(shape.stride) {}
  DEVICE int order() const { return m ? m : order_; }
  DEVICE int size() const { return order() << k; }
};

// The threads of a row wait for each other; where several rows share a warp, for those of all of them.
template <class Shape>
DEVICE void row_meets(const Shape& shape) {
  if (shape.threads <= 32)
    __syncwarp();
  else
    some_meet(1 + threadIdx.x / shape.threads, shape.threads);
}

// f(Int<bits>) for a number of bits that may be known only at run time.
template <int most, class Function>
DEVICE void with_bits(int bits, Function f) {
  if (bits == most) return f(Int<most>{});
  if constexpr (most > 0) with_bits<most - 1>(bits, f);
}
template <class Shape, class Function>
DEVICE void with_outer_bits(const Shape& shape, Function f) {
  if constexpr (Shape::known)
    f(Int<Shape::a>{});
  else
    with_bits<Shape::m == 1 ? kOuterBitsOfPowers : kMostOuterBits>(shape.a, f);
}
template <class Shape, class Function>
DEVICE void with_inner_bits(const Shape& shape, Function f) {
  if constexpr (Shape::known)
    f(Int<Shape::b>{});
  else
    with_bits<kMostInnerBits>(shape.b, f);
}

template <class Shape, class Function>
DEVICE void each_unit(const Shape& shape, int units, int thread, Function f) {
  if constexpr (Shape::known && Shape::m == 1) {
#pragma unroll
    for (int step = 0; step < units / Shape::threads; ++step) f(thread + step * Shape::threads);
  } else {
#pragma unroll 1
    for (int unit = thread; unit < units; unit += shape.threads) f(unit);
  }
}

// --- where an element of a row lies in shared memory ---

// Exclusive or, so that a swizzle of two indices with no bit in common is that of the one and of the other. Bit 5 into
// bit 2 lets eight neighbours write their vectors of four at once; two bits above those that a tile of the inner or
// middle stage holds, into bits 3 and 4, let 32 threads read 32 tiles at once.
template <class Shape>
DEVICE int swizzled(const Shape& shape, int i) {
  const int above = Shape::m == 1 ? Shape::inner_at : Shape::inner_at + shape.b;
  if (above < 4) return i;
  return i ^ (i >> 3 & 4) ^ ((i >> above & 3) << 3);
}

// The place of index `start + offset`, given that of start: they have no bit in common. The sum is an address with a
// constant in the instruction where the offset is known.
DEVICE int place(int start, int offset) { return (start ^ (offset & 31)) + (offset & ~31); }

// --- the tiles' arithmetic ---

template <int bits>
DEVICE void butterflies(float (&v)[1 << bits]) {
#pragma unroll
  for (int half = 1; half < 1 << bits; half *= 2)
#pragma unroll
    for (int i = 0; i < 1 << bits; ++i)
      if (!(i & half)) {
        const float low = v[i], high = v[i + half];
        v[i] = low + high;
        v[i + half] = low - high;
      }
}

// By H_m, or its transpose: a program whose steps are constants to the compiler, one by one.
template <StepKind kind>
DEVICE float combined(float a, float b) {
  if constexpr (kind == sum) return a + b;
  if constexpr (kind == difference) return a - b;
  if constexpr (kind == negated_sum) return -a - b;
  if constexpr (kind == plus_half) return a + 0.5f * b;
  if constexpr (kind == minus_half) return a - 0.5f * b;
}
template <class Program, int m, size_t... i>
DEVICE void take_steps(float* value, std::index_sequence<i...>) {
  ((value[m + i] = combined<Program::steps[i].kind>(value[std::integral_constant<int, Program::steps[i].a>::value],
                                                    value[std::integral_constant<int, Program::steps[i].b>::value])),
   ...);
}
template <class Program, size_t... i>
DEVICE void take_outputs(const float* value, float* v, std::index_sequence<i...>) {
  ((v[i] = value[std::integral_constant<int, Program::outputs[i]>::value]), ...);
}
template <int m, bool transposed>
DEVICE void multiply(float (&v)[m]) {
  using Program = Order<m, transposed>;
  constexpr int steps = sizeof(Program::steps) / sizeof(Step);
  float value[m + steps];
#pragma unroll
  for (int i = 0; i < m; ++i) value[i] = v[i];
  take_steps<Program, m>(value, std::make_index_sequence<steps>{});
  take_outputs<Program>(value, v, std::make_index_sequence<m>{});
}

// --- outer: between global memory and a row ---

// Vectors of eight that one thread has at a time: vector h begins at index at(h).
template <int count_>
struct Tile {
  static constexpr int count = count_;
  int start, step;
  DEVICE int at(int h) const { return start + h * step; }
};

// v *= the factors of a tile, of which element `first` belongs to the row's first.
template <int n>
DEVICE void multiply_tile(const Numbers& factors, int first, const Tile<n>& tile, float* v) {
  with_known_type(factors.dtype, [&](auto type) {
#pragma unroll
    for (int h = 0; h < n; ++h) {
      float by[8];
      type.load(factors.data, first + tile.at(h), by);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[8 * h + e] *= by[e];
    }
  });
}

// The vectors of a tile, of a row of `type` from its element `first` on.
template <int n>
struct Vectors {
  Raw raw[n];
};
template <class Type, int n>
DEVICE Vectors<n> fetch_tile(const Type& type, const char* row, const Tile<n>& tile, int first) {
  Vectors<n> vectors;
#pragma unroll
  for (int h = 0; h < n; ++h) vectors.raw[h] = type.fetch(row, first + tile.at(h));
  return vectors;
}

// To a row of `type`, from its element `first` on.
template <class Type, int n>
DEVICE void store_tile(const Type& type, char* row, const Tile<n>& tile, const float* v, int first) {
  type.with([&](auto known) {
#pragma unroll
    for (int h = 0; h < n; ++h) known.store(row, first + tile.at(h), v + 8 * h);
  });
}

template <int a, class Shape>
DEVICE Tile<1 << a> outer_tile(const Shape& shape, int unit) {
  const int bits = shape.k - 3 - a;
  return {((unit >> bits) << shape.k) + ((unit & ((1 << bits) - 1)) << 3), 1 << (shape.k - a)};
}

// fetch(type, tile) has what unpack(type, tile, fetched, v) makes a tile's values v of. A shape that the compiler knows
// fetches all of a thread's tiles before it unpacks one.
template <class Shape, class Type, class Fetch, class Unpack>
DEVICE void outer_there(const Shape& shape, float* row, int thread, const Type& type, Fetch fetch, Unpack unpack) {
  with_outer_bits(shape, [&](auto bits) {
    constexpr int a = decltype(bits)::value, n = 1 << a;
    const auto finish = [&](const Tile<n>& tile, auto& v) {
      butterflies<3 + a>(v);
      const int from = swizzled(shape, tile.start);
#pragma unroll
      for (int q = 0; q < 2 * n; ++q)
        write4(row + place(from, swizzled(shape, (q & 1) * 4 + (q / 2 << (shape.k - a)))),
               make_float4(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]));
    };
    if constexpr (Shape::known) {
      constexpr int units = Shape::size() >> (3 + a), turns = (units + Shape::threads - 1) / Shape::threads;
      const auto each_turn = [&](auto act) {
#pragma unroll
        for (int turn = 0; turn < turns; ++turn) {
          const int unit = thread + turn * Shape::threads;
          if ((turn + 1) * Shape::threads <= units || unit < units) act(turn, outer_tile<a>(shape, unit));
        }
      };
      decltype(fetch(type, Tile<n>{})) fetched[turns];
      each_turn([&](int turn, const Tile<n>& tile) { fetched[turn] = fetch(type, tile); });
      each_turn([&](int turn, const Tile<n>& tile) {
        float v[8 * std::decay_t<decltype(tile)>::count];
        unpack(type, tile, fetched[turn], v);
        finish(tile, v);
      });
    } else {
      each_unit(shape, shape.size() >> (3 + a), thread, [&](int unit) {
        const auto tile = outer_tile<a>(shape, unit);
        float v[8 * std::decay_t<decltype(tile)>::count];
        type.with([&](const auto& known) { unpack(known, tile, fetch(known, tile), v); });
        finish(tile, v);
      });
    }
  });
}

// give(tile, v): a tile's values.
template <class Shape, class Give>
DEVICE void outer_back(const Shape& shape, const float* row, int thread, Give give) {
  with_outer_bits(shape, [&](auto bits) {
    constexpr int a = decltype(bits)::value, n = 1 << a;
    each_unit(shape, shape.size() >> (3 + a), thread, [&](int unit) {
      const auto tile = outer_tile<a>(shape, unit);
      float v[8 * n];
      const int from = swizzled(shape, tile.start);
#pragma unroll
      for (int q = 0; q < 2 * n; ++q) {
        const float4 four = read4(row + place(from, swizzled(shape, (q & 1) * 4 + (q / 2 << (shape.k - a)))));
        v[4 * q] = four.x, v[4 * q + 1] = four.y, v[4 * q + 2] = four.z, v[4 * q + 3] = four.w;
      }
      butterflies<3 + a>(v);
      give(tile, v);
    });
  });
}

// --- inner ---

template <class Shape>
DEVICE void inner(const Shape& shape, float* row, int thread) {
  constexpr int at = Shape::inner_at;
  with_inner_bits(shape, [&](auto bits) {
    constexpr int b = decltype(bits)::value;
    if constexpr (b > 0)
      each_unit(shape, shape.size() >> b, thread, [&](int unit) {
        const int from = swizzled(shape, (unit & ((1 << at) - 1)) | unit >> at << (at + b));
        float v[1 << b];
#pragma unroll
        for (int i = 0; i < 1 << b; ++i) v[i] = read(row + place(from, swizzled(shape, i << at)));
        butterflies<b>(v);
#pragma unroll
        for (int i = 0; i < 1 << b; ++i) write(row + place(from, swizzled(shape, i << at)), v[i]);
      });
  });
}

// --- middle ---

// Its tiles: value i of a unit is the element at start(unit) + i << at.
template <class Shape>
struct Middle {
  static constexpr int count = Shape::m == 1 ? 1 << Shape::middle_bits : Shape::m;
  const Shape& shape;

  DEVICE int units() const { return Shape::m == 1 ? shape.size() / count : 1 << shape.k; }
  DEVICE int start(int unit) const { return Shape::m == 1 ? (unit & 7) | unit >> 3 << (3 + Shape::middle_bits) : unit; }
  DEVICE int offset(int i) const { return Shape::m == 1 ? i << 3 : i << shape.k; }

  // Of element i: the float in a table where the quads of four values that one thread uses together lie side by side with
  // those of its neighbours.
  DEVICE int quad_place(int i) const {
    const int value = Shape::m == 1 ? i >> 3 & (count - 1) : i >> shape.k;
    const int unit = Shape::m == 1 ? (i & 7) | i >> (3 + Shape::middle_bits) << 3 : i & ((1 << shape.k) - 1);
    return (value / 4 * units() + unit) * 4 + value % 4;
  }
  DEVICE int quad(int unit, int q) const { return (q * units() + unit) * 4; }

  DEVICE void load(const float* row, int unit, float (&v)[count]) const {
    const int from = swizzled(shape, start(unit));
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] = read(row + place(from, swizzled(shape, offset(i))));
  }
  DEVICE void store(float* row, int unit, const float (&v)[count]) const {
    const int from = swizzled(shape, start(unit));
#pragma unroll
    for (int i = 0; i < count; ++i) write(row + place(from, swizzled(shape, offset(i))), v[i]);
  }
  DEVICE static void there(float (&v)[count]) {
    if constexpr (Shape::m == 1)
      butterflies<Shape::middle_bits>(v);
    else
      multiply<count, true>(v);
  }
  DEVICE static void back(float (&v)[count]) {
    if constexpr (Shape::m == 1)
      butterflies<Shape::middle_bits>(v);
    else
      multiply<count, false>(v);
  }
};

// The scale times the norm of H squared, for the middle stage: in quads in shared memory, or where there is no room for
// it, in its own order in global memory.
template <class Shape>
struct Scales {
  const float* quads;  // or null
  Numbers plain;
  int first;  // the row's in `plain`
  float norm;

  template <class Visit>
  DEVICE void each(const Middle<Shape>& middle, int unit, Visit visit) const {
    constexpr int count = Middle<Shape>::count;
    if (Shape::known || quads) {
#pragma unroll
      for (int q = 0; q < count / 4; ++q) {
        const float4 four = read4(quads + middle.quad(unit, q));
        visit(4 * q, four.x), visit(4 * q + 1, four.y), visit(4 * q + 2, four.z), visit(4 * q + 3, four.w);
      }
    } else {
      const int start = first + middle.start(unit);
      // All of a unit's scales at once would be too many registers for m = 36 beside its u and a.
      with_known_type(plain.dtype, [&](auto type) {
#pragma unroll
        for (int i = 0; i < count; ++i) visit(i, type.one(plain.data, start + middle.offset(i)) * norm);
      });
    }
  }
};

// By all threads of the block; a barrier has to follow.
template <class Shape>
DEVICE void fill_quads(const Middle<Shape>& middle, const Scales<Shape>& scales, float* quads) {
  for (int i = 8 * threadIdx.x; i < middle.shape.size(); i += 8 * blockDim.x) {
    float v[8];
    Any(scales.plain.dtype).load(scales.plain.data, scales.first + i, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) write(quads + middle.quad_place(i + e), v[e] * scales.norm);
  }
}

// to = H_m from, or H_m^T, column by column, by signs [groups of 16 outputs][inputs]: bit o of a word is set where the
// input is subtracted from the group's output o. finish(i, v) is what is written at index i.
template <class Shape, class Finish>
DEVICE void multiply_by_table(const Shape& shape, const uint32_t* signs, const float* from, float* to, int thread,
                              Finish finish) {
  constexpr int outputs = 16;
  const int m = shape.order(), groups = (m + outputs - 1) / outputs;
  for (int unit = thread; unit < groups << shape.k; unit += shape.threads) {
    const int column = unit & ((1 << shape.k) - 1), group = unit >> shape.k;
    float total[outputs] = {};
    for (int i = 0; i < m; i += 4) {
      const uint4 four = load16(signs + group * m + i);
      const uint32_t words[] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t bits = __float_as_uint(read(from + swizzled(shape, ((i + e) << shape.k) + column)));
#pragma unroll
        for (int o = 0; o < outputs; ++o) total[o] += __uint_as_float(bits ^ (words[e] << (31 - o) & 0x80000000u));
      }
    }
#pragma unroll
    for (int o = 0; o < outputs; ++o) {
      const int index = ((group * outputs + o) << shape.k) + column;
      if (group * outputs + o < m) write(to + swizzled(shape, index), finish(index, total[o]));
    }
  }
}

}  // namespace linearpatch::cuda
