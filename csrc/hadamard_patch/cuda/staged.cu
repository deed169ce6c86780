// The kernels for all other widths, and those with a residual and a norm.
#include "../../common/cuda/device.cuh"

#include "patch.cuh"

#include "../../common/cuda/start.cuh"
#include "kernels.h"

namespace linearpatch::cuda {

const char* launch_staged(const PatchRows& call, const PatchLaunch& launch, void* stream) {
  const char* error = nullptr;
  with_staged_kernel(call, [&](auto* kernel) { error = start(kernel, call, launch, stream); });
  return error;
}

}  // namespace linearpatch::cuda
