// The operators of csrc/hadamard_patch/cuda on CPU tensors: torch.ops.linearpatch_simt, the kernels run by simt.h. All of a call is as it
// is on a GPU, from the checks of its operands to the stores of its kernels, but for what the .cu files and common/cuda do.
#include "simt.h"

#include <torch/csrc/stable/library.h>

#include "../../csrc/hadamard_patch/cuda/gradients.cuh"
#include "../../csrc/hadamard_patch/cuda/patch.cuh"
#include "../../csrc/hadamard_patch/cuda/warp_rows.cuh"

#include "../../csrc/hadamard_patch/operators.h"
#include "../../csrc/hadamard_patch/cuda/kernels.h"
#include "../../csrc/hadamard_patch/width.h"

namespace linearpatch::cuda {
namespace {

Device device{1, 232448, 0};
bool capturing = false;
PatchLaunch last{};
int last_rows_together = 0, last_scale_in_shared = 0;

void watch_signs(const RowShape& shape, const uint32_t* there, const uint32_t* back) {
  const int64_t bytes = (shape.m + 15) / 16 * shape.m * 4;
  simt::watch("signs", there, there ? bytes : 0);
  simt::watch("signs", back, back ? bytes : 0);
}

void watch_vectors(std::initializer_list<Numbers> vectors, int64_t d) {
  for (const Numbers& vector : vectors) simt::watch("a vector", vector.data, d * bytes_of(vector.dtype));
}

// Bytes from the first element of rows to their last.
int64_t extent(int64_t rows, int64_t stride, int64_t length) { return rows ? (rows - 1) * stride + length : 0; }

template <class Call>
auto runner(const Call& call, const PatchLaunch& launch) {
  last = launch;
  return [&](auto* kernel) {
    simt::launch(kernel, call, launch.blocks, launch.diagonal_blocks, launch.threads, launch.shared_bytes);
    simt::machine.buffers_done();
  };
}

template <class Choose>
const char* run_patch(const PatchRows& call, const PatchLaunch& launch, Choose with_kernel) {
  const int64_t d = (static_cast<int64_t>(call.shape.m) << call.shape.k) * launch.diagonal_blocks;
  const int64_t in = d * bytes_of(call.in), out = d * bytes_of(call.out);
  const bool in_place = call.x == call.y;
  if (!in_place) simt::watch("x", call.x, extent(call.rows, call.x_stride, in));
  simt::watch("residual", call.residual, extent(call.rows, call.residual_stride, in));
  simt::watch("y", call.y, extent(call.rows, call.y_stride, out), true, in_place);
  simt::watch("normed", call.normed, extent(call.rows, call.normed_stride, out), true, false);
  watch_vectors({call.scale, call.pre, call.post, call.norm_weight}, d);
  watch_signs(call.shape, call.signs_there, call.signs_back);
  last_rows_together = call.rows_together;
  last_scale_in_shared = call.scale_in_shared;
  simt::machine.after = [&] {
    simt::check_written(call.y, call.rows, out, call.y_stride);
    simt::check_written(call.normed, call.rows, out, call.normed_stride);
  };
  with_kernel(call, runner(call, launch));
  return nullptr;
}

}  // namespace

Device device_limits(int) { return device; }
bool captures(void*) { return capturing; }
Place::Place(int index) : device(device_limits(index)), stream(nullptr), guard(nullptr) {}
Place::~Place() = default;

const char* launch_powers(const PatchRows& call, const PatchLaunch& launch, void*) {
  return run_patch(call, launch, [](const PatchRows& call, auto run) { with_power_kernel(call, run); });
}

const char* launch_factors(const PatchRows& call, const PatchLaunch& launch, void*) {
  return run_patch(call, launch, [](const PatchRows& call, auto run) { with_factor_kernel(call, run); });
}

const char* launch_warp_rows(const PatchRows& call, const PatchLaunch& launch, void*) {
  return run_patch(call, launch, [](const PatchRows& call, auto run) { with_warp_kernel(call, run); });
}

const char* launch_staged(const PatchRows& call, const PatchLaunch& launch, void*) {
  return run_patch(call, launch, [](const PatchRows& call, auto run) { with_staged_kernel(call, run); });
}

const char* launch_gradients(const GradientRows& call, const Launch& launch, void*) {
  const int64_t d = (static_cast<int64_t>(call.shape.m) << call.shape.k) * launch.diagonal_blocks;
  const int64_t in = d * bytes_of(call.in), out = d * bytes_of(call.out), parts = parts_of(launch, call);
  simt::watch("x", call.x, extent(call.rows, call.x_stride, in));
  simt::watch("grad", call.grad, extent(call.rows, call.grad_stride, in));
  simt::watch("dx", call.dx, call.dx ? extent(call.rows, call.dx_stride, out) : 0, true, false);
  watch_vectors({call.scale, call.pre, call.post}, d);
  for (float* sums : {call.scale_sums, call.pre_sums, call.post_sums})
    simt::watch("partial sums", sums, parts * d * 4, true, false);
  watch_signs(call.shape, call.signs_there, call.signs_back);
  last_rows_together = call.rows_together;
  simt::machine.after = [&] {
    simt::check_written(call.dx, call.dx ? call.rows : 0, out, call.dx_stride);
    for (float* sums : {call.scale_sums, call.pre_sums, call.post_sums}) simt::check_written(sums, parts, d * 4, d * 4);
  };
  with_gradient_kernel(call, runner(call, PatchLaunch{launch}));
  return nullptr;
}

const char* launch_sum(const PartSums& call, void*) {
  simt::watch("partial sums", call.sums, call.parts * call.d * 4);
  simt::watch("total", call.total, call.d * 4, true, false);
  simt::machine.after = [&] { simt::check_written(call.total, 1, call.d * 4, 0); };
  const PatchLaunch launch{plan_sum(call)}, before = last;
  runner(call, launch)(&add_parts);
  last = before;
  return nullptr;
}

}  // namespace linearpatch::cuda

#define VISIBLE extern "C" __attribute__((visibility("default")))

VISIBLE void simt_configure(int schedule, unsigned seed, int count_wavefronts, int processors, int64_t shared_per_block,
                            int64_t shared_per_processor, int capturing) {
  auto& m = simt::machine;
  m.schedule = static_cast<simt::Schedule>(schedule);
  m.chance.seed(seed);
  m.count_wavefronts = count_wavefronts;
  m.faults.clear();
  m.fault_count = m.barriers_met = m.narrow_barriers_met = m.shuffles = m.products = m.launches = 0;
  m.wavefronts = {};
  linearpatch::cuda::device = {processors, shared_per_block, shared_per_processor};
  linearpatch::cuda::capturing = capturing;
}

VISIBLE const char* simt_faults() {
  static std::string report;
  report.clear();
  for (const std::string& line : simt::machine.faults) report += line + "\n";
  return report.c_str();
}

// Of all launches since the machine was configured, and the shape of the last one that was not a sum.
VISIBLE void simt_counts(int64_t* counts) {
  const auto& m = simt::machine;
  const auto& last = linearpatch::cuda::last;
  for (const int64_t count : {m.launches, m.fault_count, m.barriers_met, m.narrow_barriers_met, m.shuffles, m.products,
                              m.wavefronts.counted, m.wavefronts.least, int64_t{last.fixed}, int64_t{last.warp_rows},
                              int64_t{last.blocks}, int64_t{last.threads}, last.shared_bytes,
                              int64_t{linearpatch::cuda::last_rows_together}, int64_t{linearpatch::cuda::last_scale_in_shared}})
    *counts++ = count;
}

#define OPTIONAL "Tensor? pre_scale, Tensor? post_scale, Tensor? down, Tensor? up"
STABLE_TORCH_LIBRARY(linearpatch_simt, library) {
  library.def("hadamard_patch(Tensor x, Tensor scale, " OPTIONAL ") -> Tensor");
  library.def("hadamard_patch_out(Tensor x, Tensor scale, " OPTIONAL ", Tensor(a!) out) -> ()");
  library.def("hadamard_patch_backward(Tensor grad, Tensor x, Tensor scale, " OPTIONAL
              ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("add_patch_rms_norm(Tensor x, Tensor residual, Tensor scale, Tensor norm_weight, float eps, " OPTIONAL
              ") -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(linearpatch_simt, CPU, library) {
  library.impl("hadamard_patch", TORCH_BOX(&linearpatch::cuda::hadamard_patch));
  library.impl("hadamard_patch_out", TORCH_BOX(&linearpatch::cuda::hadamard_patch_out));
  library.impl("hadamard_patch_backward", TORCH_BOX(&linearpatch::cuda::hadamard_patch_backward));
  library.impl("add_patch_rms_norm", TORCH_BOX(&linearpatch::cuda::add_patch_rms_norm));
}
