// Starting a kernel on a stream of the current device.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace linearpatch::cuda {

// What a call of the run-time library says is wrong, or null; it is not left for the next who asks for the last error.
inline const char* said(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

template <class Call>
const char* start(void (*kernel)(Call), const Call& call, const Launch& launch, void* stream) {
  const int bytes = static_cast<int>(launch.shared_bytes);
  if (bytes > 48 * 1024)  // more has to be asked for, on every device anew
    if (const char* error = said(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))) return error;
  cudaLaunchConfig_t where{};
  where.gridDim = dim3(launch.blocks, launch.diagonal_blocks);
  where.blockDim = dim3(launch.threads);
  where.dynamicSmemBytes = bytes;
  where.stream = static_cast<cudaStream_t>(stream);
  return said(cudaLaunchKernelEx(&where, kernel, call));
}

}  // namespace linearpatch::cuda
