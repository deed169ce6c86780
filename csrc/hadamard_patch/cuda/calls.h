// What a launch of the CUDA kernels consists of, and how a call is cut into threads and blocks. No CUDA and no torch here:
// operators.cpp, the kernels, and the emulator of tests/simt share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../common/cuda/launch.h"
#include "../../common/dtype.h"
#include "../width.h"

namespace linearpatch::cuda {

// Limits of the staged kernels, which are made for every number of bits up to these.
constexpr int kMiddleBits = 4, kMostOuterBits = 3, kOuterBitsOfPowers = 2, kMostInnerBits = 6, kMostThreads = 256;
constexpr int kFewestBits = 3;           // of the Sylvester factor: a row is made of vectors of eight
constexpr int kFewestPowerOfTwo = 7;     // log2 of the narrowest row without a factor H_m
constexpr int kWidest = 32768;           // elements of a row that is worked on
constexpr int kWidestTabled = 12288;     // where H_m has no program: two rows of float32 in shared memory
constexpr int kMostDiagonalBlocks = 65535;
constexpr int kFixedThreads = 128;       // of a block, at most
constexpr int kPartThreads = 256, kPartColumns = 32, kPartLanes = kPartThreads * 4 / kPartColumns;  // of add_parts
constexpr int kMostWarpRows = 1 << 30;
constexpr int kWarpTile = 256;             // elements of a tile of warp_rows.cuh: eight for each thread of a warp

// A row of m 2^k elements, the bits of its outer and inner stages (stages.cuh), the threads that share it, and the floats
// from row to row in shared memory.
struct RowShape {
  int m, k, a, b, threads, stride;
};

// Rows that share a warp keep out of each other's banks.
constexpr int stride_of_rows(int elements, int threads) { return elements + (threads < 32 ? threads : 0); }

// d numbers of a type, aligned to 16 bytes; or null.
struct Numbers {
  const char* data;
  Dtype dtype;
};

struct PatchRows {
  bool fused;  // with a residual, which is added to x first, and the norm of y; else both are null
  bool channels;  // whether pre or post is there
  const char* x;
  const char* residual;
  char* y;
  char* normed;
  int64_t rows, x_stride, residual_stride, y_stride, normed_stride;  // strides of a row in bytes
  Dtype in, out;                                                     // of x and residual, of y and normed
  Numbers scale, pre, post;
  Numbers norm_weight;  // where fused
  float eps;
  RowShape shape;
  int rows_together;  // in one block of threads
  bool scale_in_shared;
  const uint32_t* signs_there;  // of H_m where it has no program, as multiply_by_table wants them
  const uint32_t* signs_back;
};

struct GradientRows {
  const char* x;
  const char* grad;
  char* dx;  // or null
  int64_t rows, x_stride, grad_stride, dx_stride;
  Dtype in, out;  // of x and grad, of dx
  Numbers scale, pre, post;
  // Partial sums over rows, [parts, d] each, or null: of a u, b x and dy w (ops/hadamard_patch/reference.py), the first
  // without H's norm. Every row of threads has a part of its own.
  float* scale_sums;
  float* pre_sums;
  float* post_sums;
  bool sums_in_shared;
  RowShape shape;
  int rows_together;
  const uint32_t* signs_there;
  const uint32_t* signs_back;
};

// The second half of a sum over rows.
struct PartSums {
  const float* sums;  // [parts, d]
  float* total;       // [d]
  int64_t parts;
  int d;
  float factor;
};

struct PatchLaunch : Launch {
  bool fixed = false;      // the kernel for this width, else the one for any width with this factor
  bool warp_rows = false;  // the kernel of warp_rows.cuh, which is a fixed one
};

// H_m, or its transpose, as multiply_by_table of stages.cuh wants it.
inline std::vector<uint32_t> packed_signs(const Width& width, bool transposed) {
  const int64_t m = width.m, groups = (m + 15) / 16;
  const uint32_t* const codes = transposed ? width.codes_transposed : width.codes;
  std::vector<uint32_t> words(groups * m);
  for (int64_t j = 0; j < m; ++j)
    for (int64_t i = 0; i < m; ++i) words[j / 16 * m + i] |= (codes[j * (m / 4) + i / 4] >> (i % 4) & 1) << (j % 16);
  return words;
}

constexpr int floor_power_of_two(int64_t n) {
  int power = 1;
  while (2 * power <= n) power *= 2;
  return power;
}

inline bool row_is_possible(int64_t m, int64_t k, bool has_program) {
  const int64_t n = m << k;
  if (m == 1) return k >= kFewestPowerOfTwo && n <= kWidest;
  return m % 4 == 0 && k >= kFewestBits && n <= (has_program ? kWidest : kWidestTabled);
}

// With few rows, many threads work on each: then it is the time of one row that counts.
constexpr RowShape staged_shape(int m, int k, bool has_program, bool few_rows) {
  RowShape shape{m, k, 0, 0, 0, 0};
  const int64_t n = static_cast<int64_t>(m) << k;
  if (m == 1) {
    const int bits = k - 3 - kMiddleBits;
    shape.a = std::min(kOuterBitsOfPowers, bits);
    shape.b = bits - shape.a;
  } else {
    shape.b = std::min(3, k - 3);  // so that neighbours have neighbouring vectors
    shape.a = std::min(3, k - 3 - shape.b);
    shape.b = k - 3 - shape.a;
  }
  const bool tabled = m != 1 && !has_program;
  const int64_t values = few_rows || tabled ? 16 : m == 1 ? 32 : 64;  // for each thread
  shape.threads = std::clamp(floor_power_of_two(n / values), 8, kMostThreads);
  shape.stride = stride_of_rows(static_cast<int>(n), shape.threads);
  return shape;
}

// Rows with a kernel of their own: powers of two, and where models are, products with a factor, in 16 bits: float32 has
// twice the time. Nowhere does the compiler know more than the shape that is used.
constexpr bool has_fixed_kernel(int m, int k, Dtype dtype) {
  if (m == 1) return k >= (dtype == Dtype::float32 ? 11 : 10) && k <= 13;  // 1024 float32 would spill on sm_80
  const int n = m << k;
  return dtype != Dtype::float32 &&
         (n == 576 || n == 896 || n == 1536 || n == 2560 || n == 3072 || n == 3584 || n == 5120);
}

// Widths whose rows a warp of its own works on, or two, in 16 bits; else 0. A warp has up to 20 tiles of a row.
constexpr int warps_of_a_row(int m, int k, Dtype dtype) {
  if (dtype == Dtype::float32) return 0;
  if (m == 1) return k >= 10 && k <= 12 ? 1 : k == 13 ? 2 : 0;
  return k == 8 && (m == 12 || m == 20) ? 1 : k == 9 && m == 12 ? 2 : 0;
}

// Warps that a processor holds at a time: more need registers that a thread's part of a row takes.
constexpr int most_warps(int tiles, int warps) {
  return tiles <= 4 ? 24 : tiles <= 8 ? 16 : tiles <= 12 && warps == 1 ? 12 : 8;
}

constexpr RowShape fixed_shape(int m, int k) {
  RowShape shape = staged_shape(m, k, true, false);
  if (m != 1) return shape;
  shape.a = k < 13 ? 3 : 4;  // all but the middle's bits, so that there is no inner stage
  shape.b = 0;
  shape.threads = 1 << (k - 3 - shape.a);
  shape.stride = stride_of_rows(1 << k, shape.threads);
  return shape;
}

// Rows in a block: at least 128 threads, if the shared memory is there.
inline int rows_in_a_block(const RowShape& shape, int64_t bytes_a_row, int64_t bytes_besides, int64_t limit) {
  int rows = std::max(1, 128 / shape.threads);
  while (rows > 1 && rows * shape.threads > 32 && rows * bytes_a_row + bytes_besides > limit) rows /= 2;
  return rows;
}

// Threads that a processor holds of a kernel: what its registers leave room for, as its launch bounds promise. A block more
// than it holds would begin when others have ended, and make a call take two turns.
constexpr int resident_fixed(int m, int k, bool channels) { return m == 1 && k == 13 ? 256 : channels ? 384 : 512; }
constexpr int resident_staged(int m) { return m == 1 ? 512 : 256; }
constexpr int resident_gradients(int m) { return m == 1 ? 384 : 256; }

inline int blocks_for(int64_t rows, int rows_together, int threads, int64_t shared_bytes, int resident_threads,
                      const Device& device) {
  const int64_t enough = (rows + rows_together - 1) / rows_together;
  const int64_t by_shared = device.shared_per_processor / (shared_bytes + 1024);  // a kilobyte a block is the system's
  const int64_t resident = std::max<int64_t>(1, std::min<int64_t>(resident_threads / threads, by_shared));
  return static_cast<int>(std::max<int64_t>(1, std::min(enough, resident * device.processors)));
}

// Shared memory of warp_rows.cuh, for a warp: two of its parts of x, or one and one of the residual; and for all of a block:
// the scale, and where there is a norm its weight, and every warp's sum of squares.
inline int64_t warp_bytes(int part) { return 4 * part; }
inline int64_t warp_table_bytes(const PatchRows& call, int n, int warps) {
  return (call.fused ? 8 : 4) * n + (call.fused && warps > 1 ? 4 * kMostThreads / 32 : 0);
}

// One block a processor. With less than two rows for every warp, what a warp takes for one of them counts, and many threads
// to a row are faster.
inline bool plan_warp_rows(PatchLaunch& launch, PatchRows& call, const Device& device) {
  const int n = call.shape.m << call.shape.k, warps = warps_of_a_row(call.shape.m, call.shape.k, call.in);
  if (!device.matrix_products || !warps || call.in != call.out || call.channels) return false;
  const int part = n / warps;
  const int64_t tables = warp_table_bytes(call, n, warps), room = (device.shared_per_block - tables) / warp_bytes(part);
  const int64_t together = std::min<int64_t>(room, most_warps(part / kWarpTile, warps)) / warps;
  launch.warp_rows = together > 0 && call.rows >= 2 * together * device.processors && call.rows <= kMostWarpRows;
  if (!launch.warp_rows) return false;
  launch.fixed = call.scale_in_shared = true;
  call.rows_together = static_cast<int>(together);
  launch.threads = 32 * warps * call.rows_together;
  launch.shared_bytes = tables + together * warps * warp_bytes(part);
  launch.blocks = device.processors;
  return true;
}

// Fills in the call's shape; `width` is that of a row, and its matrix.
inline PatchLaunch plan_patch(PatchRows& call, const Width& width, const Device& device) {
  PatchLaunch launch{};
  int k = 0;
  while (int64_t{1} << k < width.inner) ++k;
  launch.possible = row_is_possible(width.m, k, width.has_program) && width.blocks <= (call.fused ? 1 : kMostDiagonalBlocks);
  if (!launch.possible) return launch;
  const int64_t n = width.m * width.inner, row_bytes = n * 4;
  const bool tabled = width.m != 1 && !width.has_program, few = call.rows < device.processors;
  launch.diagonal_blocks = static_cast<int>(width.blocks);
  const int m = static_cast<int>(width.m);
  call.shape = {m, k, 0, 0, 0, 0};
  if (plan_warp_rows(launch, call, device)) return launch;
  launch.fixed = !tabled && has_fixed_kernel(m, k, call.in) && !call.fused && !few && call.in == call.out &&
                 !(m == 1 && k == 13 && call.channels);
  call.shape = launch.fixed ? fixed_shape(m, k) : staged_shape(m, k, width.has_program, few);
  const int64_t bytes_a_row = 4 * call.shape.stride * (tabled ? 2 : 1), besides = call.fused ? 4 * kMostThreads / 32 : 0;
  const int64_t limit = device.shared_per_block;
  call.rows_together = rows_in_a_block(call.shape, bytes_a_row, besides + (launch.fixed ? row_bytes : 0), limit);
  launch.threads = call.rows_together * call.shape.threads;
  launch.shared_bytes = call.rows_together * bytes_a_row + besides;
  const int resident = launch.fixed ? resident_fixed(m, k, call.channels) : resident_staged(m);
  launch.blocks = blocks_for(call.rows, call.rows_together, launch.threads, launch.shared_bytes + row_bytes, resident, device);
  const bool several_turns = call.rows > static_cast<int64_t>(launch.blocks) * call.rows_together;
  call.scale_in_shared = launch.fixed || (!tabled && several_turns && launch.shared_bytes + row_bytes <= limit);
  if (call.scale_in_shared) launch.shared_bytes += row_bytes;
  launch.possible = launch.shared_bytes <= limit;
  return launch;
}

inline int64_t parts_of(const Launch& launch, const GradientRows& call) {
  return static_cast<int64_t>(launch.blocks) * call.rows_together;
}

inline Launch plan_sum(const PartSums& call) {
  return {.possible = true,
          .blocks = (call.d + kPartColumns - 1) / kPartColumns,
          .diagonal_blocks = 1,
          .threads = kPartThreads,
          .shared_bytes = 16 * kPartThreads};
}

inline Launch plan_gradients(GradientRows& call, const Width& width, int wanted_sums, const Device& device) {
  Launch launch{};
  int k = 0;
  while (int64_t{1} << k < width.inner) ++k;
  launch.possible = row_is_possible(width.m, k, width.has_program) && width.blocks <= kMostDiagonalBlocks;
  if (!launch.possible) return launch;
  const int64_t limit = device.shared_per_block;
  const bool tabled = width.m != 1 && !width.has_program;
  launch.diagonal_blocks = static_cast<int>(width.blocks);
  call.shape = staged_shape(static_cast<int>(width.m), k, width.has_program, call.rows < device.processors);
  const int64_t row_bytes = 4 * call.shape.stride, work = row_bytes * (tabled ? 3 : 2);
  call.rows_together = rows_in_a_block(call.shape, work + wanted_sums * row_bytes, 0, limit);
  launch.threads = call.rows_together * call.shape.threads;
  launch.shared_bytes = call.rows_together * (work + wanted_sums * row_bytes);
  call.sums_in_shared = launch.shared_bytes <= limit;
  if (!call.sums_in_shared) launch.shared_bytes = call.rows_together * work;
  launch.possible = launch.shared_bytes <= limit;
  launch.blocks = blocks_for(call.rows, call.rows_together, launch.threads, launch.shared_bytes,
                             resident_gradients(static_cast<int>(width.m)), device);
  return launch;
}

}  // namespace linearpatch::cuda
