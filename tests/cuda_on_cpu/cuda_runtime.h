// As much of CUDA as model/native/cuda uses, on the CPU, to test the kernels without a GPU.
//
// g++ finds this file in place of CUDA's header of that name. The threads of a block are fibres: each runs to a
// barrier, then the next. That finds wrong indices, reads of unwritten memory (shared memory starts as NaN) and, since
// the threads can also run in reverse order, missing barriers. It says nothing about speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define CUDART_VERSION 11080
#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719;

constexpr size_t kSharedBytes = 48 * 1024;
inline float4 shared_memory[kSharedBytes / sizeof(float4)];
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline cudaError_t last_error = cudaSuccess;
extern "C" {
inline int run_threads_reversed = 0;
}

inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}

inline void atomicAdd(float* target, float value) { *target += value; }

struct Fibre {
  ucontext_t begin;
  jmp_buf position;  // where it goes on: unlike swapcontext, jumps need no system call
  std::vector<char> stack;
  int thread;
};
inline jmp_buf scheduler;
inline Fibre* running;
inline std::vector<Fibre*> waiting;  // at a barrier
inline int started, ended;           // threads of the block
inline std::function<void()> body;

inline void leave() {
  if (!_setjmp(running->position)) _longjmp(scheduler, 1);
}

inline void __syncthreads() {
  waiting.push_back(running);
  leave();
}

// Runs one thread after the other until one waits: a block without barriers needs a single fibre.
inline void run_threads() {
  const int count = blockDim.x * blockDim.y;
  while (started < count) {
    const int thread = run_threads_reversed ? count - 1 - started : started;
    ++started;
    running->thread = thread;
    threadIdx = dim3(thread % blockDim.x, thread / blockDim.x, 0);
    body();
    ++ended;
  }
}

inline void run_fibre() {
  for (;; leave()) run_threads();
}

// Goes on with a fibre until it leaves.
inline void resume(Fibre* fibre) {
  running = fibre;
  threadIdx = dim3(fibre->thread % blockDim.x, fibre->thread / blockDim.x, 0);
  if (_setjmp(scheduler)) return;
  if (!fibre->stack.empty()) _longjmp(fibre->position, 1);
  fibre->stack.resize(64 * 1024);
  getcontext(&fibre->begin);
  fibre->begin.uc_stack.ss_sp = fibre->stack.data();
  fibre->begin.uc_stack.ss_size = fibre->stack.size();
  makecontext(&fibre->begin, run_fibre, 0);
  setcontext(&fibre->begin);
}

// Runs one block; false if some of its threads ended while others wait at a barrier.
inline bool run_block() {
  static std::vector<Fibre> fibres(1024);
  const int count = blockDim.x * blockDim.y;
  std::memset(shared_memory, 0xff, kSharedBytes);
  waiting.clear();
  started = ended = 0;
  for (int i = 0; started < count; ++i) resume(&fibres[i]);
  while (ended == 0) {
    std::vector<Fibre*> at_barrier;
    at_barrier.swap(waiting);
    for (Fibre* fibre : at_barrier) resume(fibre);
  }
  for (Fibre* fibre : waiting) fibre->stack.clear();  // it never goes on: the next block begins it anew
  return ended == count;
}

// What a launch does, with the limits of a real one.
template <class... P>
void launch_on_cpu(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, P... arguments) {
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || block.x * block.y > 1024 ||
      shared_bytes > kSharedBytes) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim = grid;
  blockDim = block;
  body = [=] { kernel(arguments...); };
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        if (!run_block()) last_error = cudaErrorLaunchFailure;
}
