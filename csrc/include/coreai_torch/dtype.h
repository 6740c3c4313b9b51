// Element types of the kernels. Framework-free.
#pragma once

#include <stdint.h>

namespace coreai_torch {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

// 16-bit floating point as stored in memory. Arithmetic happens in float.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace coreai_torch
