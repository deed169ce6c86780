#include "../../common/cuda/device.cuh"

#include "losses.cuh"

#include "../../common/cuda/start.cuh"
#include "kernels.h"

namespace linearpatch::cuda {

const char* launch_teacher(const TeacherIds& call, void* stream) { return start(teacher_ids, call, plan_teacher(call), stream); }

const char* launch_sum_of_tokens(const TokenSum& call, void* stream) {
  return start(sum_tokens, call, plan_sum_of_tokens(call), stream);
}

const char* launch_slots(const SlotRows& call, void* stream) {
  const char* error = nullptr;
  with_slots_kernel(call, [&](auto* kernel) { error = start(kernel, call, plan_slots(call), stream); });
  return error;
}

const char* launch_tokens(const TokenSlots& call, void* stream) { return start(token_slots, call, plan_tokens(call), stream); }

const char* launch_sums(const RowSums& call, void* stream) {
  const char* error = nullptr;
  with_sums_kernel(call, [&](auto* kernel) { error = start(kernel, call, plan_sums(call), stream); });
  return error;
}

const char* launch_carry(const VocabularyPart& call, void* stream) {
  return start(carry_part, call, plan_carry(call), stream);
}

const char* launch_differentiate(const VocabularyPart& call, void* stream) {
  return start(differentiate_part, call, plan_differentiate(call), stream);
}

}  // namespace linearpatch::cuda
