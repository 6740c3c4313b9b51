// Runs CUDA C++ kernels on the CPU. Every CUDA thread is a fiber (a stack of its own, switched by
// hand); fibers give way to each other at barriers and shuffles only. Kernels are compiled as plain
// C++; this header is the part of the CUDA language that they use.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

// What the memory checker must not look into.
#define SIMT_UNCHECKED __attribute__((no_sanitize("thread")))

using std::fma;

struct Index3 {
  unsigned x, y, z;
};
struct float2 {
  float x, y;
};

namespace simt {

// The order in which threads run between two meetings. Hardware promises none, so a kernel has to
// be right in all of them.
enum class Schedule : int {
  kForward,  // lowest lane of the next warp first
  kReverse,  // highest lane of the previous warp first; blocks from the last
  kRandom,   // any thread
  kGreedy,   // one warp as far as it can go, then another; threads of it in any order
};

struct Thread {
  Index3 thread_index;
  Index3 block_index;
  unsigned cluster_rank;
};
extern Thread* current;
extern Index3 block_size;
extern Index3 grid_size;

void sync_block(const char* file, int line);
void sync_cluster(const char* file, int line);
uint64_t shuffle_xor(uint32_t mask, uint64_t value, int lanes, const char* file, int line);
void* shared_memory();
// The place in block `rank` of the cluster that `p` is in this block's shared memory.
void* map_to_rank(void* p, unsigned rank);

// Copies by the running thread that take place when it waits for them, at the latest possible time.
void copy_async(void* to, const void* from, size_t bytes, const void* pc);
void copy_async_commit();
void copy_async_wait(size_t pending);

// Ends the launch with an error. The text names the running thread and where it last met others.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Tells the checker of an access that the compiler does not instrument.
void on_access(const void* p, size_t bytes, bool write, const void* pc);

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  int cluster;
};
// Runs body(context) as every thread. Returns nullptr, or what went wrong.
const char* run(const Launch& launch, void (*body)(void*), void* context);

template <class T>
SIMT_UNCHECKED T shuffle_xor(uint32_t mask, T value, int lanes, const char* file, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle_xor(mask, bits, lanes, file, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

#define threadIdx (::simt::current->thread_index)
#define blockIdx (::simt::current->block_index)
#define blockDim (::simt::block_size)
#define gridDim (::simt::grid_size)
#define __syncthreads() ::simt::sync_block(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  ::simt::shuffle_xor(mask, value, lanes, __FILE__, __LINE__)
