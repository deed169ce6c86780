// The kernel units alone, without torch: every width given, in every type, with every optional operand, against float64.
//
//   python tests/ops/native/write_orders.py 576 4096 | patch_grid [seconds]
//
// With a number of seconds, the time of a row is printed instead (float32, bfloat16; in and out of the caches).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../../../csrc/hadamard_patch/width.h"

using namespace linearpatch;

// As torch's allocator does, and as scratch is: a vector that straddles two cache lines takes twice as long.
template <class T>
struct Aligned {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64)); }
  void deallocate(T* p, size_t) { std::free(p); }
  bool operator==(const Aligned&) const { return true; }
};
using Floats = std::vector<float, Aligned<float>>;

struct Factor {
  int64_t d, m, inner;
  std::vector<int8_t> h;
};

static std::vector<Factor> read_factors() {
  std::vector<Factor> all;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    Factor f;
    int k, sign;
    words >> f.d >> f.m >> k;
    f.inner = int64_t{1} << k;
    while (words >> sign) f.h.push_back(static_cast<int8_t>(sign));
    all.push_back(std::move(f));
  }
  return all;
}

// x H, or x H^T, without the norm.
static std::vector<double> transform(const Factor& f, const std::vector<double>& x, bool back) {
  const int64_t n = f.m * f.inner;
  std::vector<double> y(f.d, 0.0);
  for (int64_t b = 0; b < f.d; b += n)
    for (int64_t i = 0; i < f.m; ++i)
      for (int64_t j = 0; j < f.m; ++j) {
        const double sign = f.h[back ? j * f.m + i : i * f.m + j];
        for (int64_t c = 0; c < f.inner; ++c) y[b + j * f.inner + c] += sign * x[b + i * f.inner + c];
      }
  for (int64_t half = 1; half < f.inner; half *= 2)
    for (int64_t i = 0; i < f.d; i += 2 * half)
      for (int64_t c = i; c < i + half; ++c) {
        const double sum = y[c] + y[c + half];
        y[c + half] = y[c] - y[c + half];
        y[c] = sum;
      }
  return y;
}

static double value_of(Dtype dtype, const void* p, int64_t i) {
  if (dtype == Dtype::float32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  if (dtype == Dtype::bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return v;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

static uint16_t nearest(Dtype dtype, float v) {  // by search: slow and plainly right
  uint16_t best = 0;
  if (dtype == Dtype::bfloat16) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    best = static_cast<uint16_t>(bits >> 16);
    const uint16_t next = best + 1;
    return std::fabs(value_of(dtype, &next, 0) - v) < std::fabs(value_of(dtype, &best, 0) - v) ? next : best;
  }
  uint16_t low = 0, high = 0x7bff;
  while (low < high) {
    const uint16_t middle = (low + high + 1) / 2;
    if (value_of(dtype, &middle, 0) <= std::fabs(v)) low = middle; else high = middle - 1;
  }
  return low | (v < 0 ? 0x8000 : 0);
}

static int check(const Factor& f, std::mt19937& random) {
  int failures = 0;
  const Width& width = add_width(f.d, f.m, f.inner, f.h.data());
  const KernelTable& unit = kernels(width);
  std::normal_distribution<float> normal;
  const int64_t rows = 3, gap = 5;
  const double norm = 1.0 / (f.m * f.inner);
  for (const Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16})
    for (int options = 0; options < 8; ++options) {
      const bool with_pre = options & 1, with_post = options & 2, in_place = options & 4;
      const int64_t size = dtype == Dtype::float32 ? 4 : 2, stride = f.d + gap;
      Floats scale(f.d), pre(f.d), post(f.d);
      for (auto* v : {&scale, &pre, &post}) for (float& a : *v) a = normal(random);
      Floats prepared(f.d + 16);
      unit.widen(scale.data(), Dtype::float32, static_cast<float>(norm), true, prepared.data(), f.d);
      std::vector<char> x(rows * stride * size), y(rows * stride * size, 0x55);
      for (int64_t i = 0; i < rows * stride; ++i) {
        const float v = normal(random);
        if (size == 4) reinterpret_cast<float*>(x.data())[i] = v;
        else reinterpret_cast<uint16_t*>(x.data())[i] = nearest(dtype, v);
      }
      const std::vector<char> before = x;
      char* out = in_place ? x.data() : y.data();
      const std::vector<char> untouched(out, out + rows * stride * size);
      // rows 0 .. 2 as a run of two and a run of one
      const PatchCall call{&width, dtype, 2, {x.data(), 2 * stride, stride}, {out, 2 * stride, stride}, prepared.data(),
                           with_pre ? pre.data() : nullptr, with_post ? post.data() : nullptr};
      Floats scratch(unit.scratch_floats(call));
      unit.patch(call, 0, rows, scratch.data());
      for (int64_t r = 0; r < rows; ++r) {
        std::vector<double> row(f.d);
        for (int64_t i = 0; i < f.d; ++i) row[i] = value_of(dtype, before.data(), r * stride + i) * (with_pre ? pre[i] : 1);
        row = transform(f, row, false);
        for (int64_t i = 0; i < f.d; ++i) row[i] *= scale[i] * norm;
        row = transform(f, row, true);
        double worst = 0, largest = 0;
        for (int64_t i = 0; i < f.d; ++i) {
          row[i] *= with_post ? post[i] : 1;
          largest = std::max(largest, std::fabs(row[i]));
          worst = std::max(worst, std::fabs(row[i] - value_of(dtype, out, r * stride + i)));
        }
        const double allowed = largest * (dtype == Dtype::float32 ? 2e-6 : dtype == Dtype::float16 ? 6e-4 : 4.5e-3);
        const bool outside = std::memcmp(out + (r * stride + f.d) * size, untouched.data() + (r * stride + f.d) * size,
                                         (r + 1 < rows ? gap : 0) * size);
        if (!(worst <= allowed) || outside) {
          ++failures;
          std::printf("d %ld (m %ld) %s dtype %d options %d row %ld: error %.2e of %.2e%s\n", long(f.d), long(f.m), unit.isa,
                      int(dtype), options, long(r), worst, largest, outside ? ", wrote outside" : "");
        }
      }
    }
  return failures;
}

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
  return v[v.size() / 2];
}

static void time_rows(const Factor& f, double seconds) {
  const Width& width = add_width(f.d, f.m, f.inner, f.h.data());
  const KernelTable& unit = kernels(width);
  Floats scale(f.d + 16, 1.0f / (f.m * f.inner));
  std::printf("%ld (m %ld) %s\n", long(f.d), long(f.m), unit.isa);
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16})
    for (const int64_t bytes : {int64_t{64} << 10, int64_t{16} << 20}) {
      const int64_t size = dtype == Dtype::float32 ? 4 : 2, rows = std::max<int64_t>(1, bytes / (2 * f.d * size));
      char* x = static_cast<char*>(std::aligned_alloc(4096, (rows * f.d * size + 4095) / 4096 * 4096));
      char* y = static_cast<char*>(std::aligned_alloc(4096, (rows * f.d * size + 4095) / 4096 * 4096));
      std::memset(x, 0x3c, rows * f.d * size);
      std::memset(y, 0, rows * f.d * size);
      const PatchCall call{&width, dtype, rows, {x, 0, f.d}, {y, 0, f.d}, scale.data(), nullptr, nullptr};
      Floats scratch(unit.scratch_floats(call));
      std::vector<double> times, copies;
      const int64_t repeats = std::max<int64_t>(1, (1 << 18) / (rows * f.d));
      for (const double stop = now() + seconds; now() < stop;) {
        double start = now();
        for (int64_t i = 0; i < repeats; ++i) unit.patch(call, 0, rows, scratch.data());
        times.push_back((now() - start) / repeats / rows);
        start = now();
        for (int64_t i = 0; i < repeats; ++i) {
          std::memcpy(y, x, rows * f.d * size);
          asm volatile("" ::: "memory");
        }
        copies.push_back((now() - start) / repeats / rows);
      }
      const double least = *std::min_element(times.begin(), times.end());
      std::printf("  %s %5ld KiB  least %7.3f us/row %.3f ns/element, median %7.3f us/row, %5.2f x memcpy\n",
                  size == 4 ? "fp32" : "bf16", long(2 * rows * f.d * size >> 10), least * 1e6, least / f.d * 1e9,
                  median(times) * 1e6, least / *std::min_element(copies.begin(), copies.end()));
      std::free(x);
      std::free(y);
    }
}

int main(int count, char** arguments) {
  std::mt19937 random(0);
  int failures = 0, checked = 0;
  for (const Factor& f : read_factors()) {
    if (count > 1) {
      time_rows(f, std::atof(arguments[1]));
      continue;
    }
    failures += check(f, random);
    ++checked;
  }
  if (count == 1) std::printf("%d widths, %d failures\n", checked, failures);
  return failures || (count == 1 && !checked);
}
