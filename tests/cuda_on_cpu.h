// What the CUDA sources need of CUDA, on a CPU: the tests run the very kernels where no GPU is.
//
// Each thread of a block is a fiber, which runs until it waits for its warp (a shuffle) or for its
// block (__syncthreads). One warp runs as far as it can, then the next, in an order that is drawn
// anew at each barrier; so a kernel that needs a barrier and has none goes wrong. The blocks of a
// launch run one after another, in a random order too. Shared memory is at first full of NaN.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct Stream {};
using cudaStream_t = Stream*;

inline dim3 blockIdx, blockDim, gridDim;
#define threadIdx (::cuda_on_cpu::block.current->index)

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr int kProcessors = 2;
constexpr unsigned char kNaN = 0xff;  // each byte of it

struct Fiber {
  enum State { kReady, kWaitsForWarp, kWaitsForBlock, kDone };
  static constexpr size_t kStack = 1 << 17;

  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;  // where it begins
  jmp_buf place;     // and where it goes on: a jump is 50 times as fast as swapcontext
  bool started;
  State state;
  dim3 index;
  unsigned shuffles;
  alignas(16) char given[2][16];  // to the last shuffle and to the one before
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> dynamic_shared;
  std::set<void*> shared;  // what this block has of other shared memory
  std::function<void()> kernel;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  std::minstd_rand random;
};

inline Block block;

inline void wait(Fiber::State state) {
  block.current->state = state;
  if (!_setjmp(block.current->place)) _longjmp(block.scheduler, 1);
}

[[gnu::noinline]] inline void go_on(Fiber& fiber) {
  block.current = &fiber;
  if (_setjmp(block.scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void run_fiber() {
  block.kernel();
  wait(Fiber::kDone);
}

using Fibers = std::vector<Fiber>::iterator;

inline bool any(Fibers first, Fibers last, Fiber::State state) {
  return std::any_of(first, last, [=](const Fiber& f) { return f.state == state; });
}

inline void make_ready(Fibers first, Fibers last, Fiber::State waiting) {
  for (; first != last; ++first)
    if (first->state == waiting) first->state = Fiber::kReady;
}

// Returns whether a thread of the warp could go on.
inline bool run_warp(unsigned warp) {
  const auto first = block.fibers.begin() + warp * kWarp, last = first + kWarp;
  if (!any(first, last, Fiber::kReady)) return false;
  std::array<unsigned, kWarp> lanes;
  std::iota(lanes.begin(), lanes.end(), 0u);
  std::shuffle(lanes.begin(), lanes.end(), block.random);
  for (const unsigned lane : lanes)
    if (first[lane].state == Fiber::kReady) go_on(first[lane]);
  // A shuffle needs every thread of the warp.
  const auto waits = [](const Fiber& f) { return f.state == Fiber::kWaitsForWarp; };
  if (std::all_of(first, last, waits)) make_ready(first, last, Fiber::kWaitsForWarp);
  return true;
}

inline void run_block(unsigned threads) {
  std::fill(block.dynamic_shared.begin(), block.dynamic_shared.end(), kNaN);
  block.shared.clear();
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = block.fibers[t];
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = Fiber::kStack;
    makecontext(&f.start, run_fiber, 0);
    f.started = false;
    f.state = Fiber::kReady;
    f.index = dim3(t, 0, 0);
    f.shuffles = 0;
  }
  const auto first = block.fibers.begin(), last = first + threads;
  std::vector<unsigned> warps(threads / kWarp);
  std::iota(warps.begin(), warps.end(), 0u);
  do {
    make_ready(first, last, Fiber::kWaitsForBlock);
    std::shuffle(warps.begin(), warps.end(), block.random);
    while (std::any_of(warps.begin(), warps.end(), run_warp)) {
    }
    TORCH_CHECK(!any(first, last, Fiber::kWaitsForWarp), "a thread waits for others of its warp");
  } while (any(first, last, Fiber::kWaitsForBlock));
}

inline void launch(dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t,
                   std::function<void()> kernel) {
  TORCH_CHECK(threads % kWarp == 0 && threads <= 1024 && shared_bytes <= 48 << 10);
  if (block.fibers.size() < threads) block.fibers = std::vector<Fiber>(threads);
  block.dynamic_shared.resize(shared_bytes);
  block.kernel = std::move(kernel);
  gridDim = grid;
  blockDim = dim3(threads);
  std::vector<unsigned> blocks(grid.x * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), block.random);
  for (const unsigned b : blocks) {
    blockIdx = dim3(b % grid.x, b / grid.x, 0);
    run_block(threads);
  }
}

// For a static variable that stands for one in shared memory: the block's first thread fills it.
template <typename T>
void declare(T& variable) {
  if (block.shared.insert(&variable).second) std::memset(&variable, kNaN, sizeof(T));
}

}  // namespace cuda_on_cpu

// ---- What a kernel calls ------------------------------------------------------------------------

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::Fiber::kWaitsForBlock); }
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  using namespace cuda_on_cpu;
  static_assert(sizeof(T) <= 16);
  const unsigned turn = block.current->shuffles++ % 2;
  std::memcpy(block.current->given[turn], &value, sizeof(T));
  wait(Fiber::kWaitsForWarp);
  const Fiber& other = block.fibers[block.current->index.x ^ mask];
  std::memcpy(&value, other.given[turn], sizeof(T));
  return value;
}

inline unsigned atomicInc(unsigned* number, unsigned most) {
  const unsigned old = *number;
  *number = old >= most ? 0 : old + 1;
  return old;
}

template <typename T>
T __ldcg(const T* number) { return *number; }
inline float __fdividef(float a, float b) { return a / b; }
inline float max(float a, float b) { return std::fmax(a, b); }  // as CUDA's: not NaN
inline double max(double a, double b) { return std::fmax(a, b); }

// ---- What the host calls ------------------------------------------------------------------------

enum { cudaDevAttrMultiProcessorCount };
inline int cudaDeviceGetAttribute(int* value, int, int) {
  *value = cuda_on_cpu::kProcessors;
  return 0;
}
inline int cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return 0;
}
#define C10_CUDA_CHECK(call) (void)(call)
#define C10_CUDA_KERNEL_LAUNCH_CHECK()

namespace c10::cuda {

using CUDAStream = cudaStream_t;
inline CUDAStream getCurrentCUDAStream() { return nullptr; }
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
enum class CaptureStatus { None };
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() { return CaptureStatus::None; }

}  // namespace c10::cuda
