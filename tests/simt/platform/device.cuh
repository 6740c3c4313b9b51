// All that the kernels use of the machine beyond the CUDA language itself, for the emulator.
// csrc/cuda/platform/device.cuh has the same names for nvcc; the include path decides.
#pragma once

#include <cuda_runtime_api.h>

#include "coreai_torch/dtype.h"
#include "simt.h"

namespace coreai_torch {

#define COREAI_TORCH_SHARED_MEMORY(name) \
  unsigned char* name = static_cast<unsigned char*>(::simt::shared_memory())

constexpr int kMostThreads = 2048;

// ---- conversions -------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Of numbers too, rounding to nearest even: the compiler's own half precision type does it.
inline float to_float(Float16 value) {
  _Float16 half;
  memcpy(&half, &value, sizeof(half));
  return float(half);
}
inline float to_float(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline uint32_t round_to(float value, Float16) {
  const _Float16 half = _Float16(value);
  uint16_t bits;
  memcpy(&bits, &half, sizeof(bits));
  return bits;
}
inline uint32_t round_to(float value, BFloat16) {
  if (value != value) return 0x7fff;
  const uint32_t bits = float_to_bits(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <class T>
float2 unpack2(uint32_t word) {
  return {to_float(T{uint16_t(word)}), to_float(T{uint16_t(word >> 16)})};
}
template <class T>
uint32_t pack2(float first, float second) {
  return round_to(first, T{}) | round_to(second, T{}) << 16;
}

inline float reciprocal_sqrt(float value) { return 1.0f / sqrtf(value); }
inline double reciprocal_sqrt(double value) { return 1.0 / sqrt(value); }

// ---- memory ------------------------------------------------------------------------------------

// Each access is one of the whole unit, as on the machine; the compiler would split it.
struct alignas(16) Word16 {
  uint32_t words[4];
};

struct L2Policy {};
inline L2Policy l2_policy(bool) { return {}; }

template <class Unit>
SIMT_UNCHECKED __attribute__((noinline)) Unit load_row(const Unit* p, bool wanted, L2Policy) {
  if (!wanted) return Unit();
  ::simt::on_access(p, sizeof(Unit), false, __builtin_return_address(0));
  return *p;
}
inline uint32_t load_row_apart(const uint16_t* p, bool wanted) { return load_row(p, wanted, {}); }
template <class Unit>
SIMT_UNCHECKED __attribute__((noinline)) Unit load_cached(const Unit* p, bool wanted) {
  if (!wanted) return Unit();
  ::simt::on_access(p, sizeof(Unit), false, __builtin_return_address(0));
  return *p;
}
template <class Unit>
SIMT_UNCHECKED __attribute__((noinline)) Unit load_stored(const Unit* p) {
  ::simt::on_access(p, sizeof(Unit), false, __builtin_return_address(0));
  return *p;
}
template <class Unit>
SIMT_UNCHECKED __attribute__((noinline)) void store(Unit* p, Unit v) {
  ::simt::on_access(p, sizeof(Unit), true, __builtin_return_address(0));
  *p = v;
}

// ---- copies into shared memory that are under way while the thread goes on ----------------------

SIMT_UNCHECKED __attribute__((noinline)) inline void copy_async(
    Word16* shared, const Word16* global, L2Policy) {
  ::simt::copy_async(shared, global, sizeof(Word16), __builtin_return_address(0));
}
inline void copy_async_commit() { ::simt::copy_async_commit(); }
template <int pending>
void copy_async_wait() {
  ::simt::copy_async_wait(pending);
}

// ---- launches that follow one another ----------------------------------------------------------

inline void let_next_launch_start() {}
inline void wait_for_last_launch() {}

// ---- clusters of blocks ------------------------------------------------------------------------

constexpr bool kHasClusters = true;

inline unsigned cluster_rank() { return ::simt::current->cluster_rank; }
#define cluster_sync() ::simt::sync_cluster(__FILE__, __LINE__)
inline void cluster_arrive() {}
#define cluster_wait() cluster_sync()
inline void cluster_store(float* p, unsigned rank, float value) {
  *static_cast<float*>(::simt::map_to_rank(p, rank)) = value;
}

// ---- host --------------------------------------------------------------------------------------

// The card that is pretended; tests set it.
struct Card {
  int multiprocessors = 3;
  bool clusters = true;
  int shared_memory_of_block = 227 * 1024;
};
inline Card card;
inline const char* last_error = nullptr;  // what went wrong in the last launch
inline int launches = 0;

inline int multiprocessors(int) { return card.multiprocessors; }
inline int shared_memory_of_block(int) { return card.shared_memory_of_block; }
inline int64_t l2_cache_bytes(int) { return 1 << 20; }
inline cudaError_t fill_zero(void* p, size_t bytes, cudaStream_t) {
  memset(p, 0, bytes);
  return cudaSuccess;
}

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  cudaStream_t stream;
  int cluster = 1;
  bool early = false;
};

template <class Args>
bool can_start_early(int, void (*)(Args)) {
  return true;
}

template <class Args>
int resident_clusters(int, void (*)(Args), const Launch& how) {
  if (!card.clusters) return 0;
  return card.multiprocessors > how.cluster ? card.multiprocessors / how.cluster : 1;
}

template <class Args>
cudaError_t launch(const Launch& how, void (*kernel)(Args), const Args& args) {
  if (how.blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  struct Call {
    void (*kernel)(Args);
    const Args& args;
    SIMT_UNCHECKED static void run(void* call) {
      static_cast<Call*>(call)->kernel(static_cast<Call*>(call)->args);
    }
  } call = {kernel, args};
  ++launches;
  if (how.shared_bytes > size_t(card.shared_memory_of_block)) {
    last_error = "more shared memory than a block of this card gets";
    return cudaErrorInvalidConfiguration;
  }
  last_error =
      ::simt::run({how.blocks, how.threads, how.shared_bytes, how.cluster}, Call::run, &call);
  return last_error ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace coreai_torch
