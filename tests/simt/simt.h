// A GPU for tests, on one CPU thread: compile a .cuh with this in place of device.cuh, and its kernels run here.
//
// Every thread of a block is a fiber that runs until it meets a barrier or a shuffle; which ready one goes next is the
// schedule's choice (forward, reverse, random). What is watched, and reported in one line each:
//   - barriers: threads that wait at different ones, or for threads that have ended; shuffles whose mask is not who comes
//   - shared memory: words that two threads touch with no barrier between (one of them writing), words read before they
//     were written, bounds
//   - global memory: bounds and alignment, races as above or between blocks, writes to what is read-only; afterwards,
//     which elements of a buffer were never written
// and counted: wavefronts of shared memory by the addresses that a warp's threads have in the same access, and how many
// an access without conflicts would need.
//
// Not seen: registers, launch limits, timing. nvcc and ptxas see those.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __syncthreads() simt::barrier(__LINE__)
#define __syncwarp() simt::warp_barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) simt::shuffle_xor(__LINE__, mask, value, lanes)
#define __shfl_sync(mask, value, lane) simt::shuffle_xor(__LINE__, mask, value, (threadIdx.x % 32) ^ (lane))

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float __uint_as_float(uint32_t bits) { float v; std::memcpy(&v, &bits, 4); return v; }
inline uint32_t __float_as_uint(float v) { uint32_t bits; std::memcpy(&bits, &v, 4); return bits; }

struct Index3 { unsigned x = 0, y = 0, z = 0; };
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

enum class Schedule { forward, reverse, random };

// A moment in a block's life, as far as barriers order it: those of the block, those of a thread's warp, and those of the
// threads that meet at a barrier with a number.
struct Access {
  int block = -1, thread = -1, barriers = 0, warp_barriers = 0, named_barriers = 0;

  // No barrier lies between them and they are not one thread's.
  inline bool races_with(const Access& other) const;
};

// A word of memory, and who touched it last.
struct Word {
  Access write;
  std::vector<Access> reads;  // since that write, one a thread and stretch between barriers
  bool on_its_way = false;    // a copy that nothing has waited for
};

struct Buffer {
  std::string name;
  char* data;
  int64_t bytes;
  bool writable, filled;  // filled: with what a kernel may read before it has written there
  std::vector<Word> words;
  std::vector<bool> written;
};

enum class State { ready, at_barrier, at_warp_barrier, at_named_barrier, at_exchange, ended };

struct Thread;
// What the threads of a warp that have come together make of what each has given; nothing else runs meanwhile.
using Exchange = void (*)(Thread* warp, int threads);

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::ready;
  int line = 0, warp_barriers = 0;
  int name = -1, together = 0, named_barriers = 0;  // of the barrier that it meets some others at: always the same
  uint32_t mask = 0;
  Exchange exchange = nullptr;
  float value = 0, received = 0;
  int lanes = 0;
  uint32_t factors[6] = {};  // of a product
  float sums[4] = {};
  // What it has asked for and may be under way, in groups; the last one is not ended.
  std::vector<std::vector<std::pair<void*, const void*>>> copies{1};
  int64_t accesses = 0;
};

struct Wavefronts { int64_t counted = 0, least = 0; };

struct Machine {
  Schedule schedule = Schedule::forward;
  std::mt19937 chance{0};
  std::vector<std::string> faults;
  int64_t fault_count = 0;
  std::map<uintptr_t, Buffer> buffers;  // by the address of their end
  std::vector<Thread> threads;
  ucontext_t scheduler;
  int running = -1, barriers = 0, block = 0;
  std::vector<float> shared;
  std::vector<Word> shared_words;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  bool count_wavefronts = true;
  // Of each warp, what its threads asked for in their n-th access since it last met others: first word, words.
  std::map<std::pair<int, int64_t>, std::vector<std::pair<int, int>>> in_flight;
  Wavefronts wavefronts;
  int64_t barriers_met = 0, narrow_barriers_met = 0, shuffles = 0, products = 0, launches = 0;
  std::function<void()> after;  // the launch, before its buffers are forgotten

  void buffers_done() {
    running = -1;
    after();
    buffers.clear();
  }
};
inline Machine machine;

inline bool Access::races_with(const Access& other) const {
  if (thread < 0 || other.thread < 0) return false;
  if (block != other.block) return true;
  if (thread == other.thread || barriers != other.barriers) return false;
  const int name = machine.threads[thread].name;
  if (name >= 0 && name == machine.threads[other.thread].name && named_barriers != other.named_barriers) return false;
  return thread / 32 != other.thread / 32 || warp_barriers == other.warp_barriers;
}

inline void fault(const std::string& what) {
  if (++machine.fault_count <= 1000)
    machine.faults.push_back("block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + " thread " +
                             std::to_string(machine.running) + ": " + what);
}

// --- memory ---

inline void note(Word& word, bool writes, const std::string& where) {
  const Thread& thread = machine.threads[machine.running];
  const Access now{machine.block, machine.running, machine.barriers, thread.warp_barriers, thread.named_barriers};
  if (now.races_with(word.write)) fault("race: " + where + (writes ? " written twice" : " read while it is written"));
  if (writes) {
    for (const Access& read : word.reads)
      if (now.races_with(read)) {
        fault("race: " + where + " written while it is read");
        break;
      }
    word.reads.clear();
    word.write = now;
    return;
  }
  for (Access& read : word.reads)
    if (read.block == now.block && read.thread == now.thread) {
      read = now;
      return;
    }
  word.reads.push_back(now);
}

inline bool in_shared(const void* p) {
  const auto at = reinterpret_cast<uintptr_t>(p), start = reinterpret_cast<uintptr_t>(machine.shared.data());
  return at >= start && at < start + machine.shared.size() * 4;
}

// `words` floats at p may be touched; all bookkeeping. False where they must not be.
inline bool touch_shared(const void* p, int words, bool writes) {
  const int64_t first = static_cast<const float*>(p) - machine.shared.data();
  if (first + words > static_cast<int64_t>(machine.shared.size())) {
    fault("shared memory: out of bounds");
    return false;
  }
  if (first % words) fault("shared memory: not aligned");
  Thread& thread = machine.threads[machine.running];
  for (int i = 0; i < words; ++i) {
    Word& word = machine.shared_words[first + i];
    if (!writes && (word.write.thread < 0 || word.on_its_way))
      fault("shared memory: word " + std::to_string(first + i) + " read before it was written");
    note(word, writes, "shared word " + std::to_string(first + i));
    if (writes) word.on_its_way = false;
  }
  if (machine.count_wavefronts)
    machine.in_flight[{machine.running / 32, thread.accesses++}].push_back({static_cast<int>(first), words});
  return true;
}

// A copy may come as soon as it is asked for; it is there when it is waited for.
inline void begin_to_write(const void* p, int words) {
  if (!in_shared(p)) return;  // which is said when it comes
  const int64_t first = static_cast<const float*>(p) - machine.shared.data();
  for (int64_t i = first; i < std::min<int64_t>(first + words, machine.shared.size()); ++i) {
    note(machine.shared_words[i], true, "shared word " + std::to_string(i));
    machine.shared_words[i].on_its_way = true;
  }
}

inline bool touch_global(const void* p, int bytes, bool writes) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  const auto found = machine.buffers.upper_bound(at);
  if (found == machine.buffers.end() || at < reinterpret_cast<uintptr_t>(found->second.data) || at + bytes > found->first) {
    fault("global memory: out of bounds");
    return false;
  }
  Buffer& buffer = found->second;
  const int64_t offset = at - reinterpret_cast<uintptr_t>(buffer.data);
  if (at % bytes) fault("global memory: " + buffer.name + " not aligned to " + std::to_string(bytes) + " bytes");
  if (writes && !buffer.writable) {
    fault("global memory: " + buffer.name + " is only to be read");
    return false;
  }
  for (int64_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
    if (buffer.writable) note(buffer.words[word], writes, buffer.name + " at byte " + std::to_string(4 * word));
    if (writes) buffer.written[word] = true;
    else if (!buffer.filled && !buffer.written[word])
      fault("global memory: " + buffer.name + " at byte " + std::to_string(4 * word) + " read before it was written");
  }
  return true;
}

template <class T>
T get(const void* p) {
  T value{};
  if (in_shared(p) ? touch_shared(p, sizeof(T) / 4, false) : touch_global(p, sizeof(T), false)) std::memcpy(&value, p, sizeof(T));
  return value;
}
template <class T>
void put(void* p, T value) {
  if (in_shared(p) ? touch_shared(p, sizeof(T) / 4, true) : touch_global(p, sizeof(T), true)) std::memcpy(p, &value, sizeof(T));
}

// 32 banks of a word; an access of 16 bytes goes by quarters of a warp.
// Of a warp that has met others: of its accesses since it last did, the n-th of each thread belong together.
inline void settle_wavefronts(int warp) {
  const auto begin = machine.in_flight.lower_bound({warp, 0}), end = machine.in_flight.lower_bound({warp + 1, 0});
  for (auto one = begin; one != end; ++one) {
    const auto& accesses = one->second;
    const int words = accesses[0].second, group = 32 / words;
    for (size_t begin = 0; begin < accesses.size(); begin += group) {
      std::set<int> by_bank[32];
      int most = 0;
      for (size_t i = begin; i < std::min(begin + group, accesses.size()); ++i)
        for (int w = 0; w < accesses[i].second; ++w) {
          std::set<int>& bank = by_bank[(accesses[i].first + w) % 32];
          bank.insert(accesses[i].first + w);
          most = std::max<int>(most, bank.size());
        }
      machine.wavefronts.counted += most;
      machine.wavefronts.least += 1;
    }
  }
  machine.in_flight.erase(begin, end);
  for (size_t i = 32 * warp; i < std::min<size_t>(32 * warp + 32, machine.threads.size()); ++i) machine.threads[i].accesses = 0;
}
inline void settle_wavefronts() {
  for (int warp = 0; 32 * warp < static_cast<int>(machine.threads.size()); ++warp) settle_wavefronts(warp);
}

// --- threads ---

inline void leave(State state, int line) {
  Thread& self = machine.threads[machine.running];
  self.state = state;
  self.line = line;
  swapcontext(&self.context, &machine.scheduler);
}

inline void barrier(int line) { leave(State::at_barrier, line); }

inline void warp_barrier(int line) {
  Thread& self = machine.threads[machine.running];
  self.mask = 0xffffffffu;
  self.lanes = 0;
  leave(State::at_warp_barrier, line);
}

// Where `together` threads of a block meet, whole warps of them.
inline void named_barrier(int line, int name, int together) {
  Thread& self = machine.threads[machine.running];
  if (name < 0 || name > 15) fault("barrier at line " + std::to_string(line) + ": a block has those from 0 to 15");
  if (together % 32) fault("barrier at line " + std::to_string(line) + ": a part of a warp");
  if (self.name >= 0 && self.name != name) fault("barrier at line " + std::to_string(line) + ": a thread that has met others before");
  self.name = name;
  self.together = together;
  leave(State::at_named_barrier, line);
}

// Waits for the mask's threads of the warp, to do with them what they all came for.
inline Thread& exchange(int line, uint32_t mask, const char* what, Exchange with) {
  Thread& self = machine.threads[machine.running];
  const int lane = machine.running % 32;
  if (!(mask >> lane & 1)) fault(what + std::string(": a mask without the thread itself, line ") + std::to_string(line));
  self.mask = mask;
  self.exchange = with;
  leave(State::at_exchange, line);
  return self;
}

inline float shuffle_xor(int line, uint32_t mask, float value, int lanes) {
  Thread& self = machine.threads[machine.running];
  if (!(mask >> (machine.running % 32 ^ lanes) & 1))
    fault("shuffle: from a thread that the mask lacks, line " + std::to_string(line));
  self.value = value;
  self.lanes = lanes;
  return exchange(line, mask, "shuffle", [](Thread* warp, int threads) {
           for (int i = 0; i < threads; ++i) warp[i].received = (i ^ warp[i].lanes) < threads ? warp[i ^ warp[i].lanes].value : NAN;
           ++machine.shuffles;
         }).received;
}

template <size_t n>
void add_products(Thread* warp, const float (&a)[16][n], const float (&b)[n][8]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (size_t k = 0; k < n; ++k) warp[lane].sums[i] += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + i % 2];
  ++machine.products;
}

// sums += A B, from where the threads have the elements of a 16 x 16 A and a 16 x 8 B (mma.m16n8k16), widened by `wide`.
template <float (*wide)(uint16_t)>
void multiply_matrices(Thread* warp, int threads) {
  float a[16][16], b[16][8];
  if (threads != 32) return fault("product: of less than a warp");
  for (int lane = 0; lane < 32; ++lane)
    for (int word = 0; word < 6; ++word)
      for (int half = 0; half < 2; ++half) {
        const float v = wide(static_cast<uint16_t>(warp[lane].factors[word] >> 16 * half));
        const int g = lane / 4, pair = 2 * (lane % 4) + half;
        if (word < 4) a[g + 8 * (word % 2)][pair + 8 * (word / 2)] = v;
        else b[pair + 8 * (word - 4)][g] = v;
      }
  add_products(warp, a, b);
}

// The same of a 16 x 8 A and an 8 x 8 B (mma.m16n8k8), floats of which the products read ten bits of the mantissa.
inline void multiply_cut_matrices(Thread* warp, int threads) {
  float a[16][8], b[8][8];
  if (threads != 32) return fault("product: of less than a warp");
  for (int lane = 0; lane < 32; ++lane)
    for (int word = 0; word < 6; ++word) {
      const float v = std::bit_cast<float>(warp[lane].factors[word] & 0xffffe000u);
      const int g = lane / 4, q = lane % 4;
      if (word < 4) a[g + 8 * (word % 2)][q + 4 * (word / 2)] = v;
      else b[q + 4 * (word - 4)][g] = v;
    }
  add_products(warp, a, b);
}

inline int warp_end(int warp) { return std::min<int>(32 * warp + 32, machine.threads.size()); }

// Lets a warp's threads go on that wait for each other and have all come. False where none could.
inline bool release_warp(int warp) {
  bool released = false;
  for (int i = 32 * warp; i < warp_end(warp); ++i) {
    Thread& one = machine.threads[i];
    if (one.state != State::at_exchange && one.state != State::at_warp_barrier) continue;
    std::vector<int> together;
    bool complete = true;
    for (int lane = 0; lane < warp_end(warp) - 32 * warp; ++lane) {
      const Thread& other = machine.threads[32 * warp + lane];
      if (!(one.mask >> lane & 1)) continue;
      complete = complete && other.state == one.state && other.line == one.line && other.mask == one.mask &&
                 other.exchange == one.exchange;
      together.push_back(32 * warp + lane);
    }
    if (!complete || together.empty()) continue;
    if (one.state == State::at_warp_barrier) ++machine.narrow_barriers_met;
    if (one.state == State::at_exchange) one.exchange(&machine.threads[32 * warp], warp_end(warp) - 32 * warp);
    for (int t : together) {
      machine.threads[t].state = State::ready;
      ++machine.threads[t].warp_barriers;
    }
    released = true;
  }
  return released;
}

// Lets those go on that wait at a barrier with a number and have all come; it must be the same one.
inline bool release_named() {
  std::map<int, std::vector<int>> waiting;
  for (size_t i = 0; i < machine.threads.size(); ++i)
    if (machine.threads[i].state == State::at_named_barrier) waiting[machine.threads[i].name].push_back(i);
  bool released = false;
  for (const auto& [name, together] : waiting) {
    const Thread& one = machine.threads[together[0]];
    if (static_cast<int>(together.size()) < one.together) continue;
    for (int i : together)
      if (machine.threads[i].line != one.line || machine.threads[i].together != one.together ||
          static_cast<int>(together.size()) != one.together)
        fault("barrier at line " + std::to_string(one.line) + ": others with its number wait at another one");
    for (int i : together) {
      machine.threads[i].state = State::ready;
      ++machine.threads[i].named_barriers;
      if (i % 32 == 0) settle_wavefronts(i / 32);
    }
    ++machine.narrow_barriers_met;
    released = true;
  }
  return released;
}

inline bool release_block() {
  int line = -1;
  bool ended = false, same = true, all = true;
  for (const Thread& thread : machine.threads) {
    if (thread.state == State::ended) ended = true;
    else if (thread.state != State::at_barrier) all = false;
    else if (line < 0) line = thread.line;
    else same = same && line == thread.line;
  }
  if (!all || line < 0) return false;
  if (ended) fault("barrier at line " + std::to_string(line) + ": other threads of the block have ended");
  if (!same) fault("barrier at line " + std::to_string(line) + ": others of the block wait at another one");
  if (ended || !same) return false;
  settle_wavefronts();
  ++machine.barriers;
  ++machine.barriers_met;
  for (Thread& thread : machine.threads) thread.state = State::ready;
  return true;
}

inline void enter() {
  machine.body(machine.argument);
  for (const auto& group : machine.threads[machine.running].copies)
    if (!group.empty()) fault("copies that nothing has waited for");
  leave(State::ended, 0);
}

// The threads that can go on, in the order in which they will.
inline std::vector<int> next_round() {
  std::vector<int> ready;
  for (size_t i = 0; i < machine.threads.size(); ++i)
    if (machine.threads[i].state == State::ready) ready.push_back(i);
  if (machine.schedule == Schedule::reverse) std::reverse(ready.begin(), ready.end());
  if (machine.schedule == Schedule::random) std::shuffle(ready.begin(), ready.end(), machine.chance);
  return ready;
}

inline void run_block(int threads, int64_t shared_bytes) {
  constexpr size_t stack = 128 * 1024;
  machine.shared.assign(shared_bytes / 4, NAN);
  machine.shared_words.assign(shared_bytes / 4, {});
  machine.threads.resize(threads);
  machine.barriers = 0;
  for (Thread& thread : machine.threads) {
    if (!thread.stack) thread.stack = std::make_unique<char[]>(stack);
    thread.state = State::ready;
    thread.warp_barriers = thread.named_barriers = 0;
    thread.name = -1;
    thread.accesses = 0;
    thread.copies.assign(1, {});
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = stack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  for (;;) {
    for (int thread : next_round()) {
      machine.running = thread;
      threadIdx.x = thread;
      swapcontext(&machine.scheduler, &machine.threads[thread].context);
    }
    bool released = false;
    for (int warp = 0; 32 * warp < threads; ++warp) released = release_warp(warp) || released;
    released = release_named() || released;
    if (released || release_block()) continue;
    for (int i = 0; i < threads; ++i) {
      const Thread& thread = machine.threads[i];
      machine.running = i;
      if (thread.state == State::at_exchange || thread.state == State::at_warp_barrier) {
        fault("shuffle at line " + std::to_string(thread.line) + ": threads of its mask never come");
        break;
      }
      if (thread.state == State::at_named_barrier) {
        fault("barrier at line " + std::to_string(thread.line) + ": some of its threads never come");
        break;
      }
    }
    break;
  }
  settle_wavefronts();
}

// A buffer that kernels may touch until the next launch is over.
inline void watch(const char* name, const void* data, int64_t bytes, bool writable = false, bool filled = true) {
  if (!data || !bytes) return;
  char* const start = const_cast<char*>(static_cast<const char*>(data));
  machine.buffers[reinterpret_cast<uintptr_t>(start) + bytes] = {name, start, bytes, writable, filled, {},
                                                                 std::vector<bool>(writable ? bytes / 4 : 0)};
}

// Every `length` bytes of every `stride` of a buffer must have been written.
inline void check_written(const void* data, int64_t rows, int64_t length, int64_t stride) {
  if (!data) return;
  const auto found = machine.buffers.upper_bound(reinterpret_cast<uintptr_t>(data));
  if (found == machine.buffers.end()) return;
  int64_t missing = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t byte = row * stride; byte < row * stride + length; byte += 4) missing += !found->second.written[byte / 4];
  if (missing) fault("global memory: " + std::to_string(missing) + " words of " + found->second.name + " never written");
}

template <class Call>
void launch(void (*kernel)(Call), const Call& call, int blocks, int diagonal_blocks, int threads, int64_t shared_bytes) {
  struct Bound {
    void (*kernel)(Call);
    const Call& call;
  } bound{kernel, call};
  machine.body = [](void* p) { static_cast<Bound*>(p)->kernel(static_cast<Bound*>(p)->call); };
  machine.argument = &bound;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), static_cast<unsigned>(diagonal_blocks), 1};
  for (auto& [end, buffer] : machine.buffers) buffer.words.assign(buffer.writable ? buffer.bytes / 4 : 0, {});
  for (int y = 0; y < diagonal_blocks; ++y)
    for (int x = 0; x < blocks; ++x) {
      blockIdx = {static_cast<unsigned>(x), static_cast<unsigned>(y), 0};
      machine.block = y * blocks + x;
      run_block(threads, shared_bytes);
    }
  ++machine.launches;
}

}  // namespace simt

// --- what device.cuh offers ---

namespace linearpatch::cuda {

struct Half {};
struct BFloat16 {};
struct TensorFloat32 {};

#define some_meet(name, together) simt::named_barrier(__LINE__, name, together)
inline float* shared_memory() { return simt::machine.shared.data(); }
inline float read(const float* p) { return simt::get<float>(p); }
inline void write(float* p, float v) { simt::put(p, v); }
inline float4 read4(const float* p) { return simt::get<float4>(p); }
inline void write4(float* p, float4 v) { simt::put(p, v); }
inline uint4 load16(const void* p) { return simt::get<uint4>(p); }
inline uint32_t load2(const void* p) { return simt::get<uint16_t>(p); }
inline void store16(void* p, uint4 v) { simt::put(p, v); }

inline float widened(Half, uint16_t bits) {
  _Float16 v;
  std::memcpy(&v, &bits, 2);
  return static_cast<float>(v);
}
inline float widened(BFloat16, uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
inline uint16_t narrowed(Half, float v) {
  const _Float16 half = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline uint16_t narrowed(BFloat16, float v) {
  const uint32_t bits = __float_as_uint(v);
  return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <class T>
float2 unpack(T type, uint32_t bits) {
  return {widened(type, static_cast<uint16_t>(bits)), widened(type, static_cast<uint16_t>(bits >> 16))};
}
template <class T>
uint32_t pack(T type, float low, float high) {
  return narrowed(type, low) | static_cast<uint32_t>(narrowed(type, high)) << 16;
}

inline void copy16(void* to, const void* from) {
  simt::begin_to_write(to, 4);
  simt::machine.threads[simt::machine.running].copies.back().emplace_back(to, from);
}
inline void end_group_of_copies() { simt::machine.threads[simt::machine.running].copies.emplace_back(); }
template <int later>
void wait_for_copies() {
  auto& groups = simt::machine.threads[simt::machine.running].copies;
  for (; groups.size() > later + 1; groups.erase(groups.begin()))
    for (const auto& [to, from] : groups.front()) simt::put(to, simt::get<uint4>(from));
}

inline uint32_t pack_finite(BFloat16 type, float low, float high) {
  const auto finite = [](float v) { return v != v ? v : std::clamp(v, -0x1.fep127f, 0x1.fep127f); };
  return pack(type, finite(low), finite(high));
}
template <class T>
float widened_as(uint16_t bits) {
  return widened(T{}, bits);
}
template <class T>
float4 multiply_add(T, uint4 a, uint2 b, float4 c, int line = __builtin_LINE()) {
  simt::Thread& self = simt::machine.threads[simt::machine.running];
  const uint32_t factors[] = {a.x, a.y, a.z, a.w, b.x, b.y};
  const float sums[] = {c.x, c.y, c.z, c.w};
  std::copy_n(factors, 6, self.factors);
  std::copy_n(sums, 4, self.sums);
  if constexpr (std::is_same_v<T, TensorFloat32>)
    simt::exchange(line, 0xffffffffu, "product", simt::multiply_cut_matrices);
  else
    simt::exchange(line, 0xffffffffu, "product", simt::multiply_matrices<widened_as<T>>);
  return {self.sums[0], self.sums[1], self.sums[2], self.sums[3]};
}

}  // namespace linearpatch::cuda
