// The types of the elements that the kernels read and write.
#pragma once

#include <cstdint>

namespace linearpatch {

enum class Dtype : int { float32, float16, bfloat16 };

static constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace linearpatch
