// Small kernels, each with one fault that the emulator must see, and one without any.
#include "simt.h"

namespace {

struct Call {
  const float* in;
  float* out;
  int fault;
};

enum Fault { none, missing_barrier, divergent_barrier, ended_at_barrier, out_of_bounds_read, out_of_bounds_write,
             out_of_bounds_shared, unwritten_output, unwritten_shared, wrong_mask, mask_without_itself, mask_never_comes,
             written_twice, written_by_two_blocks, misaligned, written_input, read_before_written, missing_named,
             named_never_comes, named_by_others };

// out[i] = the sum of in[i], its mirror image in the block, and its neighbour in the warp.
void kernel(const Call call) {
  using linearpatch::cuda::read, linearpatch::cuda::write;
  float* const shared = linearpatch::cuda::shared_memory();
  const int t = threadIdx.x, n = blockDim.x, i = blockIdx.x * n + t;
  const auto is = [&](Fault fault) { return call.fault == fault && blockIdx.x == 1; };
  if (!(is(unwritten_shared) && t == 3)) write(shared + t, read(call.in + (is(out_of_bounds_read) && t == 5 ? 2 * n : i)));
  if (is(ended_at_barrier) && t == n - 1) return;
  if (is(divergent_barrier) && t >= 32)
    __syncthreads();
  else if (!is(missing_barrier))
    __syncthreads();
  float v = read(shared + t) + read(shared + (is(out_of_bounds_shared) && t == 0 ? n : n - 1 - t));
  const float mine = read(shared + t);
  if (is(wrong_mask))
    v += __shfl_xor_sync(t % 2 ? 0xffffffffu : 0x7fffffffu, mine, 1);
  else if (is(mask_without_itself))
    v += __shfl_xor_sync(0xfffffffeu, mine, 1);
  else if (!is(mask_never_comes) || t != 1)
    v += __shfl_xor_sync(0xffffffffu, mine, 1);
  if (is(unwritten_output) && t == 7) return;
  if (is(written_input) && t == 9) write(const_cast<float*>(call.in) + i, v);
  if (is(read_before_written) && t == 9) v += 0 * read(call.out + i);
  write(call.out + (is(out_of_bounds_write) && t == n - 1 ? 2 * n : is(written_twice) && t == 2 ? i - 1
                    : is(written_by_two_blocks) ? t : i), v);
  // Both warps meet; what the other one writes then may be read once they have met again.
  some_meet(1, 64);
  write(shared + t, v);
  if (!is(missing_named)) {
    if (!is(named_never_comes) || t < 32) some_meet(is(named_by_others) && t >= 32 ? 2 : 1, 64);
  }
  if (read(shared + (t ^ 32)) != read(shared + (t ^ 32))) write(call.out + i, v);
  if (is(misaligned) && t == 0) linearpatch::cuda::load16(call.in + 1);
}

std::string report;

}  // namespace

extern "C" const char* run(int fault, int schedule, unsigned seed) {
  constexpr int threads = 64, blocks = 2;
  auto& m = simt::machine;
  m = {};
  m.schedule = static_cast<simt::Schedule>(schedule);
  m.chance.seed(seed);
  struct alignas(16) {
    float in[threads * blocks], between[4], out[threads * blocks];
  } memory;
  auto& in = memory.in;
  auto& out = memory.out;
  for (int i = 0; i < threads * blocks; ++i) in[i] = i * i, out[i] = NAN;
  simt::watch("in", in, sizeof(in));
  simt::watch("out", out, sizeof(out), true, false);
  simt::launch(kernel, Call{in, out, fault}, blocks, 1, threads, threads * 4);
  simt::check_written(out, 1, sizeof(out), 0);
  if (!fault)
    for (int i = 0; i < threads * blocks; ++i) {
      const int first = i / threads * threads, mirror = first + threads - 1 - (i - first);
      if (out[i] != in[i] + in[mirror] + in[i ^ 1]) simt::fault("element " + std::to_string(i) + " is wrong");
    }
  report.clear();
  for (const std::string& line : m.faults) report += line + "\n";
  return report.c_str();
}
