#include <torch/csrc/stable/accelerator.h>

#include "cuda_start.h"

namespace linearpatch::cuda {

using torch::stable::accelerator::DeviceGuard;

Place::Place(int index)
    : device(device_limits(index)),
      stream(torch::stable::accelerator::getCurrentStream(index).nativeHandle()),
      guard(new DeviceGuard(index)) {}

Place::~Place() { delete static_cast<DeviceGuard*>(guard); }

}  // namespace linearpatch::cuda
