#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <memory>

#include "../tensors.h"
#include "launch.h"

namespace linearpatch::cuda {

using torch::stable::accelerator::DeviceGuard;

namespace {

// PyTorch's current stream. libtorch_cuda has the function that every torch from 2.11 on serves; this file is not linked to
// that library, so that it loads where torch is built without CUDA. (Stream::nativeHandle, of libtorch_cpu, is new in 2.13.)
void* current_stream(int index) {
  const char* const name = "aoti_torch_get_current_cuda_stream";
  static const auto get = [&] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<AOTITorchError (*)(int32_t, void**)>(library ? dlsym(library, name) : nullptr);
  }();
  if (!get) refuse(std::string("this torch has no ") + name + ": its CUDA build, 2.11 or newer, is needed");
  void* stream = nullptr;
  require(get(index, &stream), name);
  return stream;
}

}  // namespace

Place::Place(int index) : device(device_limits(index)), stream(current_stream(index)), guard(nullptr) {
  auto torchs = std::make_unique<DeviceGuard>(index);
  if (const char* error = make_current(index)) refuse(std::string("a GPU cannot be used: ") + error);
  guard = torchs.release();
}

Place::~Place() { delete static_cast<DeviceGuard*>(guard); }

}  // namespace linearpatch::cuda
