// Runs CUDA kernels as C++ on the CPU, one block after the other, each thread of a block as a fiber: for tests on machines
// without a GPU. Found in place of the CUDA toolkit's header of the same name by a build with PYZOO_CUDA=emulate.
//
// What it finds that a GPU may hide: barriers that not all threads of a block or a warp reach; and, in shared memory declared
// as pyzoo::Shared, an index out of bounds, a read of what nobody wrote, and two threads that touch the same element with no
// barrier between them, whatever the order they run in. Global memory is the tensors': the address sanitizer watches it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define PYZOO_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;

namespace emulator {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = (256 << 10) + 1088;  // of a thread: the frames of the sanitizers are large; not 2^n, for the caches' sake

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Thread {
  ucontext_t context;
  State state;
  dim3 index;
  uint32_t waits_for;  // lanes, at a barrier of its warp
  void* fake_stack;
};

// Barriers passed so far: what happened before one is ordered with what happens after.
struct Epoch {
  int64_t block = 0;
  int64_t warp[kMostThreads / kWarp] = {};
};

struct Machine {
  std::vector<Thread> threads = std::vector<Thread>(kMostThreads);
  std::unique_ptr<char[]> stacks{new char[kMostThreads * kStack]};
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  std::function<void()> kernel;
  std::string error;
  int count = 0, now = -1;  // threads of a block; the one that runs
  int started = 0;          // so many fibers wait for their next block
  Epoch epoch;
  int64_t block = 0;             // all blocks that ever ran, counted
  uint64_t slots[kMostThreads];  // what the lanes of a warp show each other
};

inline Machine& machine() {
  static Machine it;
  return it;
}

inline std::string where(int thread) {
  return "thread " + std::to_string(thread) + " of block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

inline void to_scheduler(bool for_ever = false) {
  Machine& m = machine();
  Thread& t = m.threads[m.now];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &t.fake_stack, m.scheduler_stack, m.scheduler_stack_size);
#endif
  swapcontext(&t.context, &m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t.fake_stack, nullptr, nullptr);
#endif
  (void)for_ever;
}

// Ends the kernel: the launch throws.
[[noreturn]] inline void fail(const std::string& what) {
  machine().error = where(machine().now) + ": " + what;
  to_scheduler(true);
  __builtin_unreachable();
}

inline void enter() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
  for (;;) {  // block after block
    try {
      m.kernel();
    } catch (const std::exception& e) {
      m.error = where(m.now) + ": " + e.what();
    }
    m.threads[m.now].state = State::done;
    to_scheduler();
  }
}

inline void resume(int thread) {
  Machine& m = machine();
  Thread& t = m.threads[thread];
  m.now = thread;
  threadIdx = t.index;
  t.state = State::ready;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, m.stacks.get() + thread * kStack, kStack);
#endif
  swapcontext(&m.scheduler, &t.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Lets those go on who wait for one another and are all there; false if nobody can.
inline bool release() {
  Machine& m = machine();
  const auto waits = [&](int t) { return m.threads[t].state == State::at_block_barrier; };
  int at_barrier = 0, done = 0;
  for (int t = 0; t < m.count; ++t) at_barrier += waits(t), done += m.threads[t].state == State::done;
  if (at_barrier == m.count) {
    for (int t = 0; t < m.count; ++t) m.threads[t].state = State::ready;
    ++m.epoch.block;
    return true;
  }
  bool any = false;
  for (int first = 0; first < m.count; first += kWarp) {
    const int lanes = std::min(kWarp, m.count - first);
    for (int i = 0; i < lanes; ++i) {
      const Thread& t = m.threads[first + i];
      if (t.state != State::at_warp_barrier) continue;
      const uint32_t mask = t.waits_for;
      bool all = true;
      for (int j = 0; j < kWarp; ++j)
        if (mask >> j & 1)
          all &= j < lanes && m.threads[first + j].state == State::at_warp_barrier && m.threads[first + j].waits_for == mask;
      if (!all) continue;
      for (int j = 0; j < lanes; ++j)
        if (mask >> j & 1) m.threads[first + j].state = State::ready;
      ++m.epoch.warp[first / kWarp];
      any = true;
    }
  }
  return any;
}

inline void run_block() {
  Machine& m = machine();
  ++m.block;
  m.epoch = {};
  for (int t = 0; t < m.count; ++t) {
    Thread& thread = m.threads[t];
    thread.state = State::ready;
    thread.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    if (t < m.started) continue;
    m.started = t + 1;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = m.stacks.get() + t * kStack;
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  const bool backwards = m.block % 2;  // nor one of the threads
  do {
    for (int i = 0; i < m.count && m.error.empty(); ++i)
      if (const int t = backwards ? m.count - 1 - i : i; m.threads[t].state == State::ready) resume(t);
    if (!m.error.empty()) return;
    int done = 0;
    for (int t = 0; t < m.count; ++t) done += m.threads[t].state == State::done;
    if (done == m.count) return;
  } while (release());
  for (m.now = 0; m.threads[m.now].state == State::done;) ++m.now;
  m.error = where(m.now) + " waits at a barrier that others of its " +
            (m.threads[m.now].state == State::at_block_barrier ? "block" : "warp") + " never reach";
}

inline void run(dim3 grid, dim3 block, std::function<void()> kernel) {
  Machine& m = machine();
  m.kernel = std::move(kernel);
  m.error.clear();
  gridDim = grid, blockDim = block;
  m.count = int(block.x * block.y * block.z);
  if (m.count < 1 || m.count > kMostThreads) throw std::runtime_error("a block of " + std::to_string(m.count) + " threads");
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  const bool backwards = m.block % 3 == 0;  // no order of the blocks may matter
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t b = backwards ? blocks - 1 - i : i;
    blockIdx = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    run_block();
    if (!m.error.empty()) {
      m.started = 0;  // what waits in the middle of a kernel starts anew
      throw std::runtime_error(m.error);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- shared memory

// One element: what it holds, and who touched it since which barrier.
template <class T>
class Cell {
 public:
  T read() {
    Machine& m = machine();
    if (block_ != m.block) fail("reads shared memory that nobody wrote");
    if (conflicts(writer_, written_))
      fail("reads shared memory that thread " + std::to_string(writer_) + " wrote, with no barrier between");
    if (reader_ == kNobody || read_.block != m.epoch.block) reader_ = m.now;
    else if (reader_ != m.now) reader_ = warp_of(reader_) == warp_of(m.now) ? kSomeOf - warp_of(m.now) : kMany;
    read_ = now();
    return value_;
  }
  void write(T value) {
    Machine& m = machine();
    if (block_ == m.block) {
      if (conflicts(writer_, written_))
        fail("writes shared memory that thread " + std::to_string(writer_) + " wrote, with no barrier between");
      if (conflicts(reader_, read_)) fail("writes shared memory that another thread reads, with no barrier between");
    }
    if (block_ != m.block) reader_ = kNobody;
    value_ = value, writer_ = m.now, written_ = now(), block_ = m.block;
  }

 private:
  static constexpr int kNobody = -1, kMany = -2, kSomeOf = -3;  // kSomeOf - w: several of warp w
  struct Time {
    int64_t block, warp;
  };
  static int warp_of(int who) { return who >= 0 ? who / kWarp : who <= kSomeOf ? kSomeOf - who : -1; }
  static Time now() { return {machine().epoch.block, machine().epoch.warp[warp_of(machine().now)]}; }
  static bool conflicts(int who, Time time) {
    const Time at = now();
    if (who == kNobody || who == machine().now || time.block != at.block) return false;
    return who == kMany || warp_of(who) != warp_of(machine().now) || time.warp == at.warp;
  }
  T value_;
  int64_t block_ = 0;
  int writer_ = kNobody, reader_ = kNobody;
  Time written_{}, read_{};
};

template <class T>
class Ref {
 public:
  explicit Ref(Cell<T>& cell) : cell_(cell) {}
  operator T() const { return cell_.read(); }
  T operator=(T value) const {
    cell_.write(value);
    return value;
  }
  T operator=(const Ref& other) const { return *this = T(other); }
  T operator+=(T value) const { return *this = T(*this) + value; }
  T operator|=(T value) const { return *this = T(*this) | value; }

 private:
  Cell<T>& cell_;
};

// ----------------------------------------------------------------------------------------------------------- barriers

inline void wait(State state, uint32_t lanes = 0) {
  Thread& t = machine().threads[machine().now];
  t.state = state, t.waits_for = lanes;
  to_scheduler();
}

template <class T>
T exchange(uint32_t lanes, T value, int from) {
  static_assert(sizeof(T) <= 8);
  Machine& m = machine();
  const int first = m.now / kWarp * kWarp;
  if (!(lanes >> (m.now - first) & 1)) fail("is not among the lanes that it names");
  std::memcpy(&m.slots[m.now], &value, sizeof(T));
  wait(State::at_warp_barrier, lanes);
  if (from < 0 || from >= kWarp || !(lanes >> from & 1)) from = m.now - first;
  T result;
  std::memcpy(&result, &m.slots[first + from], sizeof(T));
  wait(State::at_warp_barrier, lanes);
  return result;
}

inline int lane() { return machine().now % kWarp; }

// What all lanes of a warp show, of any size: faster than one exchange for each word.
template <class T>
void gather(const T& mine, T (&all)[kWarp]) {
  static T slots[kMostThreads];
  const int now = machine().now, first = now / kWarp * kWarp;
  slots[now] = mine;
  wait(State::at_warp_barrier, ~0u);
  std::copy_n(slots + first, kWarp, all);
  wait(State::at_warp_barrier, ~0u);
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::at_block_barrier); }
inline void __syncwarp(unsigned lanes = ~0u) { emulator::wait(emulator::State::at_warp_barrier, lanes); }

template <class T>
T __shfl_sync(unsigned lanes, T value, int from) {
  return emulator::exchange(lanes, value, from);
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int bits) {
  return emulator::exchange(lanes, value, emulator::lane() ^ bits);
}
template <class T>
T __shfl_down_sync(unsigned lanes, T value, int by) {
  return emulator::exchange(lanes, value, emulator::lane() + by);
}
template <class T>
T __shfl_up_sync(unsigned lanes, T value, int by) {
  return emulator::exchange(lanes, value, emulator::lane() - by);
}
inline unsigned __ballot_sync(unsigned lanes, int flag) {
  emulator::Machine& m = emulator::machine();
  const int first = m.now / emulator::kWarp * emulator::kWarp;
  m.slots[m.now] = flag != 0;
  emulator::wait(emulator::State::at_warp_barrier, lanes);
  unsigned bits = 0;
  for (int i = 0; i < emulator::kWarp; ++i)
    if (lanes >> i & 1) bits |= unsigned(m.slots[first + i]) << i;
  emulator::wait(emulator::State::at_warp_barrier, lanes);
  return bits;
}
inline int __any_sync(unsigned lanes, int flag) { return __ballot_sync(lanes, flag) != 0; }
inline int __syncthreads_or(int flag) {
  static int any;
  static int64_t block;
  emulator::Machine& m = emulator::machine();
  const int64_t now = m.block << 20 | m.epoch.block;
  if (block != now) block = now, any = 0;
  any |= flag != 0;
  __syncthreads();
  const int result = any;
  __syncthreads();
  return result;
}

// Blocks and threads take turns, so that nothing comes between.
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicOr(T* at, T value) {
  const T before = *at;
  *at = before | value;
  return before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
