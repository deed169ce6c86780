// How the host would launch a kernel: csrc/hadamard_patch/cuda/calls.h for one call on a given device, for gpu_static.py.
//
//   gpu_plan KERNEL m inner blocks has_program dtype rows turns processors shared_per_block shared_per_processor
//
// prints: fixed, warp_rows, m, k, blocks, diagonal_blocks, threads, shared_bytes, rows_together, rows, and the bytes of the
// kernel's parameter. The launch is that of a call of `rows` rows; the parameter says as many rows as give every block
// `turns` turns of the loop over rows. Tensor number i of the list below lies at (i + 1) << 40.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../csrc/hadamard_patch/cuda/calls.h"

using namespace linearpatch;
using namespace linearpatch::cuda;

namespace {

enum Tensor { x, residual, y, normed, scale, weight, grad, dx, scale_sums, signs };

template <class T>
T* place(Tensor tensor) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(tensor + 1) << 40);
}

template <class Call>
int print(const Call& call, const PatchLaunch& launch) {
  if (!launch.possible) return 1;
  std::printf("%d %d %d %d %d %d %d %lld %d %lld\n", launch.fixed, launch.warp_rows, call.signs_there ? 0 : call.shape.m,
              call.shape.k, launch.blocks, launch.diagonal_blocks, launch.threads, static_cast<long long>(launch.shared_bytes),
              call.rows_together, static_cast<long long>(call.rows));
  const auto* bytes = reinterpret_cast<const unsigned char*>(&call);
  for (size_t i = 0; i < sizeof call; ++i) std::printf("%02x", bytes[i]);
  std::printf("\n");
  return 0;
}

template <class Call>
int print_with_turns(Call& call, int turns, const PatchLaunch& launch) {
  call.rows = int64_t{turns} * launch.blocks * call.rows_together;
  return print(call, launch);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 12) return 2;
  const auto number = [&](int i) { return std::atoll(arguments[i]); };
  const char* const kernel = arguments[1];
  Width width{number(2) * number(3) * number(4), number(2), number(3), number(4), number(5) != 0, nullptr, nullptr};
  const bool tabled = width.m != 1 && !width.has_program;
  const Dtype dtype = static_cast<Dtype>(number(6));
  const int64_t rows = number(7);
  const int turns = static_cast<int>(number(8));
  const Device device{static_cast<int>(number(9)), number(10), number(11)};
  const int64_t stride = width.d * (dtype == Dtype::float32 ? 4 : 2);
  const auto* const table = tabled ? place<const uint32_t>(signs) : nullptr;
  if (!std::strcmp(kernel, "hadamard_patch_backward")) {
    GradientRows call{};
    call.x = place<const char>(x), call.grad = place<const char>(grad), call.dx = place<char>(dx);
    call.x_stride = call.grad_stride = call.dx_stride = stride;
    call.in = call.out = dtype;
    call.scale = {place<const char>(scale), Dtype::float32};
    call.scale_sums = place<float>(scale_sums);
    call.signs_there = call.signs_back = table;
    call.rows = rows;
    return print_with_turns(call, turns, PatchLaunch{plan_gradients(call, width, 1, device)});
  }
  PatchRows call{};
  call.x = place<const char>(x), call.y = place<char>(y);
  call.x_stride = call.y_stride = stride;
  call.in = call.out = dtype;
  call.scale = {place<const char>(scale), Dtype::float32};
  call.signs_there = call.signs_back = table;
  if (!std::strcmp(kernel, "add_patch_rms_norm")) {
    call.fused = true;
    call.residual = place<const char>(residual), call.normed = place<char>(normed);
    call.residual_stride = call.normed_stride = stride;
    call.norm_weight = {place<const char>(weight), Dtype::float32};
    call.eps = 1e-5f;
  }
  call.rows = rows;
  return print_with_turns(call, turns, plan_patch(call, width, device));
}
