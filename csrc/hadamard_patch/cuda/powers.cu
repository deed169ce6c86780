// The kernels for the powers of two that most models have.
#include "../../common/cuda/device.cuh"

#include "patch.cuh"

#include "../../common/cuda/start.cuh"
#include "kernels.h"

namespace linearpatch::cuda {

const char* launch_powers(const PatchRows& call, const PatchLaunch& launch, void* stream) {
  const char* error = nullptr;
  with_power_kernel(call, [&](auto* kernel) { error = start(kernel, call, launch, stream); });
  return error;
}

}  // namespace linearpatch::cuda
