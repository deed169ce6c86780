// Which memory tensors touch: what an operator that writes to an operand has to know of the others.
#pragma once

#include <utility>

#include "tensors.h"

namespace linearpatch {

// From the first byte that a tensor with elements touches to the one behind the last.
struct Extent {
  const char *first, *end;
};

inline Extent extent(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  const char* const data = static_cast<const char*>(t.const_data_ptr());
  return {data, data + (last + 1) * static_cast<int64_t>(t.element_size())};
}

inline bool apart(const Extent& a, const Tensor& b) {
  if (b.numel() == 0) return true;
  const Extent other = extent(b);
  return a.end <= other.first || other.end <= a.first;
}

inline bool apart(const Tensor& a, const Tensor& b) { return a.numel() == 0 || apart(extent(a), b); }

// Whether each of a tensor's steps is longer than what the shorter ones reach together. Then no two elements are one; they
// may lie apart without that.
inline bool steps_are_nested(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  const auto step = [&](size_t i) { return std::pair(strides[i], i); };
  int64_t reach = 0;
  std::pair<int64_t, size_t> taken(-1, 0);
  for (;;) {
    std::optional<size_t> next;
    for (size_t i = 0; i < sizes.size(); ++i)
      if (sizes[i] > 1 && step(i) > taken && (!next || step(i) < step(*next))) next = i;
    if (!next) return true;
    taken = step(*next);
    if (taken.first <= reach) return false;
    reach += (sizes[*next] - 1) * taken.first;
  }
}

// What the address ranges leave open, counted in Python (linearpatch_kernels/ops/overlap.py): whether a and b have a byte in
// common, or, without b, two elements of a.
inline bool share_memory(const Tensor& a, const Optional& b) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 2> stack{from(a), from(b)};
  const char* const name = LINEARPATCH_OPERATOR("share_memory");
  require(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION), name);
  return to<bool>(stack[0]);
}

// Whether two tensors of one shape and dtype are the same memory, element by element.
inline bool same_elements(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr()) return false;
  const auto sizes = a.sizes(), strides = a.strides(), other = b.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 1 && strides[i] != other[i]) return false;
  return true;
}

// Whether y can be written row by row while x is read.
inline bool safe_together(const Tensor& x, const Tensor& y) { return apart(x, y) || same_elements(x, y); }

}  // namespace linearpatch
