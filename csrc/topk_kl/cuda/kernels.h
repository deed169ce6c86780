// Starting the losses' CUDA kernels; losses.cu has these. What is wrong is the result, or null.
#pragma once

#include "calls.h"

namespace linearpatch::cuda {

const char* launch_teacher(const TeacherIds&, void* stream);
const char* launch_sum_of_tokens(const TokenSum&, void* stream);
const char* launch_slots(const SlotRows&, void* stream);
const char* launch_tokens(const TokenSlots&, void* stream);
const char* launch_sums(const RowSums&, void* stream);
const char* launch_carry(const VocabularyPart&, void* stream);
const char* launch_differentiate(const VocabularyPart&, void* stream);

}  // namespace linearpatch::cuda
