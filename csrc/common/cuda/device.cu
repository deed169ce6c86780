// What a device has and does, for code that knows no CUDA.
#include "start.cuh"

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

}  // namespace linearpatch::cuda
