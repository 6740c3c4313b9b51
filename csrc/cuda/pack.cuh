// Elements of one memory access: loaded, kept packed in registers, read and written as numbers.
#pragma once

#include "device.cuh"

namespace coreai_torch {

// The type in which rows are summed and scaled.
template <class T>
struct AccumulateOf {
  using Type = float;
};
template <>
struct AccumulateOf<double> {
  using Type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::Type;

template <class T>
constexpr bool kIs16Bit = sizeof(T) == 2;

// An unsigned integer, or Word16, as wide as an access of `bytes`.
template <int bytes>
struct UnitOf {
  static_assert(bytes % 16 == 0, "accesses are of 2, 4, 8 or a multiple of 16 bytes");
  using Type = Word16;
};
template <>
struct UnitOf<2> {
  using Type = uint16_t;
};
template <>
struct UnitOf<4> {
  using Type = uint32_t;
};
template <>
struct UnitOf<8> {
  using Type = uint64_t;
};

// N adjacent elements, aligned to their own size or to 16 bytes.
template <class T, int N>
struct Pack {
  static constexpr int kBytes = N * int(sizeof(T));
  using Unit = typename UnitOf<kBytes>::Type;
  static constexpr int kUnits = kBytes / int(sizeof(Unit));

  union {
    Unit units[kUnits];
    T elements[N];
    uint32_t words[kBytes < 4 ? 1 : kBytes / 4];  // in use for pairs of 16-bit elements
  };

  __device__ __forceinline__ Pack() {
    if constexpr (sizeof(Unit) == 16) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) units[i] = Word16{{0, 0, 0, 0}};
    } else {
      units[0] = 0;
    }
  }

  __device__ __forceinline__ void load_streaming(const T* p) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      units[i] = coreai_torch::load_streaming(reinterpret_cast<const Unit*>(p) + i);
    }
  }
  __device__ __forceinline__ void load_cached(const T* p) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      units[i] = coreai_torch::load_cached(reinterpret_cast<const Unit*>(p) + i);
    }
  }
  // What this thread has stored itself.
  __device__ __forceinline__ void load_stored(const T* p) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      units[i] = coreai_torch::load_stored(reinterpret_cast<const Unit*>(p) + i);
    }
  }
  __device__ __forceinline__ void store_streaming(T* p) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      coreai_torch::store_streaming(reinterpret_cast<Unit*>(p) + i, units[i]);
    }
  }

  // All elements as float (double where T is double).
  __device__ __forceinline__ void unpack(Accumulate<T> (&values)[N]) const {
    if constexpr (!kIs16Bit<T>) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = elements[i];
    } else if constexpr (N == 1) {
      values[0] = to_float(elements[0]);
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const float2 pair = unpack2<T>(words[i / 2]);
        values[i] = pair.x;
        values[i + 1] = pair.y;
      }
    }
  }

  // Rounds to nearest even.
  template <class Number>
  __device__ __forceinline__ void pack(const Number (&values)[N]) {
    if constexpr (!kIs16Bit<T>) {
#pragma unroll
      for (int i = 0; i < N; ++i) elements[i] = T(values[i]);
    } else if constexpr (N == 1) {
      elements[0].bits = uint16_t(pack2<T>(float(values[0]), 0.0f));
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        words[i / 2] = pack2<T>(float(values[i]), float(values[i + 1]));
      }
    }
  }

  // Elementwise; each sum is rounded.
  __device__ __forceinline__ void add(const Pack& other) {
    Accumulate<T> sums[N], others[N];
    unpack(sums);
    other.unpack(others);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += others[i];
    pack(sums);
  }
};

}  // namespace coreai_torch
