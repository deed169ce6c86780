// The kernel units alone, without torch: every width given, in every type, with optional operands, against float64.
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

#include "../../../csrc/hadamard_patch/cpu/kernel_table.h"

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

static double half_to_double(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

static double bfloat_to_double(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float v;
  std::memcpy(&v, &wide, 4);
  return v;
}

static double to_double(Dtype dtype, uint16_t bits) {
  return dtype == Dtype::float16 ? half_to_double(bits) : bfloat_to_double(bits);
}

static uint16_t nearest(Dtype dtype, float v) {  // by search: slow and plainly right
  uint16_t low = 0, high = dtype == Dtype::float16 ? 0x7bff : 0x7f7f;
  while (low < high) {
    const uint16_t middle = static_cast<uint16_t>((low + high + 1) / 2);
    if (to_double(dtype, middle) <= std::fabs(v))
      low = middle;
    else
      high = static_cast<uint16_t>(middle - 1);
  }
  return static_cast<uint16_t>(low | (v < 0 ? 0x8000 : 0));
}

// Rows of one type with a gap after each.
struct Matrix {
  static constexpr int64_t gap = 5;
  Matrix(Dtype dtype, int64_t rows, int64_t d, std::mt19937& random)
      : dtype(dtype), rows(rows), d(d), size(dtype == Dtype::float32 ? 4 : 2), bytes(rows * stride() * size) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows * stride(); ++i) {
      const float v = normal(random);
      const uint16_t narrow = size == 4 ? 0 : nearest(dtype, v);
      size == 4 ? std::memcpy(&bytes[i * 4], &v, 4) : std::memcpy(&bytes[i * 2], &narrow, 2);
    }
  }
  int64_t stride() const { return d + gap; }
  Rows view() { return {bytes.data(), 2 * stride(), stride()}; }  // as runs of two rows
  std::vector<double> row(int64_t r) const {
    std::vector<double> values(d);
    for (int64_t i = 0; i < d; ++i) {
      const char* const p = &bytes[(r * stride() + i) * size];
      float wide;
      uint16_t narrow;
      if (size == 4)
        std::memcpy(&wide, p, 4), values[i] = wide;
      else
        std::memcpy(&narrow, p, 2), values[i] = to_double(dtype, narrow);
    }
    return values;
  }
  bool gaps_are(const Matrix& other) const {
    for (int64_t r = 0; r < rows; ++r) {
      const size_t at = (r * stride() + d) * size;
      if (std::memcmp(&bytes[at], &other.bytes[at], gap * size)) return false;
    }
    return true;
  }
  Dtype dtype;
  int64_t rows, d, size;
  std::vector<char> bytes;
};

struct Checker {
  const Factor& f;
  std::mt19937& random;
  const Width& width = add_width(f.d, f.m, f.inner, f.h.data());
  const KernelTable& unit = kernels(width);
  const double norm = 1.0 / static_cast<double>(f.m * f.inner);
  int failures = 0;

  Floats vector(int64_t count) {
    std::normal_distribution<float> normal;
    Floats v(count);
    for (float& a : v) a = normal(random);
    return v;
  }

  // [d, ranks], zeros beyond the rank, of a size that leaves numbers of about 1.
  Floats padded(int64_t rank, int64_t ranks) {
    Floats v = vector(f.d * ranks);
    const float factor = 1 / std::sqrt(static_cast<float>(f.d));
    for (int64_t i = 0; i < f.d * ranks; ++i) v[i] *= i % ranks < rank ? factor : 0;
    return v;
  }

  PatchCall call_of(Dtype dtype, Matrix& x, const Floats& scale) {
    PatchCall call{};
    call.width = &width;
    call.dtype = dtype;
    call.run = 2;
    call.x = x.view();
    call.scale = scale.data();
    return call;
  }

  void compare(const std::vector<double>& expected, const std::vector<double>& result, double relative, const char* what,
               Dtype dtype, int options) {
    double worst = 0, largest = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      largest = std::max(largest, std::fabs(expected[i]));
      const double error = std::fabs(expected[i] - result[i]);
      if (!(error <= worst)) worst = error;
    }
    if (worst <= largest * relative) return;
    ++failures;
    std::printf("d %ld (m %ld) %ld lanes dtype %d options %d: %s is off by %.2e of %.2e\n", long(f.d), long(f.m), long(unit.lanes),
                int(dtype), options, what, worst, largest);
  }

  // y += (x @ down) @ up
  void add_low_rank(const std::vector<double>& x, const Floats& down, int64_t ranks, const Floats& up, int64_t rank,
                    std::vector<double>& y) {
    for (int64_t k = 0; k < rank; ++k) {
      double t = 0;
      for (int64_t i = 0; i < f.d; ++i) t += x[i] * down[i * ranks + k];
      for (int64_t i = 0; i < f.d; ++i) y[i] += t * up[k * f.d + i];
    }
  }

  std::vector<double> patched(std::vector<double> x, const Floats& scale, const float* pre, const float* post) {
    for (int64_t i = 0; i < f.d; ++i) x[i] *= pre ? pre[i] : 1;
    x = transform(f, x, false);
    for (int64_t i = 0; i < f.d; ++i) x[i] *= scale[i] * norm;
    x = transform(f, x, true);
    for (int64_t i = 0; i < f.d; ++i) x[i] *= post ? post[i] : 1;
    return x;
  }

  void patch(Dtype dtype, int options) {
    const bool with_pre = options & 1, with_post = options & 2, in_place = options & 4, with_rank = options & 8,
               with_norm = options & 16;
    const int64_t rows = with_rank ? 11 : 3, rank = 3, ranks = (rank + unit.lanes - 1) / unit.lanes * unit.lanes;
    const double relative = dtype == Dtype::float32 ? 3e-6 : dtype == Dtype::float16 ? 6e-4 : 4.5e-3;
    Matrix x(dtype, rows, f.d, random), y(dtype, rows, f.d, random), residual(dtype, rows, f.d, random),
        normed(dtype, rows, f.d, random);
    const Matrix before = x, untouched = in_place ? x : y;
    const Floats scale = vector(f.d), pre = vector(f.d), post = vector(f.d), weight = vector(f.d), up = vector(rank * f.d);
    const Floats down = padded(rank, ranks);
    Floats prepared(f.d + 16);
    unit.widen(scale.data(), Dtype::float32, static_cast<float>(norm), true, prepared.data(), f.d);

    PatchCall call = call_of(dtype, x, prepared);
    call.y = in_place ? x.view() : y.view();
    call.pre = with_pre ? pre.data() : nullptr;
    call.post = with_post ? post.data() : nullptr;
    if (with_pre) call.scale = nullptr, call.unfolded = {scale.data(), Dtype::float32, static_cast<float>(norm)};
    if (with_rank) call.low_rank = {rank, ranks, down.data(), up.data(), Dtype::float32, Dtype::float32};
    if (with_norm) call.residual = residual.view(), call.normed = normed.view(), call.norm_weight = weight.data();
    call.eps = 0.25f;
    Floats scratch(unit.patch_scratch(call));
    unit.patch(call, 0, rows, scratch.data());

    const Matrix& result = in_place ? x : y;
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> row = before.row(r);
      const std::vector<double> other = residual.row(r);
      for (int64_t i = 0; i < f.d; ++i) row[i] += with_norm ? other[i] : 0;
      std::vector<double> expected = patched(row, scale, call.pre, call.post);
      if (with_rank) add_low_rank(row, down, ranks, up, rank, expected);
      compare(expected, result.row(r), relative, "y", dtype, options);
      if (!with_norm) continue;
      double square = 0;
      for (double v : expected) square += v * v / static_cast<double>(f.d);
      for (int64_t i = 0; i < f.d; ++i) expected[i] *= weight[i] / std::sqrt(square + call.eps);
      compare(expected, normed.row(r), relative, "the norm", dtype, options);
    }
    if (result.gaps_are(untouched)) return;
    ++failures;
    std::printf("d %ld (m %ld) %ld lanes dtype %d options %d: wrote outside\n", long(f.d), long(f.m), long(unit.lanes), int(dtype), options);
  }

  void gradients(Dtype dtype, int options) {
    const bool want_dx = options & 1, want_scale = options & 2, want_pre = options & 4, want_post = options & 8,
               with_rank = options & 16;
    const int64_t rows = 19, rank = 3, ranks = (rank + unit.lanes - 1) / unit.lanes * unit.lanes;
    const double relative = dtype == Dtype::float32 ? 3e-6 : dtype == Dtype::float16 ? 6e-4 : 4.5e-3;
    Matrix x(dtype, rows, f.d, random), grad(dtype, rows, f.d, random), dx(dtype, rows, f.d, random);
    const Floats scale = vector(f.d), pre = vector(f.d), post = vector(f.d);
    Floats prepared(f.d + 16), dscale(f.d), dpre(f.d), dpost(f.d);
    unit.widen(scale.data(), Dtype::float32, static_cast<float>(norm), false, prepared.data(), f.d);

    PatchCall call = call_of(dtype, x, prepared);
    call.grad = grad.view();
    if (want_dx) call.y = dx.view();
    call.pre = want_pre ? pre.data() : nullptr;
    call.post = want_post ? post.data() : nullptr;
    const Floats down = vector(rank * f.d);  // transposed, as up is
    const Floats up = padded(rank, ranks);
    if (with_rank) call.low_rank = {rank, ranks, up.data(), down.data(), Dtype::float32, Dtype::float32};
    const GradientSums sums{want_scale ? dscale.data() : nullptr, want_pre ? dpre.data() : nullptr,
                            want_post ? dpost.data() : nullptr};
    Floats scratch(unit.gradient_scratch(call, sums));
    unit.gradients(call, sums, 0, rows, scratch.data());

    std::vector<double> expected_scale(f.d), expected_pre(f.d), expected_post(f.d);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> z = x.row(r), dz = grad.row(r);
      const std::vector<double> x_row = z, dy = dz;
      for (int64_t i = 0; i < f.d; ++i) z[i] *= want_pre ? pre[i] : 1, dz[i] *= want_post ? post[i] : 1;
      std::vector<double> u = transform(f, z, false), a = transform(f, dz, false);
      for (int64_t i = 0; i < f.d; ++i) {
        expected_scale[i] += a[i] * u[i];  // without the norm, which the caller puts in
        u[i] *= scale[i] * norm;
        a[i] *= scale[i] * norm;
      }
      u = transform(f, u, true);
      a = transform(f, a, true);
      for (int64_t i = 0; i < f.d; ++i) {
        expected_pre[i] += a[i] * x_row[i];
        expected_post[i] += u[i] * dy[i];
        a[i] *= want_pre ? pre[i] : 1;
      }
      if (with_rank) add_low_rank(dy, up, ranks, down, rank, a);
      if (want_dx) compare(a, dx.row(r), relative, "dx", dtype, options);
    }
    const auto doubles = [](const Floats& v) { return std::vector<double>(v.begin(), v.end()); };
    if (want_scale) compare(expected_scale, doubles(dscale), 3e-6, "dscale", dtype, options);
    if (want_pre) compare(expected_pre, doubles(dpre), 3e-6, "dpre", dtype, options);
    if (want_post) compare(expected_post, doubles(dpost), 3e-6, "dpost", dtype, options);
  }

  int all() {
    const bool wide = f.d > 2048;  // the float64 side takes its time
    for (const Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
      for (const int options : {0, 3, 4, 7, 8, 16, 27})
        if (!wide || options == 4 || options == 27) patch(dtype, options);
      for (const int options : {3, 15, 19, 31})
        if (!wide || (options == 31 && dtype != Dtype::float16)) gradients(dtype, options);
    }
    return failures;
  }
};

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
  const Floats scale(f.d + 16, 1.0f / static_cast<float>(f.m * f.inner));
  std::printf("%ld (m %ld) %ld lanes\n", long(f.d), long(f.m), long(unit.lanes));
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16})
    for (const int64_t bytes : {int64_t{64} << 10, int64_t{16} << 20}) {
      const int64_t size = dtype == Dtype::float32 ? 4 : 2, rows = std::max<int64_t>(1, bytes / (2 * f.d * size));
      char* x = static_cast<char*>(std::aligned_alloc(4096, (rows * f.d * size + 4095) / 4096 * 4096));
      char* y = static_cast<char*>(std::aligned_alloc(4096, (rows * f.d * size + 4095) / 4096 * 4096));
      std::memset(x, 0x3c, rows * f.d * size);
      std::memset(y, 0, rows * f.d * size);
      PatchCall call{};
      call.width = &width;
      call.dtype = dtype;
      call.run = rows;
      call.x = {x, 0, f.d};
      call.y = {y, 0, f.d};
      call.scale = scale.data();
      Floats scratch(unit.patch_scratch(call));
      std::vector<double> times, copies;
      const int64_t repeats = std::max<int64_t>(1, (1 << 18) / (rows * f.d));
      for (const double stop = now() + seconds; now() < stop;) {
        double start = now();
        for (int64_t i = 0; i < repeats; ++i) unit.patch(call, 0, rows, scratch.data());
        times.push_back((now() - start) / static_cast<double>(repeats * rows));
        start = now();
        for (int64_t i = 0; i < repeats; ++i) {
          std::memcpy(y, x, rows * f.d * size);
          asm volatile("" ::: "memory");
        }
        copies.push_back((now() - start) / static_cast<double>(repeats * rows));
      }
      const double least = *std::min_element(times.begin(), times.end());
      std::printf("  %s %5ld KiB  least %7.3f us/row %.3f ns/element, median %7.3f us/row, %5.2f x memcpy\n",
                  size == 4 ? "fp32" : "bf16", long(2 * rows * f.d * size >> 10), least * 1e6,
                  least / static_cast<double>(f.d) * 1e9, median(times) * 1e6,
                  least / *std::min_element(copies.begin(), copies.end()));
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
    failures += Checker{f, random}.all();
    ++checked;
  }
  if (count == 1) std::printf("%d widths, %d failures\n", checked, failures);
  return failures || (count == 1 && !checked);
}
