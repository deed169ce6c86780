// The products in integers against double, within what rounding to integers can have done to them; for the sanitizers,
// too: every operand is as large as it is said to be. Prints what was wrong; ends with status 1 if anything was.
#include "../../../csrc/topk_kl/cpu/integer_table.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using namespace linearpatch::topk_kl;

namespace {

std::mt19937 generator(7);
int wrong = 0;

float wide(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float a;
  std::memcpy(&a, &word, 4);
  return a;
}

struct Rows {
  int64_t count, n, stride;
  std::vector<uint16_t> numbers;
  // Alike: every number is the same, so that sums of products are as large as they can be.
  Rows(int64_t count, int64_t n, bool alike) : count(count), n(n), stride(n + 3), numbers((count - 1) * stride + n) {
    std::normal_distribution<float> normal;
    for (auto& number : numbers) {
      const float a = alike ? 0.71f : normal(generator);
      uint32_t word;
      std::memcpy(&word, &a, 4);
      number = static_cast<uint16_t>(word >> 16);
    }
  }
  double at(int64_t r, int64_t i) const { return wide(numbers[r * stride + i]); }
  NarrowRows given() const { return {numbers.data(), stride, count, n}; }
};

void hold(const char* what, int64_t rows, int64_t n, int64_t columns, double result, double exact, double allowed) {
  if (std::abs(result - exact) <= allowed * 1.001 + 1e-4 * std::abs(exact)) return;
  if (++wrong < 20) std::printf("%s %ld x %ld x %ld: %g for %g, off by more than %g\n", what, rows, n, columns, result, exact, allowed);
}

void logits(const IntegerTable& table, int64_t tokens, int64_t d, int64_t ids, bool alike) {
  const Rows h(tokens, d, alike), w(ids, d, alike);
  std::vector<float> h_inverse(tokens), w_inverse(ids), out(tokens * ids, NAN);
  std::vector<int32_t> left(left_words(tokens, d)), right(right_words(ids, d));
  if (!table.scale(h.given(), nullptr, h_inverse.data()) || !table.scale(w.given(), nullptr, w_inverse.data())) {
    if (++wrong < 20) std::printf("rows of %ld do not fit\n", d);
    return;
  }
  table.pack_left(h.given(), h_inverse.data(), left.data());
  table.pack_right(w.given(), w_inverse.data(), right.data());
  table.multiply(left.data(), h_inverse.data(), tokens, right.data(), w_inverse.data(), ids, d, false, out.data(), ids);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t v = 0; v < ids; ++v) {
      double exact = 0, allowed = 0;
      for (int64_t i = 0; i < d; ++i) {
        exact += h.at(t, i) * w.at(v, i);
        allowed += 0.5 * (h_inverse[t] * (std::abs(w.at(v, i)) + w_inverse[v]) + w_inverse[v] * std::abs(h.at(t, i)));
      }
      hold("hidden W^T", tokens, d, ids, out[t * ids + v], exact, allowed);
    }
}

void sums(const IntegerTable& table, int64_t tokens, int64_t ids, int64_t d, bool alike) {
  const Rows w(ids, d, alike);
  std::vector<float> e(tokens * ids), w_inverse(ids), column_inverse(d), inverse(tokens), out(tokens * d, 1.0f);
  std::uniform_real_distribution<float> uniform(-12, 0);
  for (auto& weight : e) weight = alike ? 1.0f : std::exp(uniform(generator));
  if (tokens > 1) e[ids] = NAN;
  std::vector<int32_t> left(left_words(tokens, ids)), right(right_words(d, ids));
  if (!table.scale(w.given(), nullptr, w_inverse.data()) ||
      !table.pack_columns(w.given(), w_inverse.data(), 0, d, right.data(), column_inverse.data())) {
    if (++wrong < 20) std::printf("columns of %ld do not fit\n", ids);
    return;
  }
  table.pack_weights(e.data(), tokens, ids, w_inverse.data(), left.data(), inverse.data());
  table.multiply(left.data(), inverse.data(), tokens, right.data(), column_inverse.data(), d, ids, true, out.data(), d);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < d; ++c) {
      double exact = 1, allowed = 0;
      for (int64_t v = 0; v < ids; ++v) {
        exact += e[t * ids + v] * w.at(v, c);
        allowed += inverse[t] / w_inverse[v] * std::abs(w.at(v, c)) +
                   0.5 * w_inverse[v] * column_inverse[c] * (e[t * ids + v] + inverse[t] / w_inverse[v]);
      }
      if (t == 1 && std::isnan(out[t * d + c])) continue;
      hold("e W", tokens, ids, d, out[t * d + c], exact, allowed);
    }
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512vnni")) return std::puts("no VNNI here"), 0;
  const IntegerTable& table = *avx512_vnni_products();
  int cases = 0;
  for (const bool alike : {false, true})
    for (const int64_t tokens : {1, 7, 8, 17})
      for (const int64_t d : {1, 15, 16, 33, 576, 4096})
        for (const int64_t ids : {2, 33, 47, 49, 130}) {
          logits(table, tokens, d, ids, alike);
          sums(table, tokens, d, ids, alike);
          ++cases;
        }
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong != 0;
}
