// Each operator is one launch, or two; linearpatch_kernels/ops/topk_kl/gpu.py makes the losses of them, and brings every operand
// into the form that is asked for here.
#include "operators.h"

#include "../../common/tensors.h"
#include "kernels.h"

namespace linearpatch::cuda {
namespace {

// The numbers of a contiguous tensor, to be read: what is asked for to be written loses its share of a lazy clone.
template <class T>
const T* numbers(const char* name, const Tensor& t, ScalarType dtype, int64_t count) {
  check_operand(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == count, name, t);
  return static_cast<const T*>(t.const_data_ptr());
}
const float* floats(const char* name, const Tensor& t, int64_t count) { return numbers<float>(name, t, ScalarType::Float, count); }
const float* floats(const char* name, const Optional& t, int64_t count) { return t ? floats(name, *t, count) : nullptr; }
const int32_t* integers(const char* name, const Tensor& t, int64_t count) { return numbers<int32_t>(name, t, ScalarType::Int, count); }

// Those that a kernel writes.
float* results(const char* name, const Tensor& t, int64_t count) {
  floats(name, t, count);
  return static_cast<float*>(t.mutable_data_ptr());
}
float* results(const char* name, const Optional& t, int64_t count) { return t ? results(name, *t, count) : nullptr; }

// Rows of 16-byte vectors; bytes from row to row.
int64_t row_stride(const char* name, const Tensor& t) {
  const int64_t bytes = t.stride(0) * t.element_size();
  const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && (t.size(0) < 2 || bytes % 16 == 0);
  check_operand(t.dim() == 2 && kernel_dtype(t) && t.size(1) % kVectorOfRow == 0 && (t.size(1) < 2 || t.stride(1) == 1) && aligned, name, t);
  return bytes;
}

int narrow(int64_t n) {
  if (n < 0 || n > INT32_MAX) refuse("a size of " + std::to_string(n) + " is more than the kernels count to");
  return static_cast<int>(n);
}

VocabularyPart part_of(const Tensor& logits, int64_t size, const Optional& bias, const Tensor& ids, const Tensor& bounds,
                       int64_t first, double temperature) {
  VocabularyPart call{};
  row_stride("logits", logits);
  check_operand(logits.scalar_type() == ScalarType::Float && size <= logits.size(1), "logits", logits);
  call.logits = static_cast<const float*>(logits.const_data_ptr());
  call.stride = logits.stride(0);
  call.tokens = narrow(ids.size(0));
  call.slots = narrow(ids.size(1));
  call.blocks = narrow(bounds.size(1)) - 1;
  call.first = narrow(first);
  call.size = narrow(size);
  check_operand(first % kVocabularyBlock == 0 && (first + size + kVocabularyBlock - 1) / kVocabularyBlock <= call.blocks, "bounds", bounds);
  call.ids = integers("ids", ids, ids.numel());
  call.bounds = integers("bounds", bounds, ids.size(0) * bounds.size(1));
  if (bias) check_operand(bias->numel() >= first + size, "bias", *bias);
  call.bias = bias ? floats("bias", *bias, bias->numel()) : nullptr;
  call.inverse_temperature = static_cast<float>(1 / temperature);
  return call;
}

void give_out(VocabularyPart& call, const char* name, const Tensor& logits, const Tensor& out) {
  row_stride(name, out);
  check_operand(out.stride(0) == logits.stride(0) && out.size(1) == logits.size(1), name, out);
  call.out = static_cast<char*>(out.mutable_data_ptr());
  call.out_dtype = *kernel_dtype(out);
}

}  // namespace

void topk_kl_teacher(Tensor teacher_ids, double temperature, Tensor ids, Tensor present, Tensor count_and_scale) {
  TeacherIds call{};
  const int64_t tokens = ids.size(0), count = ids.numel();
  call.tokens = narrow(tokens);
  call.slots = narrow(ids.size(1));
  call.wide = teacher_ids.scalar_type() == ScalarType::Long;
  call.given = call.wide ? reinterpret_cast<const int32_t*>(numbers<int64_t>("teacher_ids", teacher_ids, ScalarType::Long, count))
                         : integers("teacher_ids", teacher_ids, count);
  integers("ids", ids, count);
  call.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  call.present = results("present", present, tokens);
  TokenSum sum{};
  sum.values = call.present;
  sum.out = results("count_and_scale", count_and_scale, 2);
  sum.tokens = call.tokens;
  sum.inverse_temperature = static_cast<float>(1 / temperature);
  const Place place(ids.get_device_index());
  check(launch_teacher(call, place.stream));
  check(launch_sum_of_tokens(sum, place.stream));
}

void topk_kl_mean(Tensor losses, Tensor count, Tensor loss) {
  TokenSum call{};
  call.tokens = narrow(losses.numel());
  call.values = floats("losses", losses, losses.numel());
  call.count = floats("count", count, 1);
  call.out = results("loss", loss, 1);
  const Place place(losses.get_device_index());
  check(launch_sum_of_tokens(call, place.stream));
}

void topk_kl_slots(Tensor hidden, Tensor weight, Optional bias, Tensor probs, Tensor ids, Tensor scale, double temperature,
                   Tensor z, Optional dhidden) {
  SlotRows call{};
  call.tokens = narrow(hidden.size(0));
  call.slots = narrow(ids.size(1));
  call.width = narrow(hidden.size(1));
  call.vocabulary = narrow(weight.size(0));
  call.hidden_stride = row_stride("hidden", hidden);
  call.weight_stride = static_cast<uint32_t>(narrow(weight.size(0) < 2 ? 0 : row_stride("weight", weight)));
  call.hidden = static_cast<const char*>(hidden.const_data_ptr());
  call.weight = static_cast<const char*>(weight.const_data_ptr());
  call.hidden_dtype = *kernel_dtype(hidden);
  call.weight_dtype = *kernel_dtype(weight);
  const int64_t count = hidden.size(0) * ids.size(1);
  call.bias = floats("bias", bias, weight.size(0));
  call.probs = floats("probs", probs, count);
  call.ids = integers("ids", ids, count);
  call.scale = floats("scale", scale, 1);
  call.inverse_temperature = static_cast<float>(1 / temperature);
  call.z = results("z", z, count);
  if (dhidden) {
    row_stride("dhidden", *dhidden);
    check_operand(dhidden->is_contiguous() && dhidden->numel() == hidden.numel(), "dhidden", *dhidden);
    call.dhidden = static_cast<char*>(dhidden->mutable_data_ptr());
    call.dhidden_dtype = *kernel_dtype(*dhidden);
  }
  check_operand(weight.size(1) == hidden.size(1) && plan_slots(call).possible, "hidden", hidden);
  const Place place(hidden.get_device_index());
  check(launch_slots(call, place.stream));
}

void topk_kl_tokens(Tensor z, Tensor probs, Tensor ids, Optional rest, Tensor scale, double temperature, bool tail,
                    Tensor losses, Tensor normalizers, Optional dz, Optional factors) {
  TokenSlots call{};
  const int64_t tokens = z.size(0), count = z.numel();
  call.tokens = narrow(tokens);
  call.slots = narrow(z.size(1));
  call.z = floats("z", z, count);
  call.probs = floats("probs", probs, count);
  call.ids = integers("ids", ids, count);
  call.rest = floats("rest", rest, 2 * tokens);
  call.scale = floats("scale", scale, 1);
  call.inverse_temperature = static_cast<float>(1 / temperature);
  call.tail = tail;
  call.losses = results("losses", losses, tokens);
  call.normalizers = results("normalizers", normalizers, 4 * tokens);
  call.dz = results("dz", dz, count);
  call.factors = results("factors", factors, tokens);
  const Place place(z.get_device_index());
  check(launch_tokens(call, place.stream));
}

void topk_kl_combine(Tensor rows, Tensor index, Tensor factors, Tensor starts, Optional old_factors, Optional out,
                     Optional sums) {
  RowSums call{};
  const int64_t sums_made = starts.numel() - 1;
  call.results = narrow(sums_made);
  call.count = narrow(rows.size(0));
  call.width = narrow(rows.size(1));
  call.stride = row_stride("rows", rows);
  call.rows = static_cast<const char*>(rows.const_data_ptr());
  call.dtype = *kernel_dtype(rows);
  call.index = integers("index", index, factors.numel());
  call.factors = floats("factors", factors, factors.numel());
  call.starts = integers("starts", starts, sums_made + 1);
  call.old_factors = floats("old_factors", old_factors, sums_made);
  call.out = results("out", out, sums_made * rows.size(1));
  call.sums = results("sums", sums, sums_made);
  const Place place(rows.get_device_index());
  check(launch_sums(call, place.stream));
}

void topk_kl_carry(Tensor logits, int64_t size, Optional bias, Tensor ids, Tensor bounds, int64_t first, double temperature,
                   Tensor z, Tensor rest, Optional exp, Optional dhidden) {
  VocabularyPart call = part_of(logits, size, bias, ids, bounds, first, temperature);
  call.overwritten = static_cast<float*>(logits.mutable_data_ptr());
  call.logits = call.overwritten;
  call.z = results("z", z, ids.numel());
  call.rest = results("rest", rest, 2 * ids.size(0));
  if (exp && dhidden) {
    give_out(call, "exp", logits, *exp);
    call.width = narrow(dhidden->size(1));
    call.dhidden = results("dhidden", dhidden, ids.size(0) * dhidden->size(1));
  }
  check_operand(plan_carry(call).possible, "logits", logits);
  const Place place(logits.get_device_index());
  check(launch_carry(call, place.stream));
}

void topk_kl_differentiate(Tensor logits, int64_t size, Optional bias, Tensor probs, Tensor ids, Tensor bounds, int64_t first,
                           double temperature, Tensor normalizers, Tensor scale, bool tail, Tensor dlogits) {
  VocabularyPart call = part_of(logits, size, bias, ids, bounds, first, temperature);
  give_out(call, "dlogits", logits, dlogits);
  call.probs = floats("probs", probs, ids.numel());
  call.normalizers = floats("normalizers", normalizers, 4 * ids.size(0));
  call.scale = floats("scale", scale, 1);
  call.tail = tail;
  const Place place(logits.get_device_index());
  check(launch_differentiate(call, place.stream));
}

}  // namespace linearpatch::cuda
