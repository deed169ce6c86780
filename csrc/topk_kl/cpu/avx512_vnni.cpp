// The products in integers for AVX-512 VNNI: Cascade Lake and later, Zen 4 and later.
#include "integer_table.h"

#if defined(__x86_64__)
#pragma GCC target("avx512vnni")
#pragma GCC optimize("no-tree-pre")  // with it GCC 12 stores every sum of a tile at every step
#include "../../common/cpu/avx512-inl.h"

namespace {

using namespace linearpatch::topk_kl;

constexpr float longest = 46300;  // of a row: a little below 2^15.5, for what float32 rounds
constexpr float largest = 32766;
constexpr float large = 256;  // what half of a row must become
constexpr float furthest = 1e6;  // between the scales of rows, which float32 takes along in the weights of a sum of them

HOT __mmask16 first(long n) { return n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0; }
HOT __m512 load(const uint16_t* p, __mmask16 mask) { return Words::from_bfloat16(_mm256_maskz_loadu_epi16(mask, p)); }
HOT __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
HOT float reciprocal(float a) { return a == 0 ? 0 : 1 / a; }

// 1 / s of a row of n numbers.
HOT float inverse_scale(float squares, float most, long n) {
  const float by_length = __builtin_sqrtf(squares) / (longest - __builtin_sqrtf(n)), by_largest = most / largest;
  return by_length > by_largest ? by_length : by_largest;
}

// Whether float32 holds the squares; not for NaN.
HOT bool in_range(float squares, float most) { return (most == 0 && squares == 0) || (squares > 1e-30f && squares < 1e30f); }

bool scale(const NarrowRows& rows, const uint8_t* counted, float* inverse) {
  bool all = true;
  float lowest = __builtin_inff(), highest = 0;
  for (long r = 0; r < rows.count; ++r) {
    inverse[r] = 0;
    if (counted && !counted[r]) continue;
    const uint16_t* const row = rows.data + r * rows.stride;
    __m512 squares = _mm512_setzero_ps(), most = squares;
    for (long i = 0; i < rows.n; i += 16) {
      const __m512 x = load(row + i, first(rows.n - i));
      squares = _mm512_fmadd_ps(x, x, squares);
      most = _mm512_max_ps(most, _mm512_abs_ps(x));
    }
    const float sum = _mm512_reduce_add_ps(squares), peak = _mm512_reduce_max_ps(most);
    if (!in_range(sum, peak)) return false;
    inverse[r] = inverse_scale(sum, peak, rows.n);
    if (inverse[r] == 0) continue;
    lowest = inverse[r] < lowest ? inverse[r] : lowest;
    highest = inverse[r] > highest ? inverse[r] : highest;
    const __m512 bound = _mm512_set1_ps(large * inverse[r]), zero = _mm512_setzero_ps();
    long above = 0, there = 0;
    for (long i = 0; i < rows.n; i += 16) {
      const __m512 x = load(row + i, first(rows.n - i));
      above += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_abs_ps(x), bound, _CMP_GE_OQ));
      there += __builtin_popcount(_mm512_cmp_ps_mask(x, zero, _CMP_NEQ_OQ));
    }
    all &= 2 * above >= there;
  }
  return all && !(highest > furthest * lowest);
}

// Eight rows of eight 32-bit words.
HOT void transpose(__m256i (&row)[8]) {
  __m256i t[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    UNROLL for (int j = 0; j < 2; ++j) {
      row[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      row[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(row[i], row[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(row[i], row[i + 4], 0x31);
  }
  UNROLL for (int i = 0; i < 8; ++i) row[i] = t[i];
}

// Rows as an operand of panels of `panel` rows. With `diffused` each of 16 interleaved parts of a row carries along what
// rounding has taken from it.
template <long panel, bool diffused, class T>
HOT void pack_rows(const T* data, long stride, long count, long n, const float* inverse, const float* factors, int32_t* out) {
  const long pairs = pairs_of(n), padded = (count + panel - 1) / panel * panel;
  for (long r = 0; r < padded; r += 8) {
    int32_t* const place = out + r / panel * panel * pairs + r % panel;
    const T* row[8];
    __m512 scales[8], carried[8];
    __mmask16 there[8];
    UNROLL for (int i = 0; i < 8; ++i) {
      const bool any = r + i < count && inverse[r + i] != 0;
      row[i] = data + (any ? (r + i) * stride : 0);
      there[i] = any ? 0xffff : 0;
      scales[i] = _mm512_set1_ps(any ? reciprocal(inverse[r + i]) : 0);
      carried[i] = _mm512_setzero_ps();
    }
    for (long c = 0; c < n; c += 16) {
      const __mmask16 mask = first(n - c);
      const __m512 factor = factors ? load(factors + c, mask) : _mm512_set1_ps(1);
      __m256i words[8];
      UNROLL for (int i = 0; i < 8; ++i) {
        __m512 x = _mm512_mul_ps(load(row[i] + c, mask & there[i]), scales[i]);
        if (factors) x = _mm512_mul_ps(x, factor);
        if (diffused) x = _mm512_add_ps(x, carried[i]);
        const __m512i q = _mm512_cvtps_epi32(x);
        if (diffused) carried[i] = _mm512_sub_ps(x, _mm512_cvtepi32_ps(q));
        words[i] = _mm512_cvtsepi32_epi16(q);
      }
      transpose(words);
      UNROLL for (int p = 0; p < 8; ++p)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place + (c / 2 + p) * panel), words[p]);
    }
  }
}

void pack_left(const NarrowRows& rows, const float* inverse, int32_t* out) {
  pack_rows<left_panel, false>(rows.data, rows.stride, rows.count, rows.n, inverse, nullptr, out);
}

void pack_right(const NarrowRows& rows, const float* inverse, int32_t* out) {
  pack_rows<right_panel, false>(rows.data, rows.stride, rows.count, rows.n, inverse, nullptr, out);
}

bool pack_columns(const NarrowRows& rows, const float* inverse, int64_t begin, int64_t end, int32_t* out, float* column_inverse) {
  const long pairs = pairs_of(rows.count);
  bool all = true;
  for (long c = begin; c < end; c += 16) {
    const __mmask16 mask = first(end - c);
    const auto number = [&](long r) __attribute__((always_inline)) {
      const bool any = r < rows.count && inverse[r] != 0;
      const __m512 x = load(rows.data + (any ? r * rows.stride : 0) + c, any ? mask : 0);
      return _mm512_mul_ps(x, _mm512_set1_ps(any ? 1 / inverse[r] : 0));
    };
    __m512 squares = _mm512_setzero_ps(), most = squares;
    for (long r = 0; r < rows.count; ++r) {
      const __m512 x = number(r);
      squares = _mm512_fmadd_ps(x, x, squares);
      most = _mm512_max_ps(most, _mm512_abs_ps(x));
    }
    alignas(64) float sums[16], peaks[16], scales[16];
    _mm512_store_ps(sums, squares);
    _mm512_store_ps(peaks, most);
    for (long i = 0; i < 16; ++i) {
      const float column = inverse_scale(sums[i], peaks[i], rows.count);
      scales[i] = reciprocal(column);
      if (c + i < end) column_inverse[c + i] = column;
    }
    const __m512 s = _mm512_load_ps(scales), bound = _mm512_set1_ps(large), zero = _mm512_setzero_ps();
    __m512i balance = _mm512_setzero_si512();  // large numbers, less others that are not 0
    const auto integer = [&](long r) __attribute__((always_inline)) {
      const __m512 x = _mm512_mul_ps(number(r), s);
      const __mmask16 there = _mm512_cmp_ps_mask(x, zero, _CMP_NEQ_OQ);
      const __mmask16 above = _mm512_cmp_ps_mask(_mm512_abs_ps(x), bound, _CMP_GE_OQ);
      balance = _mm512_mask_sub_epi32(balance, there, balance, _mm512_set1_epi32(1));
      balance = _mm512_mask_add_epi32(balance, above, balance, _mm512_set1_epi32(2));
      return _mm512_cvtps_epi32(x);
    };
    const long i = c - begin;
    int32_t* const place = out + i / right_panel * right_panel * pairs + i % right_panel;
    for (long p = 0; p < pairs; ++p) {
      const __m512i low = integer(2 * p), high = integer(2 * p + 1);
      _mm512_storeu_si512(place + p * right_panel, _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16)));
    }
    all &= _mm512_cmplt_epi32_mask(balance, _mm512_setzero_si512()) == 0;
  }
  return all;
}

void pack_weights(const float* e, int64_t tokens, int64_t n, const float* row_inverse, int32_t* out, float* inverse) {
  __m512 peaks = _mm512_setzero_ps();
  for (long i = 0; i < n; i += 16) peaks = _mm512_max_ps(peaks, load(row_inverse + i, first(n - i)));
  const float highest = _mm512_reduce_max_ps(peaks);
  const __m512 relative = _mm512_set1_ps(reciprocal(highest));
  for (long t = 0; t < tokens; ++t) {
    __m512 squares = _mm512_setzero_ps(), most = squares;
    for (long i = 0; i < n; i += 16) {
      const __mmask16 mask = first(n - i);
      const __m512 x = _mm512_mul_ps(load(e + t * n + i, mask), _mm512_mul_ps(load(row_inverse + i, mask), relative));
      squares = _mm512_fmadd_ps(x, x, squares);
      most = _mm512_max_ps(most, _mm512_abs_ps(x));
    }
    const float sum = _mm512_reduce_add_ps(squares);
    const bool finite = sum < __builtin_inff();
    // What is that small against exp(0) is nothing.
    inverse[t] = !finite ? __builtin_nanf("") : sum < 1e-26f ? 0 : inverse_scale(sum, _mm512_reduce_max_ps(most), 4 * n) * highest;
  }
  pack_rows<left_panel, true>(e, n, tokens, n, inverse, row_inverse, out);
}

// 8 rows by 48 columns.
HOT void tile(const int32_t* left, const int32_t* right, long pairs, __m512i (&sum)[8][3]) {
  UNROLL for (int r = 0; r < 8; ++r) UNROLL for (int c = 0; c < 3; ++c) sum[r][c] = _mm512_setzero_si512();
  for (long p = 0; p < pairs; ++p) {
    __m512i column[3];
    UNROLL for (int c = 0; c < 3; ++c) column[c] = _mm512_loadu_si512(right + p * right_panel + 16 * c);
    UNROLL for (int r = 0; r < 8; ++r) {
      const __m512i row = _mm512_set1_epi32(left[p * left_panel + r]);
      UNROLL for (int c = 0; c < 3; ++c) sum[r][c] = _mm512_dpwssd_epi32(sum[r][c], row, column[c]);
    }
  }
}

void multiply(const int32_t* left, const float* left_inverse, int64_t rows, const int32_t* right, const float* right_inverse,
              int64_t columns, int64_t n, bool add, float* out, int64_t stride) {
  const long pairs = pairs_of(n);
  for (long c = 0; c < columns; c += right_panel)
    for (long r = 0; r < rows; r += left_panel) {
      __m512i sum[8][3];
      tile(left + r * pairs, right + c * pairs, pairs, sum);
      UNROLL for (int i = 0; i < 8; ++i) {
        if (r + i >= rows) continue;
        float* const row = out + (r + i) * stride + c;
        UNROLL for (int j = 0; j < 3; ++j) {
          const __mmask16 mask = first(columns - c - 16 * j);
          __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][j]), _mm512_set1_ps(left_inverse[r + i]));
          x = _mm512_mul_ps(x, load(right_inverse + c + 16 * j, mask));
          if (add) x = _mm512_add_ps(x, load(row + 16 * j, mask));
          _mm512_mask_storeu_ps(row + 16 * j, mask, x);
        }
      }
    }
}

constexpr IntegerTable table = {scale, pack_left, pack_right, pack_columns, pack_weights, multiply};

}  // namespace

const IntegerTable* linearpatch::topk_kl::avx512_vnni_products() { return &table; }

#else

const linearpatch::topk_kl::IntegerTable* linearpatch::topk_kl::avx512_vnni_products() { return nullptr; }

#endif
