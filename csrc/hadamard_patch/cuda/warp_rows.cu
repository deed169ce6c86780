// The kernels for rows that a warp has to itself.
#include "../../common/cuda/device.cuh"

#include "warp_rows.cuh"

#include "../../common/cuda/start.cuh"
#include "kernels.h"

namespace linearpatch::cuda {

const char* launch_warp_rows(const PatchRows& call, const PatchLaunch& launch, void* stream) {
  const char* error = nullptr;
  with_warp_kernel(call, [&](auto* kernel) { error = start(kernel, call, launch, stream); });
  return error;
}

}  // namespace linearpatch::cuda
