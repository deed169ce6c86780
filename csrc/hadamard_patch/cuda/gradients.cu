// The kernels for gradients.
#include "../../common/cuda/device.cuh"

#include "gradients.cuh"

#include "../../common/cuda/start.cuh"
#include "kernels.h"

namespace linearpatch::cuda {

const char* launch_gradients(const GradientRows& call, const Launch& launch, void* stream) {
  const char* error = nullptr;
  with_gradient_kernel(call, [&](auto* kernel) { error = start(kernel, call, launch, stream); });
  return error;
}

const char* launch_sum(const PartSums& call, void* stream) { return start(add_parts, call, plan_sum(call), stream); }

}  // namespace linearpatch::cuda
