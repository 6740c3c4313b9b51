// Four floats in the compiler's own vector extension (SSE2 on baseline x86-64, NEON on aarch64),
// and their conversion from and to the 16-bit types, exact to the bit on any processor.
#pragma once

#include <stdint.h>

#include "coreai_torch/dtype.h"

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace coreai_torch {
namespace {

typedef float F32x4 __attribute__((vector_size(16)));
typedef uint32_t U32x4 __attribute__((vector_size(16)));
typedef int32_t I32x4 __attribute__((vector_size(16)));
typedef uint16_t U16x4 __attribute__((vector_size(8)));

inline U32x4 select(I32x4 mask, U32x4 yes, U32x4 no) {
  return ((U32x4)mask & yes) | (~(U32x4)mask & no);
}

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
inline void store_as(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

inline U32x4 widen(U16x4 v) { return __builtin_convertvector(v, U32x4); }
inline U16x4 narrow(U32x4 v) { return __builtin_convertvector(v, U16x4); }

inline F32x4 to_float(U16x4 v, BFloat16) { return (F32x4)(widen(v) << 16); }

// To nearest, ties to even. Not for NaNs, but those of OfBFloat16 (simd.h).
inline U32x4 rounded_upper_half(F32x4 v) {
  const U32x4 bits = (U32x4)v;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline U16x4 from_float_of_bfloat16(F32x4 v) { return narrow(rounded_upper_half(v)); }
inline U16x4 from_float(F32x4 v, BFloat16) {
  const U32x4 quiet = ((U32x4)v >> 16) | 0x40u;  // a NaN stays one
  return narrow(select(v == v, rounded_upper_half(v), quiet));
}

#if defined(__ARM_NEON)

inline F32x4 to_float(U16x4 v, Float16) {
  return (F32x4)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)v));
}
inline U16x4 from_float(F32x4 v, Float16) {
  return (U16x4)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v));
}

#else

inline F32x4 to_float(U16x4 v, Float16) {
  const U32x4 half = widen(v);
  const U32x4 sign = (half & 0x8000u) << 16;
  // Exponent and mantissa moved to their places in a float are 2^-112 times the value, denormals
  // included; Inf and NaN come out as 2^16 and above and get the float's largest exponent.
  const U32x4 moved = (half & 0x7fffu) << 13;
  const F32x4 scaled = (F32x4)moved * 0x1p112f;
  const U32x4 magnitude = select(scaled >= 65536.0f, (U32x4)scaled | 0x7f800000u, (U32x4)scaled);
  return (F32x4)(magnitude | sign);
}

inline U16x4 from_float(F32x4 v, Float16) {
  const U32x4 bits = (U32x4)v;
  const U32x4 sign = (bits >> 16) & 0x8000u;
  const U32x4 magnitude = bits & 0x7fffffffu;
  // Normal results: drop 13 bits of mantissa (to nearest, ties to even) and rebias the exponent.
  const U32x4 rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  const U32x4 normal = (rounded - 0x38000000u) >> 13;
  // Denormal results are multiples of 2^-24, the unit in the last place of a float in [0.5, 1).
  const U32x4 denormal = (U32x4)((F32x4)magnitude + 0.5f) - 0x3f000000u;
  U32x4 half = select((I32x4)magnitude < 0x38800000, denormal, normal);   // 2^-14
  half = select((I32x4)rounded >= 0x47800000, U32x4{} + 0x7c00u, half);   // 2^16 and above: Inf
  half = select((I32x4)magnitude > 0x7f800000, U32x4{} + 0x7e00u, half);  // NaN
  return narrow(half | sign);
}

#endif

}  // namespace
}  // namespace coreai_torch
