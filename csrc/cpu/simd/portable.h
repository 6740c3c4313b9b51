// SIMD for any processor, on 128-bit vectors of the compiler's own vector extension. See simd.h for
// what a level provides.
#pragma once

#include "cpu/simd/convert.h"

namespace coreai_torch {
namespace {

using Real = float;

typedef float Vector __attribute__((vector_size(32)));

struct Pair {
  static constexpr int kLanes = 8;
  F32x4 lo, hi;
};
struct OfBFloat16 : Pair {};

constexpr int kForwardRows = 1;
constexpr bool kStreams = false;
constexpr bool kStreamsAnyRow = false;

inline void split(Pair v, Vector* parts) {
  parts[0] = __builtin_shufflevector(v.lo, v.hi, 0, 1, 2, 3, 4, 5, 6, 7);
}

inline Pair splat(float v) { return {F32x4{v, v, v, v}, F32x4{v, v, v, v}}; }
inline Pair operator+(Pair a, Pair b) { return {a.lo + b.lo, a.hi + b.hi}; }
inline Pair operator-(Pair a, Pair b) { return {a.lo - b.lo, a.hi - b.hi}; }
inline Pair operator*(Pair a, Pair b) { return {a.lo * b.lo, a.hi * b.hi}; }

inline Pair load(const float* p) { return {load_as<F32x4>(p), load_as<F32x4>(p + 4)}; }
inline void store(float* p, Pair v) {
  store_as(p, v.lo);
  store_as(p + 4, v.hi);
}

template <class T>
inline Pair load(const T* p) {
  return {to_float(load_as<U16x4>(p), T()), to_float(load_as<U16x4>(p + 4), T())};
}
template <class T>
inline void store(T* p, Pair v) {
  store_as(p, from_float(v.lo, T()));
  store_as(p + 4, from_float(v.hi, T()));
}
inline void store(BFloat16* p, OfBFloat16 v) {
  store_as(p, from_float_of_bfloat16(v.lo));
  store_as(p + 4, from_float_of_bfloat16(v.hi));
}
template <class T>
inline Pair round_to(OfBFloat16 v) {
  return {to_float(from_float_of_bfloat16(v.lo), T()), to_float(from_float_of_bfloat16(v.hi), T())};
}
template <class T>
inline Pair round_to(Pair v) {
  return {to_float(from_float(v.lo, T()), T()), to_float(from_float(v.hi, T()), T())};
}

}  // namespace
}  // namespace coreai_torch

#include "cpu/simd/first.h"
#include "cpu/simd/native.h"
#include "cpu/simd/normal.h"
