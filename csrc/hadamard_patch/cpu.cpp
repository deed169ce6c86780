#include "cpu.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "width.h"

namespace linearpatch::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::detail::from;
using torch::stable::detail::to;
using Optional = std::optional<Tensor>;

constexpr int64_t kElementsPerThread = 65536;  // about 20 us: less is not worth waking a thread for

[[noreturn]] void refuse(const std::string& message) { throw std::runtime_error(message); }

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

template <size_t arguments>
Tensor call(const char* name, std::array<StableIValue, arguments> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor empty_contiguous(const Tensor& like) {
  const auto sizes = like.sizes();
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t dtype;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Aligned to a cache line, grown when it must be, given back with its thread.
struct Buffer {
  float* data = nullptr;
  int64_t size = 0;
  float* at_least(int64_t floats) {
    if (floats > size) {
      std::free(data);
      size = (floats + 1023) / 1024 * 1024;
      data = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
      if (!data) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
  ~Buffer() { std::free(data); }
};
thread_local Buffer scratch, operands;

// --- what a call works on ---

std::optional<Dtype> kernel_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: return std::nullopt;
  }
}

bool floating(const Tensor& t) { return kernel_dtype(t) || t.scalar_type() == ScalarType::Double; }

std::string described(const Tensor& t) {
  return (t.is_cpu() ? "" : "another device's ") + std::string(torch::headeronly::toString(t.scalar_type())) + " " + shape_of(t);
}

void check_vector(const char* name, const Tensor& v, int64_t d) {
  if (v.dim() != 1 || v.size(0) != d || !floating(v) || !v.is_cpu())
    refuse(std::string(name) + " must be floating [" + std::to_string(d) + "] as x's last dimension, not " + described(v));
}

// What hadamard_patch/reference.py checks, in its words.
void check_operands(const Tensor& x, const Tensor& scale, const Optional& pre, const Optional& post, const Optional& down,
                    const Optional& up) {
  if (x.dim() == 0 || !floating(x)) refuse("hadamard_patch needs a floating x [..., d], not " + described(x));
  const int64_t d = x.size(x.dim() - 1);
  check_vector("scale", scale, d);
  if (pre) check_vector("pre_scale", *pre, d);
  if (post) check_vector("post_scale", *post, d);
  if (bool(down) != bool(up)) refuse("down and up belong together: give both or neither");
  if (!down) return;
  const bool fit = down->dim() == 2 && up->dim() == 2 && down->size(0) == d && up->size(1) == d &&
                   down->size(1) == up->size(0) && floating(*down) && floating(*up) && down->is_cpu() && up->is_cpu();
  const std::string width = std::to_string(d);
  if (!fit)
    refuse("down and up must be floating [" + width + ", r] and [r, " + width + "], not " + described(*down) + " and " +
           described(*up));
}

// Which matrix belongs to a width is number theory, and stays in Python: asked once for each width.
const Width& width_of(int64_t d) {
  if (const Width* known = find_width(d)) return *known;
  const Tensor h = torch::stable::contiguous(call<1>("linearpatch::paley_matrix", {from(d)}));
  if (h.dim() != 2 || h.size(0) != h.size(1) || h.size(0) < 1 || d % h.size(0) || h.scalar_type() != ScalarType::Char)
    refuse("linearpatch::paley_matrix(" + std::to_string(d) + ") must be int8 [m, m] with an m that divides it");
  // The order m 2^k is the largest that divides d, so k is.
  const int64_t m = h.size(0), inner = d / m & -(d / m);
  return add_width(d, m, inner, static_cast<const int8_t*>(h.const_data_ptr()));
}

// v [d] in float32 at `out`, times a factor, and folded where it is to be a scale.
void widen_vector(const KernelTable& unit, const Tensor& v, float factor, bool fold, float* out) {
  const int64_t d = v.size(0);
  const Tensor values = d > 1 && v.stride(0) != 1 ? torch::stable::contiguous(v) : v;
  if (const auto dtype = kernel_dtype(values)) return unit.widen(values.const_data_ptr(), *dtype, factor, fold, out, d);
  std::vector<float> narrowed(d);
  std::copy_n(static_cast<const double*>(values.const_data_ptr()), d, narrowed.begin());
  unit.widen(narrowed.data(), Dtype::float32, factor, fold, out, d);
}

// The leading dimensions of x and y as at most two strides in common, or none if they take more.
struct Leading {
  int64_t rows = 1, run = 1;
  std::array<int64_t, 2> outer{}, inner{};
};

std::optional<Leading> leading_dimensions(const Tensor& x, const Tensor& y) {
  struct Dimension {
    int64_t size;
    std::array<int64_t, 2> stride;
  };
  std::vector<Dimension> merged;
  Leading result;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    const Dimension next{x.size(i), {x.stride(i), y.stride(i)}};
    result.rows *= next.size;
    if (next.size == 1) continue;
    const auto continues = [&](int t) { return merged.back().stride[t] == next.stride[t] * next.size; };
    if (!merged.empty() && continues(0) && continues(1))
      merged.back() = {merged.back().size * next.size, next.stride};
    else
      merged.push_back(next);
  }
  if (merged.size() > 2) return std::nullopt;
  result.run = std::max<int64_t>(result.rows, 1);
  if (merged.size() == 2) result.outer = merged[0].stride;
  if (!merged.empty()) result.inner = merged.back().stride, result.run = std::max<int64_t>(merged.back().size, 1);
  return result;
}

bool rows_are_contiguous(const Tensor& t) { return t.size(t.dim() - 1) < 2 || t.stride(t.dim() - 1) == 1; }

// First and last byte that a tensor touches.
std::pair<const char*, const char*> extent(const Tensor& t) {
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += std::max<int64_t>(t.size(i) - 1, 0) * t.stride(i);
  const char* const data = static_cast<const char*>(t.const_data_ptr());
  return {data, data + last * t.element_size()};
}

// Whether y can be written row by row while x is read: apart from each other, or the very same elements.
bool safe_together(const Tensor& x, const Tensor& y) {
  const auto [x_first, x_last] = extent(x);
  const auto [y_first, y_last] = extent(y);
  if (x_last < y_first || y_last < x_first) return true;
  const auto strides = x.strides(), other = y.strides();
  return x_first == y_first && std::equal(strides.begin(), strides.end(), other.begin());
}

// --- the operators ---

void patch_into(const Tensor& x, const Tensor& scale, const Optional& pre, const Optional& post, const Tensor& y) {
  const int64_t d = x.size(x.dim() - 1);
  const Width& width = width_of(d);
  const KernelTable& unit = kernels(width);
  const auto dtype = *kernel_dtype(x);
  if (!rows_are_contiguous(x)) return patch_into(torch::stable::contiguous(x), scale, pre, post, y);
  const auto leading = leading_dimensions(x, y);
  if (!leading || !rows_are_contiguous(y) || !safe_together(x, y)) {
    const Tensor apart = empty_contiguous(x);
    patch_into(leading ? x : torch::stable::contiguous(x), scale, pre, post, apart);
    torch::stable::copy_(const_cast<Tensor&>(y), apart);
    return;
  }

  constexpr int64_t beyond = 16;  // a kernel may read a vector more than a row of scales
  float* const vectors = operands.at_least(3 * (d + beyond));
  float* const pre_vector = vectors + d + beyond;
  float* const post_vector = pre_vector + d + beyond;
  widen_vector(unit, scale, 1.0f / static_cast<float>(width.m * width.inner), true, vectors);
  if (pre) widen_vector(unit, *pre, 1.0f, false, pre_vector);
  if (post) widen_vector(unit, *post, 1.0f, false, post_vector);

  const PatchCall call{&width,
                       dtype,
                       leading->run,
                       {const_cast<void*>(x.const_data_ptr()), leading->outer[0], leading->inner[0]},
                       {y.mutable_data_ptr(), leading->outer[1], leading->inner[1]},
                       vectors,
                       pre ? pre_vector : nullptr,
                       post ? post_vector : nullptr};
  const int64_t floats = unit.scratch_floats(call), rows_per_thread = std::max<int64_t>(1, kElementsPerThread / d);
  if (leading->rows <= rows_per_thread) return unit.patch(call, 0, leading->rows, scratch.at_least(floats));
  torch::stable::parallel_for(0, leading->rows, rows_per_thread, [&](int64_t begin, int64_t end) {
    unit.patch(call, begin, end, scratch.at_least(floats));
  });
}

}  // namespace

Tensor hadamard_patch(Tensor x, Tensor scale, Optional pre_scale, Optional post_scale, Optional down, Optional up) {
  check_operands(x, scale, pre_scale, post_scale, down, up);
  if (!kernel_dtype(x) || down || up)
    return call<6>("linearpatch::hadamard_patch_reference",
                   {from(x), from(scale), from(pre_scale), from(post_scale), from(down), from(up)});
  const Tensor y = empty_contiguous(x);
  patch_into(x, scale, pre_scale, post_scale, y);
  return y;
}

void hadamard_patch_out(Tensor x, Tensor scale, Optional pre_scale, Optional post_scale, Optional down, Optional up,
                        Tensor out) {
  check_operands(x, scale, pre_scale, post_scale, down, up);
  const auto sizes = x.sizes(), out_sizes = out.sizes();
  if (sizes.size() != out_sizes.size() || !std::equal(sizes.begin(), sizes.end(), out_sizes.begin()) ||
      x.scalar_type() != out.scalar_type())
    refuse("out must be of x's type and shape " + shape_of(x) + ", not " + torch::headeronly::toString(out.scalar_type()) +
           " " + shape_of(out));
  for (int64_t i = 0; i < out.dim(); ++i)
    if (out.size(i) > 1 && out.stride(i) == 0) refuse("out must have a place of its own for every element");
  if (kernel_dtype(x) && !down && !up) return patch_into(x, scale, pre_scale, post_scale, out);
  torch::stable::copy_(out, hadamard_patch(x, scale, pre_scale, post_scale, down, up));
}

}  // namespace linearpatch::cpu
