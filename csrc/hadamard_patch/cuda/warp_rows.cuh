// The patch of 16-bit rows by warps that have a row each: matrix units instead of exchanges between threads.
//
// A row is made of tiles of 256 elements. Thread l of a warp loads elements 8 l to 8 l + 7 of each: as they lie in their
// four words, they are a 16 x 16 factor X of multiply_add. H_16 X H_16 is the transform of the tile, without its norm, for
// H_256 = kron(H_16, H_16) but for the order of its rows and columns: two products, for the sums of the first lie where the
// second wants a factor. H_m or butterflies across a thread's tiles follow. The same once more ends where the elements were
// loaded.
//
// Where values lie between, at index 4 t + 2 r + c of thread 4 g + q: the bits of an element's index are, from the lowest,
// g0 r t g1 g2 c q0 q1.
//
// The sums are float32, but a product reads fewer bits of its factors. x is such a factor itself; what comes later is made
// one (Later): where a row is bfloat16, a TensorFloat32, whose ten bits are three more than the result keeps; where it is
// float16, the sum of two bfloat16, which have 2^-17 of relative error, for ten bits are what the result keeps.
#pragma once

#include "stages.cuh"

namespace linearpatch::cuda {

// H_16 with its columns in pairs of 16-bit numbers, as either factor. Its quarters are the same but for the sign of one; the
// compiler is not to know: it would copy one register to the others for every product.
template <class T>
struct Signs {
  uint4 quarters;
  DEVICE explicit Signs(int lane) {
    const auto from = [&](int lanes) { return __float_as_uint(__shfl_xor_sync(0xffffffffu, of(lane ^ lanes), lanes)); };
    quarters = make_uint4(from(1), from(2), from(4), from(8) ^ 0x80008000u);
  }
  DEVICE static float of(int lane) {
    const uint32_t g = lane / 4, common = g & 2 * (lane % 4), low = (common >> 1 ^ common >> 2) & 1;
    return __uint_as_float(pack(T{}, low ? -1.0f : 1.0f, (low ^ g) & 1 ? -1.0f : 1.0f));
  }

  // sums += H W, for a W in two halves, and += W H.
  DEVICE void add_left_product(float4 (&sums)[2], uint2 first, uint2 second) const {
    sums[0] = multiply_add(T{}, quarters, first, sums[0]);
    sums[1] = multiply_add(T{}, quarters, second, sums[1]);
  }
  DEVICE void add_right_product(float4 (&sums)[2], uint4 w) const {
    sums[0] = multiply_add(T{}, w, make_uint2(quarters.x, quarters.y), sums[0]);
    sums[1] = multiply_add(T{}, w, make_uint2(quarters.z, quarters.w), sums[1]);
  }
};

// H_16, as either factor, of TensorFloat32 numbers: in step s, columns q and q + 4 of a factor's eight are 4 t + 2 r + c of the
// index above, with c = s. The halves of a step are the same but for the sign of one, which the compiler is not to know.
template <>
struct Signs<TensorFloat32> {
  uint4 steps[2];
  DEVICE explicit Signs(int lane) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const auto from = [&](int lanes) { return __float_as_uint(__shfl_xor_sync(0xffffffffu, of(lane ^ lanes, s), lanes)); };
      steps[s] = make_uint4(from(1), from(2), from(4), from(8) ^ 0x80000000u);
    }
  }
  DEVICE static float of(int lane, int s) {
    const uint32_t common = lane / 4 & (2 * (lane % 4) + s);
    return (common ^ common >> 1 ^ common >> 2) & 1 ? -1.0f : 1.0f;
  }
};

// A tile's values, at indices as above, as the sum of two bfloat16. The first is finite: from one that is not, nothing but
// NaN would be left.
struct Terms {
  uint32_t of[2][4];
  DEVICE explicit Terms(const float4 (&values)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = values[i / 2];
      const float low = i % 2 ? four.z : four.x, high = i % 2 ? four.w : four.y;
      of[0][i] = pack_finite(BFloat16{}, low, high);
      const float2 rounded = unpack(BFloat16{}, of[0][i]);
      of[1][i] = pack(BFloat16{}, low - rounded.x, high - rounded.y);
    }
  }
};

// A tile's values as TensorFloat32, each step's of either side. A product cuts off the bits that it does not read: on average
// 0.72 2^-11 of a value. That added before makes up for it, and leaves as it is what needs no more bits; it is one
// instruction where to round takes three.
struct Cut {
  uint4 of[2];
  DEVICE explicit Cut(const float4 (&values)[2]) {
    const auto more = [](float v) { return __float_as_uint(fmaf(v, 0.72f / 2048, v)); };
    of[0] = make_uint4(more(values[0].x), more(values[0].z), more(values[1].x), more(values[1].z));
    of[1] = make_uint4(more(values[0].y), more(values[0].w), more(values[1].y), more(values[1].w));
  }
};

DEVICE void multiply_left(const Signs<BFloat16>& signs, float4 (&tile)[2]) {
  const Terms terms(tile);
  tile[0] = tile[1] = make_float4(0, 0, 0, 0);
#pragma unroll
  for (const auto& w : terms.of) signs.add_left_product(tile, make_uint2(w[0], w[2]), make_uint2(w[1], w[3]));
}
DEVICE void multiply_right(const Signs<BFloat16>& signs, float4 (&tile)[2]) {
  const Terms terms(tile);
  tile[0] = tile[1] = make_float4(0, 0, 0, 0);
#pragma unroll
  for (const auto& w : terms.of) signs.add_right_product(tile, make_uint4(w[0], w[1], w[2], w[3]));
}

DEVICE void multiply_left(const Signs<TensorFloat32>& signs, float4 (&tile)[2]) {
  const Cut w(tile);
  tile[0] = tile[1] = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    tile[0] = multiply_add(TensorFloat32{}, signs.steps[s], make_uint2(w.of[s].x, w.of[s].z), tile[0]);
    tile[1] = multiply_add(TensorFloat32{}, signs.steps[s], make_uint2(w.of[s].y, w.of[s].w), tile[1]);
  }
}
DEVICE void multiply_right(const Signs<TensorFloat32>& signs, float4 (&tile)[2]) {
  const Cut w(tile);
  tile[0] = tile[1] = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const uint4 h = signs.steps[s];
    tile[0] = multiply_add(TensorFloat32{}, w.of[s], make_uint2(h.x, h.y), tile[0]);
    tile[1] = multiply_add(TensorFloat32{}, w.of[s], make_uint2(h.z, h.w), tile[1]);
  }
}

// The type of factors that are made of float32 values, for rows of T.
template <class T>
using Later = std::conditional_t<std::is_same_v<T, BFloat16>, TensorFloat32, BFloat16>;

// A row's values in a thread: of its eight in each tile, those with one index side by side.
template <int tiles>
struct WarpRow {
  float v[8][tiles];
  DEVICE void set(int tile, const float4 (&values)[2]) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      v[4 * t][tile] = values[t].x, v[4 * t + 1][tile] = values[t].y;
      v[4 * t + 2][tile] = values[t].z, v[4 * t + 3][tile] = values[t].w;
    }
  }
  DEVICE void get(int tile, float4 (&values)[2]) const {
#pragma unroll
    for (int t = 0; t < 2; ++t)
      values[t] = make_float4(v[4 * t][tile], v[4 * t + 1][tile], v[4 * t + 2][tile], v[4 * t + 3][tile]);
  }
};

constexpr int bits_of(int tiles) { return tiles == 1 ? 0 : 1 + bits_of(tiles / 2); }

// The float in shared memory where the scale of element i is: four tiles' of one index and thread side by side, and those of
// its neighbours next to them.
template <int tiles>
DEVICE int scale_place(int i) {
  const auto bit = [&](int from, int to) { return (i >> from & 1) << to; };
  const int index = bit(5, 0) + bit(1, 1) + bit(2, 2), tile = i / kWarpTile;
  const int thread = bit(6, 0) + bit(7, 1) + bit(0, 2) + bit(3, 3) + bit(4, 4);
  return ((index * (tiles / 4) + tile / 4) * 32 + thread) * 4 + tile % 4;
}

// By all threads of the block, the scale times the norm of H squared, from its number `first` on; a barrier has to follow.
// Of two warps' row, the one's after the other's.
template <int tiles, int warps>
DEVICE void fill_scales(const Numbers& scale, int first, float* places) {
  constexpr int n = warps * tiles * kWarpTile;
  for (int i = 8 * threadIdx.x; i < n; i += 8 * blockDim.x) {
    const int tile = i / kWarpTile, of_warp = tile / warps * kWarpTile + i % kWarpTile;
    float v[8];
    Any(scale.dtype).load(scale.data, first + i, v);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      write(places + n / warps * (tile % warps) + scale_place<tiles>(of_warp + e), v[e] * (1.0f / n));
  }
}

// H_m, or butterflies, across a thread's tiles, to the basis of H or back.
template <bool there, int tiles>
DEVICE void multiply_across(float (&v)[tiles]) {
  if constexpr ((tiles & (tiles - 1)) == 0)
    butterflies<bits_of(tiles)>(v);
  else
    multiply<tiles, there>(v);
}

// Across the tiles to the basis of H, where the scale is, and back.
template <int tiles>
DEVICE void scale_across(WarpRow<tiles>& row, const float* scales, int lane) {
#pragma unroll
  for (int index = 0; index < 8; ++index) {
    float(&v)[tiles] = row.v[index];
    multiply_across<true>(v);
#pragma unroll
    for (int tile = 0; tile < tiles; tile += 4) {
      const float4 by = read4(scales + (index * (tiles / 4) + tile / 4) * 128 + 4 * lane);
      v[tile] *= by.x, v[tile + 1] *= by.y, v[tile + 2] *= by.z, v[tile + 3] *= by.w;
    }
    multiply_across<false>(v);
  }
}

// The same of a row that two warps share, tile by tile in turn. The last butterfly is across the warps: with s and t for
// their scales, a and b become (a + b) s + (a - b) t and (b + a) s + (b - a) t. Each warp needs the other's values once;
// they go through the place where the row's x was, which has room for half of them.
template <int tiles>
DEVICE void scale_across_two(WarpRow<tiles>& row, const float* scales, float* own, const float* others, int lane, int pair) {
  constexpr int quads = tiles / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half)
      some_meet(1 + pair, 64);
    else
      __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float(&v)[tiles] = row.v[4 * half + i];
      multiply_across<true>(v);
#pragma unroll
      for (int q = 0; q < quads; ++q)
        write4(own + (i * quads + q) * 128 + 4 * lane, make_float4(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]));
    }
    some_meet(1 + pair, 64);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float(&v)[tiles] = row.v[4 * half + i];
#pragma unroll
      for (int q = 0; q < quads; ++q) {
        const float* const at = scales + ((4 * half + i) * quads + q) * 128 + 4 * lane;
        const float4 first = read4(at), second = read4(at + tiles * kWarpTile);
        const float4 other = read4(others + (i * quads + q) * 128 + 4 * lane);
        const auto both = [](float& v, float u, float s, float t) { v = (v + u) * s + (v - u) * t; };
        both(v[4 * q], other.x, first.x, second.x), both(v[4 * q + 1], other.y, first.y, second.y);
        both(v[4 * q + 2], other.z, first.z, second.z), both(v[4 * q + 3], other.w, first.w, second.w);
      }
      multiply_across<false>(v);
    }
  }
  some_meet(1 + pair, 64);
}

// The float in shared memory where the norm's weight for element i is: a thread's two fours of a tile, each next to those
// of its neighbours.
DEVICE int weight_place(int i) { return (i & ~255) + (i & 4) * 32 + (i >> 1 & 124) + (i & 3); }

DEVICE void fill_weights(const Numbers& weight, int n, float* places) {
  for (int i = 8 * threadIdx.x; i < n; i += 8 * blockDim.x) {
    float v[8];
    Any(weight.dtype).load(weight.data, i, v);
    write4(places + weight_place(i), make_float4(v[0], v[1], v[2], v[3]));
    write4(places + weight_place(i + 4), make_float4(v[4], v[5], v[6], v[7]));
  }
}

// Eight elements side by side, as a vector in memory has them, from indices as above.
template <class T>
DEVICE uint4 packed(const float4 (&values)[2]) {
  return make_uint4(pack(T{}, values[0].x, values[0].y), pack(T{}, values[1].x, values[1].y),
                    pack(T{}, values[0].z, values[0].w), pack(T{}, values[1].z, values[1].w));
}

// The sum of two such vectors, in float32.
template <class T>
DEVICE void add(const uint4& a, const uint4& b, float4 (&sums)[2]) {
  const auto set = [](uint32_t one, uint32_t other, float& low, float& high) {
    const float2 v = unpack(T{}, one), w = unpack(T{}, other);
    low = v.x + w.x, high = v.y + w.y;
  };
  set(a.x, b.x, sums[0].x, sums[0].y), set(a.y, b.y, sums[1].x, sums[1].y);
  set(a.z, b.z, sums[0].z, sums[0].w), set(a.w, b.w, sums[1].z, sums[1].w);
}

// The signs are those for a row's own type, and for what is made of it, which may be beyond the range of float16. Behind
// x the residual, where fused.
template <class T, int tiles, bool fused>
DEVICE void transform_there(const char* x, const Signs<T>& first, const Signs<Later<T>>& later, WarpRow<tiles>& row) {
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile) {
    const uint4 words = load16(x + 2 * kWarpTile * tile);
    float4 values[2] = {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)};
    if constexpr (fused) {
      add<T>(words, load16(x + 2 * kWarpTile * (tiles + tile)), values);
      multiply_left(later, values);
    } else {
      first.add_left_product(values, make_uint2(words.x, words.y), make_uint2(words.z, words.w));
    }
    multiply_right(later, values);
    row.set(tile, values);
  }
}

// give(tile, values): the elements of y where those of x had been loaded, at indices as above.
template <int tiles, class Factor, class Give>
DEVICE void transform_back(const WarpRow<tiles>& row, const Signs<Factor>& signs, Give give) {
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile) {
    float4 values[2];
    row.get(tile, values);
    multiply_left(signs, values);
    multiply_right(signs, values);
    give(tile, values);
  }
}

DEVICE float sum_of_squares(const float4& v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

DEVICE float sum_over_warp(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// With the other warp of the row; `sums` has a float for every warp of the block. It can be used again after a barrier of the
// two, as there are on the way of every row.
DEVICE float sum_over_two(float v, float* sums) {
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) write(sums + warp, v);
  some_meet(1 + warp / 2, 64);
  return read(sums + (warp & ~1)) + read(sums + (warp | 1));
}

// The row over its root mean square, times the norm's weight. `weights` and `normed` are of the thread's first tile.
template <class T, int warps, int tiles>
DEVICE void store_normed(const WarpRow<tiles>& row, float squares, float eps, const float* weights, char* normed) {
  const float inverse = 1.0f / sqrtf(squares / (warps * tiles * kWarpTile) + eps);
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile) {
    float4 v[2];
    row.get(tile, v);
    const float* const at = weights + kWarpTile * warps * tile;
    const float4 low = read4(at), high = read4(at + 128);
    v[0].x *= inverse * low.x, v[0].y *= inverse * low.y, v[1].x *= inverse * low.z, v[1].y *= inverse * low.w;
    v[0].z *= inverse * high.x, v[0].w *= inverse * high.y, v[1].z *= inverse * high.z, v[1].w *= inverse * high.w;
    store16(normed + 2 * kWarpTile * warps * tile, packed<T>(v));
  }
}

// Warps stay and go from row to row, one to a row or two, which then have its tiles in turn; blockIdx.y is a diagonal block
// of H. While one row is worked on, the next two come into the warp's part of shared memory, where every thread reads what
// it has copied itself: no barrier. Two, so that the memory has something to do while all warps are busy with what has come;
// where there is a residual, there is room for one.
template <class T, int tiles, int warps, bool fused>
__global__ void __launch_bounds__(32 * most_warps(tiles, warps), 1) patch_warp_rows(const PatchRows call) {
  constexpr int part = tiles * kWarpTile, n = warps * part, tables = fused ? 2 : 1, warp_bytes = 4 * part;
  constexpr int ahead = fused ? 1 : 2, tile_bytes = 2 * kWarpTile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, turn = warp % warps;  // whose tiles are turn, turn + warps, ...
  const int element = static_cast<int>(blockIdx.y) * n, own = 2 * element + tile_bytes * turn + 16 * lane;
  float* const scales = shared_memory();
  char* const places = reinterpret_cast<char*>(scales + tables * n);
  char* const x = places + warp_bytes * warp + 16 * lane;
  const Signs<T> first(lane);
  const Signs<Later<T>> later(lane);
  const auto copy_row = [&](char* to, const char* from) {
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) copy16(to + tile_bytes * tile, from + tile_bytes * warps * tile);
  };
  const int rows = static_cast<int>(call.rows), step = gridDim.x * call.rows_together;
  const auto fetch = [&](int index, char* to) {
    if (index < rows) {
      copy_row(to, call.x + index * call.x_stride + own);
      if constexpr (fused) copy_row(to + 2 * part, call.residual + index * call.residual_stride + own);
    }
    end_group_of_copies();
  };

  int index = warp / warps * gridDim.x + blockIdx.x, place = 0;
#pragma unroll
  for (int i = 0; i < ahead; ++i) fetch(index + i * step, x + 2 * part * i);
  fill_scales<tiles, warps>(call.scale, element, scales);
  if constexpr (fused) fill_weights(call.norm_weight, n, scales + n);
  __syncthreads();
  for (; index < rows; index += step) {
    WarpRow<tiles> row;
    wait_for_copies<ahead - 1>();
    transform_there<T, tiles, fused>(x + 2 * part * place, first, later, row);
    if constexpr (warps == 2) {
      const auto exchanged = [&](int of) { return reinterpret_cast<float*>(places + warp_bytes * of + 2 * part * place); };
      scale_across_two(row, scales, exchanged(warp), exchanged(warp ^ 1), lane, warp / 2);
    }
    fetch(index + ahead * step, x + 2 * part * place);
    place = ahead - 1 - place;
    if constexpr (warps == 1) scale_across(row, scales, lane);
    char* const y = call.y + index * call.y_stride + own;
    float squares = 0;
    transform_back(row, later, [&](int tile, const float4(&values)[2]) {
      store16(y + tile_bytes * warps * tile, packed<T>(values));
      if constexpr (fused) {
        squares += sum_of_squares(values[0]) + sum_of_squares(values[1]);
        row.set(tile, values);
      }
    });
    if constexpr (fused) {
      squares = sum_over_warp(squares);
      if constexpr (warps == 2) squares = sum_over_two(squares, reinterpret_cast<float*>(places + warp_bytes * (blockDim.x / 32)));
      store_normed<T, warps>(row, squares, call.eps, scales + n + kWarpTile * turn + 4 * lane,
                             call.normed + index * call.normed_stride + own);
    }
  }
}

// --- which kernel ---

template <class T, bool fused, class Run>
void with_warp_kernel_of(int n, Run run) {
  switch (n) {
    case 1024: return run(patch_warp_rows<T, 4, 1, fused>);
    case 2048: return run(patch_warp_rows<T, 8, 1, fused>);
    case 3072: return run(patch_warp_rows<T, 12, 1, fused>);
    case 4096: return run(patch_warp_rows<T, 16, 1, fused>);
    case 5120: return run(patch_warp_rows<T, 20, 1, fused>);
    case 6144: return run(patch_warp_rows<T, 12, 2, fused>);
    case 8192: return run(patch_warp_rows<T, 16, 2, fused>);
  }
}

template <class T, class Run>
void with_warp_kernel_of(const PatchRows& call, Run run) {
  const int n = call.shape.m << call.shape.k;
  if (call.fused) return with_warp_kernel_of<T, true>(n, run);
  with_warp_kernel_of<T, false>(n, run);
}

template <class Run>
void with_warp_kernel(const PatchRows& call, Run run) {
  if (call.in == Dtype::float16) return with_warp_kernel_of<Half>(call, run);
  with_warp_kernel_of<BFloat16>(call, run);
}

}  // namespace linearpatch::cuda
