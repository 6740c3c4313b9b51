// The interface of simd.h in double precision, for float64 input. Compiled for the baseline only:
// it is there for gradcheck and for reference runs, not for speed.
#pragma once

#include "cpu/simd/convert.h"

namespace coreai_torch {
namespace {

using Real = double;

typedef double F64x2 __attribute__((vector_size(16)));

typedef double Vector __attribute__((vector_size(32)));

struct Pair {
  static constexpr int kLanes = 4;
  F64x2 lo, hi;
};
struct OfBFloat16 : Pair {};

constexpr int kForwardRows = 1;
constexpr bool kStreams = false;
constexpr bool kStreamsAnyRow = false;

inline void split(Pair v, Vector* parts) {
  parts[0] = __builtin_shufflevector(v.lo, v.hi, 0, 1, 2, 3);
}

inline Pair splat(double v) { return {F64x2{v, v}, F64x2{v, v}}; }
inline Pair operator+(Pair a, Pair b) { return {a.lo + b.lo, a.hi + b.hi}; }
inline Pair operator-(Pair a, Pair b) { return {a.lo - b.lo, a.hi - b.hi}; }
inline Pair operator*(Pair a, Pair b) { return {a.lo * b.lo, a.hi * b.hi}; }

inline Pair load(const double* p) { return {load_as<F64x2>(p), load_as<F64x2>(p + 2)}; }
inline void store(double* p, Pair v) {
  store_as(p, v.lo);
  store_as(p + 2, v.hi);
}

inline Pair from_floats(F32x4 v) { return {F64x2{v[0], v[1]}, F64x2{v[2], v[3]}}; }
inline F32x4 to_floats(Pair v) {
  return F32x4{(float)v.lo[0], (float)v.lo[1], (float)v.hi[0], (float)v.hi[1]};
}

inline Pair load(const float* p) { return from_floats(load_as<F32x4>(p)); }
inline void store(float* p, Pair v) { store_as(p, to_floats(v)); }

// By way of float, as PyTorch converts.
template <class T>
inline Pair load(const T* p) {
  return from_floats(to_float(load_as<U16x4>(p), T()));
}
template <class T>
inline void store(T* p, Pair v) {
  store_as(p, from_float(to_floats(v), T()));
}
template <class T>
inline Pair round_to(Pair v) {
  return from_floats(to_float(from_float(to_floats(v), T()), T()));
}

}  // namespace
}  // namespace coreai_torch

#include "cpu/simd/first.h"
#include "cpu/simd/native.h"
#include "cpu/simd/normal.h"
