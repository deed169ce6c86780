// The operators of csrc/topk_kl/cuda on CPU tensors: torch.ops.linearpatch_simt, the kernels run by simt.h. All of a
// call is as it is on a GPU, from the checks of its operands to the stores of its kernels.
#include "simt.h"

#include <torch/csrc/stable/library.h>

#include "../../csrc/topk_kl/cuda/losses.cuh"

#include "../../csrc/topk_kl/cuda/operators.h"
#include "../../csrc/topk_kl/cuda/kernels.h"

namespace linearpatch::cuda {
namespace {

constexpr int64_t kBytes = 4;

void watch_rows(const char* name, const char* rows, int64_t count, int64_t stride, int64_t width, Dtype dtype) {
  simt::watch(name, rows, count ? (count - 1) * stride + width * bytes_of(dtype) : 0);
}

template <class Call>
void run(void (*kernel)(Call), const Call& call, const Launch& launch) {
  simt::launch(kernel, call, launch.blocks, launch.diagonal_blocks, launch.threads, launch.shared_bytes);
  simt::machine.buffers_done();
}

void written_after(const float* data, int64_t rows, int64_t width) { simt::check_written(data, rows, width * kBytes, width * kBytes); }

}  // namespace

Place::Place(int) : device{}, stream(nullptr), guard(nullptr) {}
Place::~Place() = default;

const char* launch_teacher(const TeacherIds& call, void*) {
  const int64_t count = int64_t{call.tokens} * call.slots;
  simt::watch("given", call.given, count * (call.wide ? 8 : 4));
  simt::watch("ids", call.ids, count * kBytes, true, false);
  simt::watch("present", call.present, call.tokens * kBytes, true, false);
  simt::machine.after = [&] {
    written_after(reinterpret_cast<const float*>(call.ids), call.tokens, call.slots);
    written_after(call.present, call.tokens, 1);
  };
  run(teacher_ids, call, plan_teacher(call));
  return nullptr;
}

const char* launch_sum_of_tokens(const TokenSum& call, void*) {
  const int64_t results = call.count ? 1 : 2;
  simt::watch("values", call.values, call.tokens * kBytes);
  simt::watch("count", call.count, kBytes);
  simt::watch("out", call.out, results * kBytes, true, false);
  simt::machine.after = [&] { written_after(call.out, 1, results); };
  run(sum_tokens, call, plan_sum_of_tokens(call));
  return nullptr;
}

const char* launch_slots(const SlotRows& call, void*) {
  const int64_t count = int64_t{call.tokens} * call.slots;
  watch_rows("hidden", call.hidden, call.tokens, call.hidden_stride, call.width, call.hidden_dtype);
  watch_rows("weight", call.weight, call.vocabulary, call.weight_stride, call.width, call.weight_dtype);
  simt::watch("bias", call.bias, call.vocabulary * kBytes);
  simt::watch("probs", call.probs, count * kBytes);
  simt::watch("ids", call.ids, count * kBytes);
  simt::watch("scale", call.scale, kBytes);
  simt::watch("z", call.z, count * kBytes, true, false);
  const int64_t row = call.width * bytes_of(call.dhidden_dtype);
  simt::watch("dhidden", call.dhidden, call.tokens * row, true, false);
  simt::machine.after = [&] {
    written_after(call.z, call.tokens, call.slots);
    simt::check_written(call.dhidden, call.tokens, row, row);
  };
  with_slots_kernel(call, [&](auto* kernel) { run(kernel, call, plan_slots(call)); });
  return nullptr;
}

const char* launch_tokens(const TokenSlots& call, void*) {
  const int64_t count = int64_t{call.tokens} * call.slots;
  simt::watch("z", call.z, count * kBytes);
  simt::watch("probs", call.probs, count * kBytes);
  simt::watch("ids", call.ids, count * kBytes);
  simt::watch("rest", call.rest, 2 * call.tokens * kBytes);
  simt::watch("scale", call.scale, kBytes);
  simt::watch("losses", call.losses, call.tokens * kBytes, true, false);
  simt::watch("normalizers", call.normalizers, 4 * call.tokens * kBytes, true, false);
  simt::watch("dz", call.dz, count * kBytes, true, false);
  simt::watch("factors", call.factors, call.tokens * kBytes, true, false);
  simt::machine.after = [&] {
    written_after(call.losses, call.tokens, 1);
    written_after(call.normalizers, call.tokens, 4);
    written_after(call.dz, call.tokens, call.slots);
    written_after(call.factors, call.tokens, 1);
  };
  run(token_slots, call, plan_tokens(call));
  return nullptr;
}

const char* launch_sums(const RowSums& call, void*) {
  const int64_t count = call.starts[call.results];
  watch_rows("rows", call.rows, call.count, call.stride, call.width, call.dtype);
  simt::watch("index", call.index, count * kBytes);
  simt::watch("factors", call.factors, count * kBytes);
  simt::watch("starts", call.starts, (call.results + 1) * kBytes);
  simt::watch("old factors", call.old_factors, call.results * kBytes);
  simt::watch("out", call.out, int64_t{call.results} * call.width * kBytes, true, call.old_factors);
  simt::watch("sums", call.sums, call.results * kBytes, true, false);
  simt::machine.after = [&] {
    written_after(call.out, call.results, call.width);
    written_after(call.sums, call.results, 1);
  };
  with_sums_kernel(call, [&](auto* kernel) { run(kernel, call, plan_sums(call)); });
  return nullptr;
}

namespace {

void watch_part(const VocabularyPart& call, bool logits_writable) {
  simt::watch("logits", call.logits, call.tokens * call.stride * kBytes, logits_writable);
  simt::watch("bias", call.bias, (call.first + call.size) * kBytes);
  simt::watch("ids", call.ids, int64_t{call.tokens} * call.slots * kBytes);
  simt::watch("bounds", call.bounds, int64_t{call.tokens} * (call.blocks + 1) * kBytes);
  simt::watch("out", call.out, call.out ? call.tokens * call.stride * bytes_of(call.out_dtype) : 0, true, false);
}

void check_out(const VocabularyPart& call) {
  const int64_t bytes = bytes_of(call.out_dtype);
  simt::check_written(call.out, call.tokens, call.size * bytes / 4 * 4, call.stride * bytes);
}

}  // namespace

const char* launch_carry(const VocabularyPart& call, void*) {
  watch_part(call, true);
  simt::watch("z", call.z, int64_t{call.tokens} * call.slots * kBytes, true);
  simt::watch("rest", call.rest, 2 * call.tokens * kBytes, true);
  simt::watch("dhidden", call.dhidden, int64_t{call.tokens} * call.width * kBytes, true);
  simt::machine.after = [&] {
    check_out(call);
    written_after(call.rest, call.tokens, 2);
  };
  run(carry_part, call, plan_carry(call));
  return nullptr;
}

const char* launch_differentiate(const VocabularyPart& call, void*) {
  watch_part(call, false);
  simt::watch("probs", call.probs, int64_t{call.tokens} * call.slots * kBytes);
  simt::watch("normalizers", call.normalizers, 4 * call.tokens * kBytes);
  simt::watch("scale", call.scale, kBytes);
  simt::machine.after = [&] { check_out(call); };
  run(differentiate_part, call, plan_differentiate(call));
  return nullptr;
}

}  // namespace linearpatch::cuda

#define VISIBLE extern "C" __attribute__((visibility("default")))

VISIBLE void simt_configure(int schedule, unsigned seed) {
  auto& m = simt::machine;
  m.schedule = static_cast<simt::Schedule>(schedule);
  m.chance.seed(seed);
  m.count_wavefronts = false;
  m.faults.clear();
  m.fault_count = m.launches = 0;
}

VISIBLE const char* simt_faults() {
  static std::string report;
  report.clear();
  for (const std::string& line : simt::machine.faults) report += line + "\n";
  return report.c_str();
}

VISIBLE int64_t simt_launches() { return simt::machine.launches; }

STABLE_TORCH_LIBRARY_IMPL(linearpatch_simt, CPU, library) {
  library.impl("topk_kl_teacher", TORCH_BOX(&linearpatch::cuda::topk_kl_teacher));
  library.impl("topk_kl_mean", TORCH_BOX(&linearpatch::cuda::topk_kl_mean));
  library.impl("topk_kl_slots", TORCH_BOX(&linearpatch::cuda::topk_kl_slots));
  library.impl("topk_kl_tokens", TORCH_BOX(&linearpatch::cuda::topk_kl_tokens));
  library.impl("topk_kl_combine", TORCH_BOX(&linearpatch::cuda::topk_kl_combine));
  library.impl("topk_kl_carry", TORCH_BOX(&linearpatch::cuda::topk_kl_carry));
  library.impl("topk_kl_differentiate", TORCH_BOX(&linearpatch::cuda::topk_kl_differentiate));
}
