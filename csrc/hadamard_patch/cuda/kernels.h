// Starting the CUDA kernels of the patch; the .cu files have these. What is wrong is the result, or null.
#pragma once

#include "calls.h"

namespace linearpatch::cuda {

const char* launch_powers(const PatchRows&, const PatchLaunch&, void* stream);
const char* launch_factors(const PatchRows&, const PatchLaunch&, void* stream);
const char* launch_warp_rows(const PatchRows&, const PatchLaunch&, void* stream);
const char* launch_staged(const PatchRows&, const PatchLaunch&, void* stream);
const char* launch_gradients(const GradientRows&, const Launch&, void* stream);
const char* launch_sum(const PartSums&, void* stream);

}  // namespace linearpatch::cuda
