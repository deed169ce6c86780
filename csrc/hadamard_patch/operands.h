// What the operators on every device ask of their operands. linearpatch_kernels/ops/hadamard_patch/reference.py asks the same
// in words: the Python functions call it where an operator has raised.
#pragma once

#include "../common/memory.h"
#include "../common/tensors.h"

namespace linearpatch {

inline void check_vector(const char* name, const Tensor& v, int64_t d, const DeviceOf& device) {
  check_operand(v.dim() == 1 && v.size(0) == d && floating(v) && device.has(v), name, v);
}

inline void check_like(const char* name, const Tensor& t, const Tensor& x) {
  const auto sizes = t.sizes(), wanted = x.sizes();
  const bool shaped = sizes.size() == wanted.size() && std::equal(sizes.begin(), sizes.end(), wanted.begin());
  check_operand(shaped && t.scalar_type() == x.scalar_type() && DeviceOf(x).has(t), name, t);
}

inline void check_operands(const Tensor& x, const Tensor& scale, const Optional& pre, const Optional& post, const Optional& down,
                           const Optional& up) {
  check_operand(x.dim() > 0 && floating(x) && x.size(x.dim() - 1) > 0, "x", x);
  const int64_t d = x.size(x.dim() - 1);
  const DeviceOf device(x);
  check_vector("scale", scale, d, device);
  if (pre) check_vector("pre_scale", *pre, d, device);
  if (post) check_vector("post_scale", *post, d, device);
  if (bool(down) != bool(up)) refuse("one of down and up is there without the other");
  if (!down) return;
  check_operand(down->dim() == 2 && down->size(0) == d && floating(*down) && device.has(*down), "down", *down);
  check_operand(up->dim() == 2 && up->size(0) == down->size(1) && up->size(1) == d && floating(*up) && device.has(*up), "up", *up);
}

inline void check_norm_operands(const Tensor& x, const Tensor& residual, const Tensor& norm_weight) {
  check_like("residual", residual, x);
  check_vector("norm_weight", norm_weight, x.size(x.dim() - 1), DeviceOf(x));
}

// Of all operands, `out` may share memory with x alone.
inline void check_out(const Tensor& out, const Tensor& x, const Tensor& scale, const Optional& pre, const Optional& post,
                      const Optional& down, const Optional& up) {
  check_like("out", out, x);
  if (out.numel() == 0) return;
  if (!steps_are_nested(out) && share_memory(out, std::nullopt)) refuse("out has two elements in one place");
  const Extent written = extent(out);
  const auto check = [&](const char* name, const Tensor& other) {
    if (!apart(written, other) && share_memory(out, other)) refuse(std::string("out shares memory with ") + name);
  };
  check("scale", scale);
  if (pre) check("pre_scale", *pre);
  if (post) check("post_scale", *post);
  if (down) check("down", *down);
  if (up) check("up", *up);
}

}  // namespace linearpatch
