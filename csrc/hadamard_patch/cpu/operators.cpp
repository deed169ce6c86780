#include "../operators.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "../operands.h"
#include "kernel_table.h"

namespace linearpatch::cpu {
namespace {

using torch::stable::detail::from;

// About 20 us of work: less is not worth waking a thread for.
int64_t least_rows(int64_t d) { return std::max<int64_t>(1, 65536 / d); }

// torch prints its stack where memory is not to be had. The system says so at once if it is asked first.
void check_memory(int64_t bytes) {
  if (bytes < int64_t{1} << 32) return;
  void* volatile probe = std::malloc(bytes);
  if (!probe) refuse("a result of " + std::to_string(bytes) + " bytes does not fit into memory: give fewer rows at a time");
  std::free(probe);
}

Tensor empty_contiguous(const Tensor& like) {
  static thread_local std::vector<int64_t> strides;  // kept: an allocation shows where a call takes microseconds
  const auto sizes = like.sizes();
  strides.resize(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  check_memory(like.numel() * static_cast<int64_t>(like.element_size()));
  int32_t dtype;
  AtenTensorHandle handle;
  require(aoti_torch_get_dtype(like.get(), &dtype), "aoti_torch_get_dtype");
  require(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle),
          "aoti_torch_empty_strided");
  return Tensor(handle);
}

thread_local Buffer scratch, operands;

// --- what a call works on ---

// Which matrix belongs to a width is number theory, and stays in Python: asked once for each width.
const Width& width_of(int64_t d) {
  static thread_local const Width* last = nullptr;  // no lock for the width of the call before
  if (last && last->d == d) return *last;
  if (const Width* known = find_width(d)) return *(last = known);
  const Tensor h = torch::stable::contiguous(call<1>(LINEARPATCH_OPERATOR("paley_matrix"), {from(d)})[0]);
  if (h.dim() != 2 || h.size(0) != h.size(1) || h.size(0) < 1 || d % h.size(0) || h.scalar_type() != ScalarType::Char)
    refuse(LINEARPATCH_OPERATOR("paley_matrix(") + std::to_string(d) + ") must be int8 [m, m] with an m that divides it");
  // The order m 2^k is the largest that divides d, so k is.
  const int64_t m = h.size(0), inner = d / m & -(d / m);
  return add_width(d, m, inner, static_cast<const int8_t*>(h.const_data_ptr()));
}

bool rows_are_contiguous(const Tensor& t) {
  return t.numel() == 0 || t.size(t.dim() - 1) < 2 || t.stride(t.dim() - 1) == 1;
}

// Tensors of one shape [..., d] row by row: their leading dimensions as at most two strides in common.
template <size_t count>
struct Layout {
  int64_t rows = 1, run = 1;
  std::array<int64_t, count> outer{}, inner{};
};

template <size_t count>
using Operation = std::array<const Tensor*, count>;  // pointers: the copy of a tensor is two atomic additions

template <size_t count>
std::optional<Layout<count>> common_layout(const Operation<count>& tensors) {
  struct Dimension {
    int64_t size;
    std::array<int64_t, count> stride;
  };
  for (const Tensor* t : tensors)
    if (!rows_are_contiguous(*t)) return std::nullopt;
  std::vector<Dimension> merged;
  Layout<count> layout;
  for (int64_t i = 0; i + 1 < tensors[0]->dim(); ++i) {
    Dimension next{tensors[0]->size(i), {}};
    layout.rows *= next.size;
    if (next.size == 1) continue;
    bool continues = !merged.empty();
    for (size_t t = 0; t < count; ++t) {
      next.stride[t] = tensors[t]->stride(i);
      continues = continues && merged.back().stride[t] == next.stride[t] * next.size;
    }
    if (continues)
      merged.back() = {merged.back().size * next.size, next.stride};
    else
      merged.push_back(next);
  }
  if (layout.rows && merged.size() > 2) return std::nullopt;
  layout.run = std::max<int64_t>(merged.empty() ? layout.rows : merged.back().size, 1);
  if (merged.size() > 1) layout.outer = merged[0].stride;
  if (!merged.empty()) layout.inner = merged.back().stride;
  return layout;
}

// The same after copies of the first tensors, the inputs, where it takes them; the others are contiguous already.
template <size_t count>
Layout<count> layout_with_copies(std::array<Tensor, count>& tensors, size_t inputs) {
  Operation<count> pointers;
  std::transform(tensors.begin(), tensors.end(), pointers.begin(), [](const Tensor& t) { return &t; });
  if (const auto layout = common_layout(pointers)) return *layout;
  for (size_t i = 0; i < inputs; ++i) tensors[i] = torch::stable::contiguous(tensors[i]);
  return *common_layout(pointers);
}

template <size_t count>
Rows rows(const Layout<count>& layout, const Tensor& tensor, size_t i) {
  return {const_cast<void*>(tensor.const_data_ptr()), layout.outer[i], layout.inner[i]};
}

// --- the operators ---

// The vectors of a call in float32, in this thread's memory, and its low-rank term.
class Operands {
 public:
  Operands(const Width& width, const KernelTable& unit, int64_t count) : width_(width), unit_(unit) {
    place_ = operands.at_least(count * stride());
  }

  // In float32: v as it is, or null as it is; v times a factor, folded if it is to be the patch's scale.
  const float* vector(const Optional& v) { return v ? vector(*v, 1.0f) : nullptr; }
  const float* vector(const Tensor& v, float factor, bool fold = false) {
    if (width_.d > 1 && v.stride(0) != 1) return vector(torch::stable::contiguous(v), factor, fold);
    float* const out = place_;
    place_ += stride();
    if (const auto dtype = kernel_dtype(v)) {
      unit_.widen(v.const_data_ptr(), *dtype, factor, fold, out, width_.d);
    } else {
      std::vector<float> narrowed(width_.d);
      std::copy_n(static_cast<const double*>(v.const_data_ptr()), width_.d, narrowed.begin());
      unit_.widen(narrowed.data(), Dtype::float32, factor, fold, out, width_.d);
    }
    return out;
  }

  // What the scale of a patch of so many rows is.
  void scale_of_patch(const Tensor& scale, int64_t rows, PatchCall& call) {
    if (const auto dtype = kernel_dtype(scale); rows == 1 && dtype && (width_.d == 1 || scale.stride(0) == 1))
      call.unfolded = {scale.const_data_ptr(), *dtype, norm()};
    else
      call.scale = vector(scale, norm(), true);
  }

  // The square of H's norm: the kernels' matrices have entries +-1.
  float norm() const { return 1.0f / static_cast<float>(width_.m * width_.inner); }

  LowRank low_rank(const Optional& down, const Optional& up) {
    if (!down || down->size(1) == 0) return {};
    const int64_t rank = down->size(1), ranks = (rank + unit_.lanes - 1) / unit_.lanes * unit_.lanes;
    down_ = rank == ranks ? *down : torch::stable::new_zeros(*down, {width_.d, ranks}, ScalarType::Float);
    if (rank != ranks) {
      Tensor part = torch::stable::narrow(down_, 1, 0, rank);
      torch::stable::copy_(part, *down);
    }
    down_ = readable(down_);
    up_ = readable(*up);
    return {rank, ranks, down_.const_data_ptr(), up_.const_data_ptr(), *kernel_dtype(down_), *kernel_dtype(up_)};
  }

 private:
  static constexpr int64_t beyond = 16;  // a kernel may read a vector more than a row of scales
  int64_t stride() const { return (width_.d + 2 * beyond - 1) / beyond * beyond; }
  static Tensor readable(const Tensor& t) {
    return torch::stable::contiguous(kernel_dtype(t) ? t : torch::stable::to(t, ScalarType::Float));
  }

  const Width& width_;
  const KernelTable& unit_;
  float* place_;
  Tensor down_, up_;
};

template <class Work>
void over_rows(int64_t count, int64_t d, int64_t floats, const Work& work) {
  if (count <= least_rows(d)) return work(0, count, scratch.at_least(floats));
  torch::stable::parallel_for(0, count, least_rows(d),
                              [&](int64_t begin, int64_t end) { work(begin, end, scratch.at_least(floats)); });
}

// --- the operators ---

void patch_into(const Tensor& x, const Tensor& scale, const Optional& pre, const Optional& post, const Optional& down,
                const Optional& up, const Tensor& y) {
  if (x.numel() == 0) return;
  const auto layout = common_layout<2>({&x, &y});
  if (!layout || !safe_together(x, y)) {
    const Tensor apart = empty_contiguous(x);
    patch_into(torch::stable::contiguous(x), scale, pre, post, down, up, apart);
    Tensor result = y;
    torch::stable::copy_(result, apart);
    return;
  }
  const int64_t d = x.size(x.dim() - 1);
  const Width& width = width_of(d);
  const KernelTable& unit = kernels(width);
  Operands given(width, unit, 3);
  PatchCall call{};
  call.width = &width;
  call.dtype = *kernel_dtype(x);
  call.run = layout->run;
  call.x = rows(*layout, x, 0);
  call.y = rows(*layout, y, 1);
  given.scale_of_patch(scale, layout->rows, call);
  call.pre = given.vector(pre);
  call.post = given.vector(post);
  call.low_rank = given.low_rank(down, up);
  over_rows(layout->rows, d, unit.patch_scratch(call),
            [&](int64_t begin, int64_t end, float* memory) { unit.patch(call, begin, end, memory); });
}

Optional transposed(const Optional& matrix) {
  return matrix ? Optional(torch::stable::transpose(*matrix, 0, 1)) : std::nullopt;
}

Tensor no_gradient(const Tensor& x) { return torch::stable::new_empty(x, {0}, ScalarType::Float); }

// The sums of all parts, times a factor, in float64: how they are rounded does not depend on how many parts there are.
void add_up(const float* parts, int64_t count, int64_t stride, int64_t d, double factor, float* result) {
  constexpr int64_t block = 512;
  double total[block];
  for (int64_t c = 0; c < d; c += block) {
    const int64_t length = std::min(block, d - c);
    std::fill_n(total, length, 0.0);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < length; ++k) total[k] += parts[i * stride + c + k];
    for (int64_t k = 0; k < length; ++k) result[c + k] = static_cast<float>(total[k] * factor);
  }
}

// dx, and the sums over rows. Every few rows have sums of their own, added up in their order: how many threads there are
// changes nothing.
std::array<Tensor, 4> fused_gradients(const Tensor& grad, const Tensor& x, const Tensor& scale, const Optional& pre,
                                      const Optional& post, const Optional& down, const Optional& up, int64_t needs) {
  constexpr int64_t most_parts = 64;
  const int64_t d = x.size(x.dim() - 1);
  const bool want_dx = needs & 1;
  const Width& width = width_of(d);
  const KernelTable& unit = kernels(width);
  std::array<Tensor, 4> results{want_dx ? empty_contiguous(x) : torch::stable::new_empty(x, {0})};
  for (int i = 1; i < 4; ++i)
    results[i] = torch::stable::new_empty(x, {needs >> i & 1 ? d : 0}, ScalarType::Float);

  std::array<Tensor, 3> tensors{x, grad, want_dx ? results[0] : x};
  const auto layout = layout_with_copies(tensors, want_dx ? 2 : 3);
  Operands given(width, unit, 3);
  PatchCall call{};
  call.width = &width;
  call.dtype = *kernel_dtype(x);
  call.run = layout.run;
  call.x = rows(layout, tensors[0], 0);
  call.grad = rows(layout, tensors[1], 1);
  if (want_dx) call.y = rows(layout, tensors[2], 2);
  call.scale = given.vector(scale, given.norm());
  call.pre = given.vector(pre);
  call.post = given.vector(post);
  if (want_dx) call.low_rank = given.low_rank(transposed(up), transposed(down));

  const int64_t part = std::max((layout.rows + most_parts - 1) / most_parts, least_rows(d));
  const int64_t parts = std::max<int64_t>(1, (layout.rows + part - 1) / part);
  const int64_t wanted = (needs >> 1 & 1) + (needs >> 2 & 1) + (needs >> 3 & 1), stride = (d + 15) / 16 * 16;
  Buffer memory;
  float* const sums = memory.at_least(parts * wanted * stride);
  std::fill_n(sums, parts * wanted * stride, 0.0f);
  const auto sums_of = [&](int64_t index) {
    float* place = sums + index * wanted * stride;
    const auto next = [&](int bit) { return needs >> bit & 1 ? std::exchange(place, place + stride) : nullptr; };
    float* const for_scale = next(1);
    float* const for_pre = next(2);
    return GradientSums{for_scale, for_pre, next(3)};
  };
  const int64_t floats = unit.gradient_scratch(call, sums_of(0));
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      unit.gradients(call, sums_of(i), i * part, std::min((i + 1) * part, layout.rows), scratch.at_least(floats));
  };
  parts == 1 ? work(0, 1) : torch::stable::parallel_for(0, parts, 1, work);

  const GradientSums first = sums_of(0);
  const auto add_parts = [&](const float* of_first, double factor, const Tensor& result) {
    if (of_first) add_up(of_first, parts, wanted * stride, d, factor, static_cast<float*>(result.mutable_data_ptr()));
  };
  add_parts(first.scale, given.norm(), results[1]);
  add_parts(first.pre, 1.0, results[2]);
  add_parts(first.post, 1.0, results[3]);
  return results;
}

}  // namespace

Tensor hadamard_patch(Tensor x, Tensor scale, Optional pre_scale, Optional post_scale, Optional down, Optional up) {
  check_operands(x, scale, pre_scale, post_scale, down, up);
  if (!kernel_dtype(x))
    return call<6>(LINEARPATCH_OPERATOR("hadamard_patch_reference"),
                   {from(x), from(scale), from(pre_scale), from(post_scale), from(down), from(up)})[0];
  const Tensor y = empty_contiguous(x);
  patch_into(x, scale, pre_scale, post_scale, down, up, y);
  return y;
}

void hadamard_patch_out(Tensor x, Tensor scale, Optional pre_scale, Optional post_scale, Optional down, Optional up,
                        Tensor out) {
  check_operands(x, scale, pre_scale, post_scale, down, up);
  check_out(out, x, scale, pre_scale, post_scale, down, up);
  if (kernel_dtype(x)) return patch_into(x, scale, pre_scale, post_scale, down, up, out);
  torch::stable::copy_(out, hadamard_patch(x, scale, pre_scale, post_scale, down, up));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hadamard_patch_backward(
    Tensor grad, Tensor x, Tensor scale, Optional pre_scale, Optional post_scale, Optional down, Optional up, int64_t needs) {
  check_operands(x, scale, pre_scale, post_scale, down, up);
  const auto reference = [&](int64_t wanted) {
    return call<8>(LINEARPATCH_OPERATOR("hadamard_patch_backward_reference"),
                   {from(grad), from(x), from(scale), from(pre_scale), from(post_scale), from(down), from(up), from(wanted)},
                   6);
  };
  constexpr int64_t of_low_rank = 0b110000;
  check_like("grad", grad, x);
  needs &= 0b11 | (pre_scale ? 0b100 : 0) | (post_scale ? 0b1000 : 0) | (down ? 0b110000 : 0);
  if (!kernel_dtype(x)) {
    const auto g = reference(needs);
    return {g[0], g[1], g[2], g[3], g[4], g[5]};
  }
  // Each a tensor of its own, as the schema says.
  std::array<Tensor, 4> fused{torch::stable::new_empty(x, {0}), no_gradient(x), no_gradient(x), no_gradient(x)};
  if ((needs & ~of_low_rank) == 1) {  // dx alone is a patch of the gradient
    fused[0] = empty_contiguous(x);
    patch_into(grad, scale, post_scale, pre_scale, transposed(up), transposed(down), fused[0]);
  } else if (needs & ~of_low_rank) {
    fused = fused_gradients(grad, x, scale, pre_scale, post_scale, down, up, needs);
  }
  // The gradients of down and up are matrix products over the rows: torch's.
  if (!(needs & of_low_rank)) return {fused[0], fused[1], fused[2], fused[3], no_gradient(x), no_gradient(x)};
  const auto g = reference(needs & of_low_rank);
  return {fused[0], fused[1], fused[2], fused[3], g[4], g[5]};
}

std::tuple<Tensor, Tensor> add_patch_rms_norm(Tensor x, Tensor residual, Tensor scale, Tensor norm_weight, double eps,
                                              Optional pre_scale, Optional post_scale, Optional down, Optional up) {
  check_operands(x, scale, pre_scale, post_scale, down, up);
  check_norm_operands(x, residual, norm_weight);
  const int64_t d = x.size(x.dim() - 1);
  if (!kernel_dtype(x)) {
    const auto results = call<9>(LINEARPATCH_OPERATOR("add_patch_rms_norm_reference"),
                                 {from(x), from(residual), from(scale), from(norm_weight), from(eps), from(pre_scale),
                                  from(post_scale), from(down), from(up)},
                                 2);
    return {results[0], results[1]};
  }
  std::array<Tensor, 4> tensors{x, residual, empty_contiguous(x), empty_contiguous(x)};
  const auto layout = layout_with_copies(tensors, 2);
  const Width& width = width_of(d);
  const KernelTable& unit = kernels(width);
  Operands given(width, unit, 4);
  PatchCall call{};
  call.width = &width;
  call.dtype = *kernel_dtype(x);
  call.run = layout.run;
  call.x = rows(layout, tensors[0], 0);
  call.residual = rows(layout, tensors[1], 1);
  call.y = rows(layout, tensors[2], 2);
  call.normed = rows(layout, tensors[3], 3);
  given.scale_of_patch(scale, layout.rows, call);
  call.pre = given.vector(pre_scale);
  call.post = given.vector(post_scale);
  call.low_rank = given.low_rank(down, up);
  call.norm_weight = given.vector(norm_weight, 1.0f);
  call.eps = static_cast<float>(eps);
  over_rows(layout.rows, d, unit.patch_scratch(call),
            [&](int64_t begin, int64_t end, float* memory) { unit.patch(call, begin, end, memory); });
  return {tensors[3], tensors[2]};
}

}  // namespace linearpatch::cpu
