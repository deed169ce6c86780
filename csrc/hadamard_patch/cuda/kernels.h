// Starting the CUDA kernels, for code that knows no CUDA: the .cu files have these. What is wrong is the result, or null.
#pragma once

#include "calls.h"

namespace linearpatch::cuda {

Device device_limits(int index);

// Makes a device the current one of the kernels' own CUDA run-time library, too.
const char* make_current(int index);

// Whether what is put on a stream becomes part of a graph and runs later.
bool captures(void* stream);

// Makes a device the current one for as long as it lives; with the device's current stream.
struct Place {
  explicit Place(int index);
  ~Place();
  Place(const Place&) = delete;

  Device device;
  void* stream;
  void* guard;
};

const char* launch_powers(const PatchRows&, const Launch&, void* stream);
const char* launch_factors(const PatchRows&, const Launch&, void* stream);
const char* launch_warp_rows(const PatchRows&, const Launch&, void* stream);
const char* launch_staged(const PatchRows&, const Launch&, void* stream);
const char* launch_gradients(const GradientRows&, const Launch&, void* stream);
const char* launch_sum(const PartSums&, void* stream);

}  // namespace linearpatch::cuda
