#include "cpu/levels.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace coreai_torch {
namespace {

#define COREAI_TORCH_LEVEL_NAME(id, name) name,
constexpr const char* kNames[] = {COREAI_TORCH_CPU_LEVELS(COREAI_TORCH_LEVEL_NAME)};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

#if defined(__x86_64__)
#if defined(__clang_major__) && \
    __clang_major__ < 18  // knows no levels, and not all of their features
bool is_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool is_v4() {
  return is_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#else  // the same words as the compile flags, so that test and flags cannot drift apart
bool is_v3() { return __builtin_cpu_supports("x86-64-v3"); }
bool is_v4() { return __builtin_cpu_supports("x86-64-v4"); }
#endif
bool is_v4_bf16() { return is_v4() && __builtin_cpu_supports("avx512bf16"); }
// Of bit 23 of EDX of leaf 7 not every compiler has a name (Intel, Architecture Instruction Set
// Extensions Programming Reference, 319433).
bool is_v4_fp16() {
  unsigned eax, ebx, ecx, edx;
  return is_v4_bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 23 & 1) != 0;
}
#endif

int find_level(const char* name) {
  for (int level = 0; level < kCount; ++level) {
    if (std::strcmp(kNames[level], name) == 0) return level;
  }
  return -1;
}

int best_level(int highest) {
  while (!cpu_level_supported(highest)) --highest;
  return highest;
}

// PyTorch's own switch caps the level, so that one variable lowers both libraries.
int cap_of_aten_capability() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  if (capability == nullptr) return kCount - 1;
  if (std::strcmp(capability, "default") == 0) return 0;
  if (std::strcmp(capability, "avx2") == 0 && kCount > 1) return 1;
  return kCount - 1;
}

int initial_level() {
  const int automatic = best_level(cap_of_aten_capability());
  const char* forced = std::getenv("COREAI_TORCH_CPU_LEVEL");
  if (forced == nullptr || *forced == '\0') return automatic;
  const int level = find_level(forced);
  if (level >= 0 && cpu_level_supported(level)) return level;
  std::fprintf(
      stderr,
      "coreai_torch: expected COREAI_TORCH_CPU_LEVEL to name a SIMD level that this processor "
      "runs, "
      "got %s; using %s\n",
      forced, kNames[automatic]);
  return automatic;
}

std::atomic<int>& current_level() {
  static std::atomic<int> level{initial_level()};
  return level;
}

}  // namespace

int cpu_level_count() { return kCount; }

const char* cpu_level_name(int level) { return kNames[level]; }

bool cpu_level_supported(int level) {
#if defined(__x86_64__)
  switch (level) {
    case 1:
      return is_v3();
    case 2:
      return is_v4();
    case 3:
      return is_v4_bf16();
    case 4:
      return is_v4_fp16();
  }
#endif
  return level == 0;
}

int cpu_level() { return current_level().load(std::memory_order_relaxed); }

bool set_cpu_level(const char* name) {
  const int level = name == nullptr ? best_level(cap_of_aten_capability()) : find_level(name);
  if (level < 0 || !cpu_level_supported(level)) return false;
  current_level().store(level, std::memory_order_relaxed);
  return true;
}

}  // namespace coreai_torch
