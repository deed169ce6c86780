// What the operators need of torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"
#include "namespace.h"

namespace linearpatch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

[[noreturn]] inline void refuse(const std::string& message) { throw std::runtime_error(message); }

// What torch says of the call that failed last: of 2.13, null in an older one.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

inline void require(AOTITorchError code, const char* call) {
  if (code == TORCH_SUCCESS) return;
  refuse(torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace()
                                                    : std::string(call) + " failed; torch has written why to standard error");
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline std::string described(const Tensor& t) {
  return std::string(torch::headeronly::toString(t.scalar_type())) + " " + shape_of(t);
}

inline std::optional<Dtype> kernel_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: return std::nullopt;
  }
}

inline bool floating(const Tensor& t) { return kernel_dtype(t) || t.scalar_type() == ScalarType::Double; }

// Where a tensor is, asked of it once: a question to torch shows where a call takes microseconds.
struct DeviceOf {
  bool cpu;
  int32_t index;
  explicit DeviceOf(const Tensor& t) : cpu(t.is_cpu()), index(cpu ? 0 : t.get_device_index()) {}
  bool has(const Tensor& t) const { return cpu ? t.is_cpu() : t.is_cuda() && t.get_device_index() == index; }
};

// What a kernel asks of an operand. What is wrong with it is told in words by Python.
inline void check_operand(bool fits, const char* name, const Tensor& t) {
  if (!fits) refuse(std::string(name) + " is not in the form that the kernel takes: " + described(t));
}

// An operator with a result, or several, all of them tensors.
template <size_t arguments>
std::vector<Tensor> call(const char* name, std::array<StableIValue, arguments> stack, size_t results = 1,
                         const char* overload = "") {
  require(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < results; ++i) tensors.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  return tensors;
}

// Aligned to a cache line, grown when it must be, given back with its owner.
struct Buffer {
  float* data = nullptr;
  int64_t size = 0;
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* at_least(int64_t floats) {
    if (floats > size) {
      std::free(data);
      size = (floats + 1023) / 1024 * 1024;
      data = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
      if (!data) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
  ~Buffer() { std::free(data); }
};

}  // namespace linearpatch
