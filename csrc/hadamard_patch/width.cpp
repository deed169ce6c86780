#include "width.h"

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include "orders.h"

namespace linearpatch {
namespace {

// Whether the program of order M multiplies by exactly this matrix (or its transpose).
template <int M, bool transposed>
bool program_is(const int8_t* h) {
  using Program = Order<M, transposed>;
  constexpr int steps = sizeof(Program::steps) / sizeof(Step);
  for (int column = 0; column < M; ++column) {
    float value[M + steps] = {};
    value[column] = 1;
    for (int i = 0; i < steps; ++i) {
      const auto [a, b, kind] = Program::steps[i];
      const float factor = kind == sum ? 1 : kind == plus_half ? 0.5f : kind == minus_half ? -0.5f : -1;
      value[M + i] = (kind == negated_sum ? -1 : 1) * value[a] + factor * value[b];
    }
    for (int row = 0; row < M; ++row)
      if (value[Program::outputs[row]] != (transposed ? h[column * M + row] : h[row * M + column])) return false;
  }
  return true;
}

template <int M>
bool programs_are(const int8_t* h) {
  return program_is<M, false>(h) && program_is<M, true>(h);
}

bool has_program(int64_t m, const int8_t* h) {
  switch (m) {
    case 12: return programs_are<12>(h);
    case 20: return programs_are<20>(h);
    case 28: return programs_are<28>(h);
    case 36: return programs_are<36>(h);
    default: return false;
  }
}

struct OwnedWidth : Width {
  OwnedWidth(int64_t d, int64_t m, int64_t inner, const int8_t* h)
      : Width{d, m, inner, d / (m * inner), linearpatch::has_program(m, h), nullptr, nullptr} {
    if (m == 1 || Width::has_program) return;
    const auto fill = [&](std::vector<uint32_t>& numbers, int64_t row_stride, int64_t column_stride) {
      numbers.reserve(m * (m / 4));
      for (int64_t j = 0; j < m; ++j)
        for (int64_t g = 0; g < m / 4; ++g) {
          uint32_t number = 16 * g;
          for (int64_t i = 0; i < 4; ++i)
            if (h[j * row_stride + (4 * g + i) * column_stride] < 0) number |= 1u << i;
          numbers.push_back(number);
        }
      return numbers.data();
    };
    codes = fill(rows, m, 1);
    codes_transposed = fill(columns, 1, m);
  }
  std::vector<uint32_t> rows, columns;
};

std::shared_mutex guard;
std::unordered_map<int64_t, std::unique_ptr<OwnedWidth>>& widths() {
  static auto* const all = new std::unordered_map<int64_t, std::unique_ptr<OwnedWidth>>;  // outlives every thread
  return *all;
}

}  // namespace

const Width* find_width(int64_t d) {
  std::shared_lock lock(guard);
  const auto found = widths().find(d);
  return found == widths().end() ? nullptr : found->second.get();
}

const Width& add_width(int64_t d, int64_t m, int64_t inner, const int8_t* h) {
  auto width = std::make_unique<OwnedWidth>(d, m, inner, h);
  std::unique_lock lock(guard);
  return *widths().try_emplace(d, std::move(width)).first->second;
}

}  // namespace linearpatch
