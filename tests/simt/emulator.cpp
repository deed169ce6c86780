// The CUDA kernels of the patch on the CPU, for ctypes: what cuda.cpp does without torch, by simt.h.
#include "simt.h"

#include "../../csrc/hadamard_patch/gradients.cuh"
#include "../../csrc/hadamard_patch/patch.cuh"
#include "../../csrc/hadamard_patch/width.h"

namespace linearpatch {
// width.cpp chooses a CPU unit too; none is asked for here.
const KernelTable* scalar_kernels() { return nullptr; }
const KernelTable* avx2_kernels() { return nullptr; }
const KernelTable* avx512_kernels() { return nullptr; }
}  // namespace linearpatch

using namespace linearpatch;
using namespace linearpatch::cuda;

namespace {

std::string report;

void watch(const char* name, const void* data, int64_t bytes, bool writable) {
  if (!data) return;
  char* const start = const_cast<char*>(static_cast<const char*>(data));
  simt::Buffer& buffer = simt::machine.buffers[reinterpret_cast<uintptr_t>(start) + bytes];
  buffer = {name, start, bytes, writable, {}, std::vector<bool>(writable ? bytes / 4 : 0)};
}

struct Signs {
  std::vector<uint32_t> there, back;
  explicit Signs(const Width& width) {
    if (!width.codes) return;
    there = packed_signs(width, true);
    back = packed_signs(width, false);
    watch("signs", there.data(), there.size() * 4, false);
    watch("signs", back.data(), back.size() * 4, false);
  }
};

}  // namespace

// Plain data, as tests/simt/emulator.py has it.
struct Settings {
  int32_t schedule;  // forward, reverse, random
  uint32_t seed;
  int32_t processors;
  int32_t count_wavefronts;
  int64_t shared_per_block, shared_per_processor;
};

struct Outcome {
  int32_t possible, fixed, blocks, diagonal_blocks, threads, rows_together;
  int64_t shared_bytes, unwritten, wavefronts, least_wavefronts, barriers, shuffles, faults;
  const char* report;
};

namespace {

Device begin(const Settings& settings) {
  auto& m = simt::machine;
  m.schedule = static_cast<simt::Schedule>(settings.schedule);
  m.chance.seed(settings.seed);
  m.count_wavefronts = settings.count_wavefronts;
  m.faults.clear();
  m.fault_count = m.barriers_met = m.shuffles = 0;
  m.wavefronts = {};
  m.buffers.clear();
  return {settings.processors, settings.shared_per_block, settings.shared_per_processor};
}

Outcome finish(const Launch& launch, int rows_together) {
  const auto& m = simt::machine;
  report.clear();
  for (const std::string& line : m.faults) report += line + "\n";
  int64_t unwritten = 0;
  for (const auto& [end, buffer] : m.buffers) unwritten += std::count(buffer.written.begin(), buffer.written.end(), false);
  return {launch.possible, launch.fixed, launch.blocks, launch.diagonal_blocks, launch.threads, rows_together,
          launch.shared_bytes, unwritten, m.wavefronts.counted, m.wavefronts.least, m.barriers_met, m.shuffles,
          m.fault_count, report.c_str()};
}

template <class Call>
auto runner(const Call& call, const Launch& launch) {
  return [&](auto* kernel) {
    simt::launch(kernel, call, launch.blocks, launch.diagonal_blocks, launch.threads, launch.shared_bytes);
  };
}

}  // namespace

extern "C" {

const Width* simt_width(int64_t d, int64_t m, int64_t inner, const int8_t* h) { return &add_width(d, m, inner, h); }

// The bytes that x, residual, y and normed take; 0 for what is not there.
Outcome simt_patch(const Settings* settings, const Width* width, PatchRows* call, const int64_t* bytes) {
  const Device device = begin(*settings);
  const Launch launch = plan_patch(*call, *width, device);
  if (!launch.possible) return finish(launch, 0);
  watch("x", call->x, bytes[0], call->x == call->y);
  watch("residual", call->residual, bytes[1], false);
  if (call->y != call->x) watch("y", call->y, bytes[2], true);
  watch("normed", call->normed, bytes[3], true);
  watch("scale", call->scale, width->d * 4, false);
  watch("pre", call->pre, width->d * 4, false);
  watch("post", call->post, width->d * 4, false);
  watch("norm_weight", call->norm_weight, width->d * 4, false);
  const Signs signs(*width);
  if (width->codes) call->signs_there = signs.there.data(), call->signs_back = signs.back.data();
  if (launch.fixed)
    with_fixed_kernel(*call, runner(*call, launch));
  else
    with_staged_kernel(*call, runner(*call, launch));
  return finish(launch, call->rows_together);
}

// `totals`: dscale, dpre, dpost, [d] each, or null where one is not wanted. bytes: of x, grad and dx.
Outcome simt_gradients(const Settings* settings, const Width* width, GradientRows* call, float* const* totals,
                       const int64_t* bytes) {
  const Device device = begin(*settings);
  int wanted = 0;
  for (int i = 0; i < 3; ++i) wanted += totals[i] != nullptr;
  const Launch launch = plan_gradients(*call, *width, wanted, device);
  if (!launch.possible) return finish(launch, 0);
  const int64_t d = width->d, parts = parts_of(launch, *call);
  watch("x", call->x, bytes[0], false);
  watch("grad", call->grad, bytes[1], false);
  watch("dx", call->dx, bytes[2], true);
  watch("scale", call->scale, d * 4, false);
  watch("pre", call->pre, d * 4, false);
  watch("post", call->post, d * 4, false);
  const Signs signs(*width);
  if (width->codes) call->signs_there = signs.there.data(), call->signs_back = signs.back.data();
  struct Quad { alignas(16) float v[4]; };
  std::vector<Quad> sums[3];
  float** const places[3] = {&call->scale_sums, &call->pre_sums, &call->post_sums};
  for (int i = 0; i < 3; ++i) {
    if (!totals[i]) continue;
    sums[i].resize(parts * d / 4, {{NAN, NAN, NAN, NAN}});
    *places[i] = sums[i][0].v;
    watch("partial sums", *places[i], parts * d * 4, true);
    watch("total", totals[i], d * 4, true);
  }
  with_gradient_kernel(*call, runner(*call, launch));
  for (int i = 0; i < 3; ++i) {
    if (!totals[i]) continue;
    const float factor = i == 0 ? 1.0f / static_cast<float>(width->m * width->inner) : 1.0f;
    const PartSums sum{*places[i], totals[i], parts, static_cast<int>(d), factor};
    runner(sum, plan_sum(sum))(&add_parts);
  }
  return finish(launch, call->rows_together);
}

}  // extern "C"
