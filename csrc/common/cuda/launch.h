// Starting CUDA kernels, for code that knows no CUDA. No torch here either: the operators, the kernels, and the emulator of
// tests/simt share it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace linearpatch::cuda {

struct Device {
  int processors;
  int64_t shared_per_block, shared_per_processor;  // bytes
  bool matrix_products = true;                     // multiply_add of device.cuh: compute capability 8.0 and newer
};

// A grid of blocks x diagonal_blocks; the second is the number of diagonal blocks of H, or of parts of a token.
struct Launch {
  bool possible;
  int blocks, diagonal_blocks, threads;
  int64_t shared_bytes;
};

Device device_limits(int index);

// Makes a device the current one of the kernels' own CUDA run-time library, too. What is wrong is the result, or null.
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

// Of what the functions that launch kernels return: what is wrong, or null.
inline void check(const char* error) {
  if (error) throw std::runtime_error(std::string("a CUDA kernel of linearpatch did not start: ") + error);
}

}  // namespace linearpatch::cuda
