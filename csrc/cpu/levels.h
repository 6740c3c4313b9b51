// The SIMD levels of this architecture, lowest first: X(identifier, name). The names are the ones
// by which compilers know them (-march=), plus the feature that goes beyond. cmake/cpu_levels.cmake
// compiles the kernels once for each; older compilers leave the last one out.
#pragma once

#include "coreai_torch/cpu_level.h"

#if defined(COREAI_TORCH_HAS_FP16_LEVEL)
#define COREAI_TORCH_FP16_LEVEL(X) X(x86_64_v4_fp16, "x86-64-v4-fp16")
#else
#define COREAI_TORCH_FP16_LEVEL(X)
#endif

#if defined(__x86_64__)
#define COREAI_TORCH_CPU_LEVELS(X)    \
  X(x86_64, "x86-64")                 \
  X(x86_64_v3, "x86-64-v3")           \
  X(x86_64_v4, "x86-64-v4")           \
  X(x86_64_v4_bf16, "x86-64-v4-bf16") \
  COREAI_TORCH_FP16_LEVEL(X)
#elif defined(__aarch64__)
#define COREAI_TORCH_CPU_LEVELS(X) X(neon, "neon")
#else
#define COREAI_TORCH_CPU_LEVELS(X) X(portable, "portable")
#endif
