// A call that the kernels do not cover (float64, a width without vectors of eight) goes to the reference through the
// dispatcher.
#include "../operators.h"

#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../operands.h"
#include "../width.h"
#include "kernels.h"

namespace linearpatch::cuda {
namespace {

using torch::stable::detail::from;

constexpr int64_t kVector = 16;  // bytes

// --- what a call works on ---

const Width& width_of(const Tensor& x) {
  const int64_t d = x.size(x.dim() - 1);
  if (const Width* known = find_width(d)) return *known;
  const Tensor h = torch::stable::contiguous(call<1>(LINEARPATCH_OPERATOR("paley_matrix"), {from(d)})[0]);
  const int64_t m = h.size(0), inner = d / m & -(d / m);
  return add_width(d, m, inner, static_cast<const int8_t*>(h.const_data_ptr()));
}

// The signs of an H_m without a program, on a device: made at their first use, kept as long as the process. Not while a
// graph is captured: their copy waits for the host, and their memory would be the graph's.
struct Signs {
  Tensor there, back;
};

const Signs* signs_on(const Width& width, const Tensor& x, const Place& place) {
  if (!width.codes) return nullptr;
  static std::mutex guard;
  static auto* const all = new std::map<std::pair<int64_t, int32_t>, Signs>;
  const std::pair key(width.d, x.get_device_index());
  const std::lock_guard lock(guard);
  if (const auto found = all->find(key); found != all->end()) return &found->second;
  if (captures(place.stream))
    refuse("hadamard_patch at width " + std::to_string(width.d) + " needs a table that is not on this GPU yet: " +
           "call it once, on any rows, before a CUDA graph is captured");
  const auto there = [&](bool transposed) {
    const std::vector<uint32_t> words = packed_signs(width, transposed);
    const Tensor host = torch::stable::empty({static_cast<int64_t>(words.size())}, ScalarType::Int, std::nullopt,
                                             torch::stable::Device(torch::headeronly::DeviceType::CPU));
    std::memcpy(host.mutable_data_ptr(), words.data(), words.size() * sizeof(uint32_t));
    return torch::stable::to(host, x.device());
  };
  return &all->emplace(key, Signs{there(true), there(false)}).first->second;
}

template <class Call>
void give_signs(Call& call, const Signs* signs) {
  if (!signs) return;
  call.signs_there = static_cast<const uint32_t*>(signs->there.const_data_ptr());
  call.signs_back = static_cast<const uint32_t*>(signs->back.const_data_ptr());
}

bool on_vectors(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kVector == 0; }

// v contiguous, aligned, and of a type that the kernels read.
Optional vector(const Optional& v) {
  if (!v || (kernel_dtype(*v) && v->is_contiguous() && on_vectors(*v))) return v;
  const Tensor known = kernel_dtype(*v) ? *v : torch::stable::to(*v, ScalarType::Float);
  const Tensor together = torch::stable::contiguous(known);
  return on_vectors(together) ? together : torch::stable::clone(together);
}

Numbers numbers(const Optional& v) {
  return v ? Numbers{static_cast<const char*>(v->const_data_ptr()), *kernel_dtype(*v)} : Numbers{};
}

// Bytes from row to row, if all leading dimensions have one stride in common and every row is made of whole vectors.
std::optional<int64_t> row_stride(const Tensor& t) {
  const int64_t d = t.size(t.dim() - 1), bytes = t.element_size();
  if (d > 1 && t.stride(t.dim() - 1) != 1) return std::nullopt;
  int64_t stride = d, next = 0;
  bool first = true;
  for (int64_t i = t.dim() - 1; i-- > 0;) {
    if (t.size(i) == 1) continue;
    if (first)
      stride = t.stride(i);
    else if (t.stride(i) != next)
      return std::nullopt;
    next = t.stride(i) * t.size(i);
    first = false;
  }
  if (stride * bytes % kVector || !on_vectors(t)) return std::nullopt;
  return stride * bytes;
}

Tensor empty_contiguous(const Tensor& like, ScalarType dtype) { return torch::stable::new_empty(like, like.sizes(), dtype); }
Tensor empty_contiguous(const Tensor& like) { return empty_contiguous(like, like.scalar_type()); }

// The same rows where the kernels can read them.
Tensor readable(const Tensor& t) {
  if (row_stride(t)) return t;
  const Tensor rows = torch::stable::contiguous(t);
  return row_stride(rows) ? rows : torch::stable::clone(rows);
}

int64_t row_count(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// --- the low-rank term: cuBLAS ---

// In float32. The variant with `out` is none that autocast would narrow.
Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor result = torch::stable::new_empty(a, {a.size(0), b.size(1)}, ScalarType::Float);
  return call<3>("aten::mm", {from(a), from(b), from(result)}, 1, "out")[0];
}

// y += (x @ down) @ up, for a y in float32.
Tensor with_low_rank(const Tensor& y, const Tensor& x, const Tensor& down, const Tensor& up) {
  const auto single = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Float); };
  const int64_t d = x.size(x.dim() - 1);
  const Tensor rows = torch::stable::reshape(single(x), {row_count(x), d});
  const Tensor term = product(product(rows, single(down)), single(up));
  return torch::stable::subtract(y, torch::stable::reshape(term, y.sizes()), -1.0);
}

Optional transposed(const Optional& matrix) {
  return matrix ? Optional(torch::stable::transpose(*matrix, 0, 1)) : std::nullopt;
}

// --- the operators ---

struct Operands {
  Tensor scale;
  Optional pre, post;
};

// y = the patch of x, in y's dtype, without the low-rank term; with a residual and a norm if they are given. Both are rows
// that the kernels can take. False where there is no kernel for this.
bool patch_rows_into(const Tensor& x, const Operands& given, const Tensor& y, const Optional& residual = {},
                     const Optional& weight = {}, const Optional& normed = {}, double eps = 0) {
  const Place place(x.get_device_index());
  const Width& width = width_of(x);
  PatchRows call{};
  call.rows = row_count(x);
  call.in = *kernel_dtype(x);
  call.out = *kernel_dtype(y);
  call.channels = given.pre || given.post;
  call.fused = bool(normed);
  const PatchLaunch launch = plan_patch(call, width, place.device);
  if (!launch.possible) return false;
  if (call.rows == 0) return true;
  call.x = static_cast<const char*>(x.const_data_ptr());
  call.y = static_cast<char*>(y.mutable_data_ptr());
  call.x_stride = *row_stride(x);  // there is one where a row is possible: it is made of vectors then
  call.y_stride = *row_stride(y);
  if (call.fused) {
    call.residual = static_cast<const char*>(residual->const_data_ptr());
    call.residual_stride = *row_stride(*residual);
    call.normed = static_cast<char*>(normed->mutable_data_ptr());
    call.normed_stride = *row_stride(*normed);
    call.eps = static_cast<float>(eps);
  }
  give_signs(call, signs_on(width, x, place));
  const Optional scale = vector(given.scale), pre = vector(given.pre), post = vector(given.post), gain = vector(weight);
  call.scale = numbers(scale);
  call.pre = numbers(pre);
  call.post = numbers(post);
  call.norm_weight = numbers(gain);
  const auto fixed = call.shape.m == 1 ? launch_powers : launch_factors;
  const auto start = launch.warp_rows ? launch_warp_rows : launch.fixed ? fixed : launch_staged;
  check(start(call, launch, place.stream));
  return true;
}

// Into an `out` of any strides, which may be x itself.
bool patch_into(const Tensor& x, const Operands& given, const Optional& down, const Optional& up, Tensor out) {
  const bool narrow = out.scalar_type() != ScalarType::Float, low_rank = down && down->size(1) > 0;
  const Tensor rows = readable(x);
  if (!low_rank && row_stride(out) && safe_together(rows, out)) return patch_rows_into(rows, given, out);
  Tensor y = empty_contiguous(x, low_rank && narrow ? ScalarType::Float : out.scalar_type());
  if (!patch_rows_into(rows, given, y)) return false;
  torch::stable::copy_(out, low_rank ? with_low_rank(y, x, *down, *up) : y);
  return true;
}

Tensor no_gradient(const Tensor& x) { return torch::stable::new_empty(x, {0}, ScalarType::Float); }

// dx and the sums over rows, into results; those that are not wanted are left as they are.
bool gradients_into(std::array<Tensor, 4>& results, const Tensor& grad, const Tensor& x, const Operands& given,
                    const Optional& down, const Optional& up, int64_t needs) {
  const Place place(x.get_device_index());
  const Width& width = width_of(x);
  const int64_t d = width.d;
  const bool low_rank = down && down->size(1) > 0, want_dx = needs & 1;
  const Tensor rows = readable(x), grads = readable(grad);
  GradientRows call{};
  call.rows = row_count(x);
  call.in = *kernel_dtype(x);
  const Launch launch = plan_gradients(call, width, (needs >> 1 & 1) + (needs >> 2 & 1) + (needs >> 3 & 1), place.device);
  if (!launch.possible) return false;
  call.x = static_cast<const char*>(rows.const_data_ptr());
  call.grad = static_cast<const char*>(grads.const_data_ptr());
  call.x_stride = *row_stride(rows);
  call.grad_stride = *row_stride(grads);
  if (want_dx) {
    results[0] = empty_contiguous(x, low_rank ? ScalarType::Float : x.scalar_type());
    call.dx = static_cast<char*>(results[0].mutable_data_ptr());
    call.dx_stride = *row_stride(results[0]);
    call.out = *kernel_dtype(results[0]);
  }
  give_signs(call, signs_on(width, x, place));
  const Optional scale = vector(given.scale), pre = vector(given.pre), post = vector(given.post);
  call.scale = numbers(scale);
  call.pre = numbers(pre);
  call.post = numbers(post);
  const int64_t parts = parts_of(launch, call);
  std::vector<std::pair<int, Tensor>> partial;
  float** const places[] = {nullptr, &call.scale_sums, &call.pre_sums, &call.post_sums};
  for (int i = 1; i < 4; ++i) {
    if (!(needs >> i & 1)) continue;
    partial.emplace_back(i, torch::stable::new_empty(x, {parts, d}, ScalarType::Float));
    *places[i] = static_cast<float*>(partial.back().second.mutable_data_ptr());
  }
  check(launch_gradients(call, launch, place.stream));
  for (const auto& [i, sums] : partial) {
    results[i] = torch::stable::new_empty(x, {d}, ScalarType::Float);
    const float factor = i == 1 ? 1.0f / static_cast<float>(width.m * width.inner) : 1.0f;
    const PartSums sum{static_cast<const float*>(sums.const_data_ptr()), static_cast<float*>(results[i].mutable_data_ptr()),
                       parts, static_cast<int>(d), factor};
    check(launch_sum(sum, place.stream));
  }
  if (want_dx && low_rank)
    results[0] = torch::stable::to(with_low_rank(results[0], grad, *transposed(up), *transposed(down)), x.scalar_type());
  return true;
}

}  // namespace

Tensor hadamard_patch(Tensor x, Tensor scale, Optional pre_scale, Optional post_scale, Optional down, Optional up) {
  check_operands(x, scale, pre_scale, post_scale, down, up);
  if (kernel_dtype(x)) {
    const Tensor y = empty_contiguous(x);
    if (patch_into(x, {scale, pre_scale, post_scale}, down, up, y)) return y;
  }
  return call<6>(LINEARPATCH_OPERATOR("hadamard_patch_reference"),
                 {from(x), from(scale), from(pre_scale), from(post_scale), from(down), from(up)})[0];
}

void hadamard_patch_out(Tensor x, Tensor scale, Optional pre_scale, Optional post_scale, Optional down, Optional up,
                        Tensor out) {
  check_operands(x, scale, pre_scale, post_scale, down, up);
  check_out(out, x, scale, pre_scale, post_scale, down, up);
  if (kernel_dtype(x) && patch_into(x, {scale, pre_scale, post_scale}, down, up, out)) return;
  call<7>(LINEARPATCH_OPERATOR("hadamard_patch_out_reference"),
          {from(x), from(scale), from(pre_scale), from(post_scale), from(down), from(up), from(out)}, 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hadamard_patch_backward(
    Tensor grad, Tensor x, Tensor scale, Optional pre_scale, Optional post_scale, Optional down, Optional up, int64_t needs) {
  check_operands(x, scale, pre_scale, post_scale, down, up);
  check_like("grad", grad, x);
  const auto reference = [&](int64_t wanted) {
    return call<8>(LINEARPATCH_OPERATOR("hadamard_patch_backward_reference"),
                   {from(grad), from(x), from(scale), from(pre_scale), from(post_scale), from(down), from(up), from(wanted)},
                   6);
  };
  constexpr int64_t of_low_rank = 0b110000;
  needs &= 0b11 | (pre_scale ? 0b100 : 0) | (post_scale ? 0b1000 : 0) | (down ? 0b110000 : 0);
  std::array<Tensor, 4> fused{torch::stable::new_empty(x, {0}), no_gradient(x), no_gradient(x), no_gradient(x)};
  bool done = kernel_dtype(x).has_value();
  if (done && (needs & ~of_low_rank) == 1) {  // dx alone is a patch of the gradient
    const Tensor dx = empty_contiguous(x);
    done = patch_into(grad, {scale, post_scale, pre_scale}, transposed(up), transposed(down), dx);
    fused[0] = dx;
  } else if (done && needs & ~of_low_rank) {
    done = gradients_into(fused, grad, x, {scale, pre_scale, post_scale}, down, up, needs & ~of_low_rank);
  }
  if (!done) {
    const auto g = reference(needs);
    return {g[0], g[1], g[2], g[3], g[4], g[5]};
  }
  if (!(needs & of_low_rank)) return {fused[0], fused[1], fused[2], fused[3], no_gradient(x), no_gradient(x)};
  const auto g = reference(needs & of_low_rank);  // matrix products over the rows: torch's
  return {fused[0], fused[1], fused[2], fused[3], g[4], g[5]};
}

std::tuple<Tensor, Tensor> add_patch_rms_norm(Tensor x, Tensor residual, Tensor scale, Tensor norm_weight, double eps,
                                              Optional pre_scale, Optional post_scale, Optional down, Optional up) {
  check_operands(x, scale, pre_scale, post_scale, down, up);
  check_norm_operands(x, residual, norm_weight);
  const bool low_rank = down && down->size(1) > 0;
  if (kernel_dtype(x) && !low_rank) {
    const Tensor y = empty_contiguous(x), normed = empty_contiguous(x);
    if (patch_rows_into(readable(x), {scale, pre_scale, post_scale}, y, readable(residual), norm_weight, normed, eps))
      return {normed, y};
  }
  const auto results = call<9>(LINEARPATCH_OPERATOR("add_patch_rms_norm_reference"),
                               {from(x), from(residual), from(scale), from(norm_weight), from(eps), from(pre_scale),
                                from(post_scale), from(down), from(up)},
                               2);
  return {results[0], results[1]};
}

}  // namespace linearpatch::cuda
