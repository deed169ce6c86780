// Starting a kernel on a stream of the current device.
#pragma once

#include <cuda_runtime.h>

#include "cuda_start.h"

namespace linearpatch::cuda {

template <class Call>
const char* start(void (*kernel)(Call), const Call& call, const Launch& launch, void* stream) {
  const auto said = [](cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); };
  const int bytes = static_cast<int>(launch.shared_bytes);
  if (bytes > 48 * 1024)  // more has to be asked for, on every device anew
    if (const char* error = said(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))) return error;
  const dim3 grid(launch.blocks, launch.diagonal_blocks);
  kernel<<<grid, launch.threads, bytes, static_cast<cudaStream_t>(stream)>>>(call);
  return said(cudaGetLastError());
}

}  // namespace linearpatch::cuda
