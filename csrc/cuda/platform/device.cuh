// All that the kernels use of the machine beyond the CUDA language itself, for nvcc.
// tests/simt/platform/device.cuh has the same names for the CPU; the include path decides.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include "coreai_torch/dtype.h"

namespace coreai_torch {

// Dynamic shared memory is the only kind that the kernels use.
#define COREAI_TORCH_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

// Threads that a multiprocessor has room for.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr int kMostThreads = 2048;
#else
constexpr int kMostThreads = 1536;
#endif

// ---- conversions -------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(Float16 value) {
  return __half2float(__ushort_as_half(value.bits));
}
__device__ __forceinline__ float to_float(BFloat16 value) {
  return __uint_as_float(uint32_t(value.bits) << 16);
}

// Two 16-bit numbers in a word, the first in the lower half.
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack2<Float16>(uint32_t word) {
  __half2 pair;
  memcpy(static_cast<void*>(&pair), &word, sizeof(word));
  return __half22float2(pair);
}
template <>
__device__ __forceinline__ float2 unpack2<BFloat16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

template <class T>
__device__ __forceinline__ uint32_t pack2(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack2<Float16>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t word;
  memcpy(&word, static_cast<const void*>(&pair), sizeof(word));
  return word;
}
template <>
__device__ __forceinline__ uint32_t pack2<BFloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t word;
  memcpy(&word, static_cast<const void*>(&pair), sizeof(word));
  return word;
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float reciprocal_sqrt(float value) { return rsqrtf(value); }
__device__ __forceinline__ double reciprocal_sqrt(double value) { return rsqrt(value); }

// ---- memory ------------------------------------------------------------------------------------

struct alignas(16) Word16 {
  uint32_t words[4];
};

// What the L2 cache lets go of, and when: the hardware's code for it.
struct L2Policy {
  uint64_t bits;
};
// Made anew where it is needed, which takes no time: the compiler would keep it in registers.
__device__ __forceinline__ L2Policy l2_policy(bool evict_last) {
  uint64_t last, normal;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(last));
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
  return {evict_last ? last : normal};
}

// Loads operands 0 to 3 if operand 5 is not 0, or else zeros. Without a branch, so that the
// loads before and after it are under way together.
#define COREAI_TORCH_IF_WANTED(load) \
  "{\n"                              \
  "  .reg .pred wanted;\n"           \
  "  setp.ne.u32 wanted, %5, 0;\n"   \
  "  mov.u32 %0, 0;\n"               \
  "  mov.u32 %1, 0;\n"               \
  "  mov.u32 %2, 0;\n"               \
  "  mov.u32 %3, 0;\n"               \
  "  @wanted " load                  \
  "\n"                               \
  "}"

// Reads of rows: zeros where they are not wanted.
__device__ __forceinline__ Word16 load_row(const Word16* p, bool wanted, L2Policy policy) {
  Word16 v;
  asm volatile(COREAI_TORCH_IF_WANTED("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %6;")
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(p), "r"(uint32_t(wanted)), "l"(policy.bits));
  return v;
}
template <class Unit>
__device__ __forceinline__ Unit load_row(const Unit* p, bool wanted, L2Policy) {
  return wanted ? __ldg(p) : Unit(0);
}
// The same into a register of its own. The compiler packs two of the above into one as they arrive,
// and waits for both.
__device__ __forceinline__ uint32_t load_row_apart(const uint16_t* p, bool wanted) {
  uint32_t v;
  asm volatile(
      "{\n"
      "  .reg .pred wanted;\n"
      "  setp.ne.u32 wanted, %2, 0;\n"
      "  mov.u32 %0, 0;\n"
      "  @wanted ld.global.u16 %0, [%1];\n"
      "}"
      : "=r"(v)
      : "l"(p), "r"(uint32_t(wanted)));
  return v;
}

// Reads of what other rows read too. It happens where it is written: the compiler would move it out
// of a loop, into registers that are not there.
__device__ __forceinline__ Word16 load_cached(const Word16* p, bool wanted) {
  Word16 v;
  asm volatile(COREAI_TORCH_IF_WANTED("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];")
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(p), "r"(uint32_t(wanted)));
  return v;
}
template <class Unit>
__device__ __forceinline__ Unit load_cached(const Unit* p, bool wanted) {
  return wanted ? __ldg(p) : Unit(0);
}

// Reads of what this thread has written in this launch, which those above might not see.
template <class Unit>
__device__ __forceinline__ Unit load_stored(const Unit* p) {
  return *p;
}

__device__ __forceinline__ void store(Word16* p, const Word16& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.words[0]),
               "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
               : "memory");
}
template <class Unit>
__device__ __forceinline__ void store(Unit* p, Unit v) {
  *p = v;
}

// ---- copies into shared memory that are under way while the thread goes on ----------------------

// The place belongs to the thread alone until it has waited.
__device__ __forceinline__ void copy_async(Word16* shared, const Word16* global, L2Policy policy) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to),
               "l"(global), "l"(policy.bits)
               : "memory");
}
// The copies since the last call are a batch, which may be empty.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all batches but the last `pending` have arrived.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- launches that follow one another ----------------------------------------------------------

// Lets the next launch take its places on the card, if it was asked to come early.
__device__ __forceinline__ void let_next_launch_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Of a launch that comes early: until what the one before has written can be read.
__device__ __forceinline__ void wait_for_last_launch() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- clusters of blocks ------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Not the aligned form: lanes of a warp may come out of a branch one after another.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// Writes to the place in block `rank` of the cluster that `p` is in this block's shared memory.
__device__ __forceinline__ void cluster_store(float* p, unsigned rank, float value) {
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}
#else  // compiled, but resident_clusters() is 0
constexpr bool kHasClusters = false;

__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void cluster_sync() {}
__device__ __forceinline__ void cluster_store(float*, unsigned, float) {}
#endif

// ---- host --------------------------------------------------------------------------------------

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, name, device) == cudaSuccess ? value : 0;
}
inline int multiprocessors(int device) {
  const int count = attribute(cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}
// The most that a launch can ask for.
inline int shared_memory_of_block(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}
inline int64_t l2_cache_bytes(int device) { return attribute(cudaDevAttrL2CacheSize, device); }
inline cudaError_t fill_zero(void* p, size_t bytes, cudaStream_t stream) {
  return cudaMemsetAsync(p, 0, bytes, stream);
}

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  cudaStream_t stream;
  int cluster = 1;     // blocks in a cluster
  bool early = false;  // may start before the launch before it has ended: the kernel waits itself
};

// What the runtime asks to know of a launch; the attributes must live as long as the result.
using LaunchAttributes = cudaLaunchAttribute[2];
inline cudaLaunchConfig_t launch_config(const Launch& how, LaunchAttributes& attributes) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = attributes;
  if (how.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(how.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (how.early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

// More shared memory than this has to be asked for.
constexpr size_t kSharedBytesByDefault = 48 * 1024;

template <class Args>
cudaError_t allow_shared_memory(void (*kernel)(Args), const Launch& how) {
  if (how.shared_bytes <= kSharedBytesByDefault) return cudaSuccess;
  return cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared_bytes));
}

// Was the code that was loaded compiled for the Hopper generation or later? PTX of an older target
// runs on newer cards, too, but has nothing of what they can do.
template <class Args>
bool is_for_hopper(void (*kernel)(Args)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// Can a launch start early, and wait by itself?
template <class Args>
bool can_start_early(int device, void (*kernel)(Args)) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9 && is_for_hopper(kernel);
}

// How many clusters of such a launch run at once; 0 where there can be none.
template <class Args>
int resident_clusters(int device, void (*kernel)(Args), Launch how) {
  if (attribute(cudaDevAttrClusterLaunch, device) == 0 || !is_for_hopper(kernel)) return 0;
  if (allow_shared_memory(kernel, how) != cudaSuccess) return 0;
  how.blocks = how.cluster;
  LaunchAttributes list;
  const cudaLaunchConfig_t config = launch_config(how, list);
  int count = 0;
  return cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess ? count : 0;
}

template <class Args>
cudaError_t launch(const Launch& how, void (*kernel)(Args), const Args& args) {
  if (how.blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = allow_shared_memory(kernel, how); error != cudaSuccess)
    return error;
  LaunchAttributes list;
  const cudaLaunchConfig_t config = launch_config(how, list);
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace coreai_torch
