// Products of bfloat16 matrices in 16-bit integers, which VNNI multiplies at twice the rate of float32.
//
// A row x of n numbers becomes q = round(x s), with s such that the sum of q^2 is below 2^31 and no |q| above 32767. By
// Cauchy and Schwarz neither a sum of products of two such rows nor any part of it leaves 32 bits, so that the integers
// are summed up exactly, in any order. A row fits if half of its numbers, zeros aside, become 256 or more, which is
// what bfloat16's own digits tell apart; rows of which a few numbers dwarf the rest, and what is not finite, are left to
// float32.
//
// Operands lie in panels, as pairs along the sum: [panel][pair][row of the panel][2].
#pragma once

#include <cstdint>

namespace linearpatch::topk_kl {

constexpr int64_t left_panel = 8;
constexpr int64_t right_panel = 48;

// Pairs of a row of n numbers, zeros behind them.
static inline constexpr int64_t pairs_of(int64_t n) { return (n + 15) / 16 * 8; }
// 32-bit words of an operand.
static inline constexpr int64_t left_words(int64_t rows, int64_t n) {
  return (rows + left_panel - 1) / left_panel * left_panel * pairs_of(n);
}
static inline constexpr int64_t right_words(int64_t rows, int64_t n) {
  return (rows + right_panel - 1) / right_panel * right_panel * pairs_of(n);
}

// bfloat16 rows of n numbers.
struct NarrowRows {
  const uint16_t* data;
  int64_t stride, count, n;
};

struct IntegerTable {
  // inverse[r] = 1 / s; 0 for a row of zeros and one that does not count (null: all do), which are zeros in an operand.
  // False where a row does not fit.
  bool (*scale)(const NarrowRows&, const uint8_t* counted, float* inverse);
  void (*pack_left)(const NarrowRows&, const float* inverse, int32_t* out);
  void (*pack_right)(const NarrowRows&, const float* inverse, int32_t* out);

  // The right operand of e W, which is summed over W's rows: columns first to last of q = W s_row s_column, and
  // 1 / s_column; false where a column does not fit.
  bool (*pack_columns)(const NarrowRows&, const float* inverse, int64_t first, int64_t last, int32_t* out, float* column_inverse);
  // Its left operand, of q = e / s_row s_token; what rounding takes from a number is added to a later one of its token, so
  // that many small numbers are not lost together. A token that is not finite has an inverse of NaN.
  void (*pack_weights)(const float* e, int64_t tokens, int64_t n, const float* row_inverse, int32_t* out, float* inverse);

  // out [rows, columns] = the product, or += it.
  void (*multiply)(const int32_t* left, const float* left_inverse, int64_t rows, const int32_t* right,
                   const float* right_inverse, int64_t columns, int64_t n, bool add, float* out, int64_t stride);
};

const IntegerTable* avx512_vnni_products();

}  // namespace linearpatch::topk_kl
