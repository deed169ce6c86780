// The kernels for gradients, and what a device has.
#include "../../common/cuda/device.cuh"

#include "gradients.cuh"

#include "../../common/cuda/start.cuh"

namespace linearpatch::cuda {

Device device_limits(int index) {
  const auto limit = [&](cudaDeviceAttr attribute) {
    int value = 0;
    cudaDeviceGetAttribute(&value, attribute, index);
    return value;
  };
  return {limit(cudaDevAttrMultiProcessorCount), limit(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          limit(cudaDevAttrMaxSharedMemoryPerMultiprocessor), limit(cudaDevAttrComputeCapabilityMajor) >= 8};
}

const char* make_current(int index) { return said(cudaSetDevice(index)); }

bool captures(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return status != cudaStreamCaptureStatusNone;
}

const char* launch_gradients(const GradientRows& call, const Launch& launch, void* stream) {
  const char* error = nullptr;
  with_gradient_kernel(call, [&](auto* kernel) { error = start(kernel, call, launch, stream); });
  return error;
}

const char* launch_sum(const PartSums& call, void* stream) { return start(add_parts, call, plan_sum(call), stream); }

}  // namespace linearpatch::cuda
