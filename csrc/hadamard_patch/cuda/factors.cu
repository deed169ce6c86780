// The kernels for the widths m 2^k that most models have.
#include "../../common/cuda/device.cuh"

#include "patch.cuh"

#include "../../common/cuda/start.cuh"
#include "kernels.h"

namespace linearpatch::cuda {

const char* launch_factors(const PatchRows& call, const PatchLaunch& launch, void* stream) {
  const char* error = nullptr;
  with_factor_kernel(call, [&](auto* kernel) { error = start(kernel, call, launch, stream); });
  return error;
}

}  // namespace linearpatch::cuda
