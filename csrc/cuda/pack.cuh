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
    uint32_t words[kBytes < 4 ? 1 : kBytes / 4];  // in use for 16-bit elements
  };

  __device__ __forceinline__ Pack() {
    if constexpr (sizeof(Unit) == 16) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) units[i] = Word16{{0, 0, 0, 0}};
    } else if constexpr (kBytes == 2) {
      words[0] = 0;
    } else {
      units[0] = 0;
    }
  }

  // Zeros where it is not wanted.
  __device__ __forceinline__ void load_row(const T* p, bool wanted, L2Policy policy) {
    load(p, [=](const Unit* unit) { return coreai_torch::load_row(unit, wanted, policy); });
  }
  // The same, to be used only when much else has been done. A single element of 16 bits has a
  // register of its own then.
  __device__ __forceinline__ void load_row_ahead(const T* p, bool wanted, L2Policy policy) {
    if constexpr (kBytes == 2) {
      words[0] = load_row_apart(reinterpret_cast<const Unit*>(p), wanted);
    } else {
      load_row(p, wanted, policy);
    }
  }
  __device__ __forceinline__ void load_cached(const T* p, bool wanted) {
    load(p, [=](const Unit* unit) { return coreai_torch::load_cached(unit, wanted); });
  }
  // What was written in this launch, or in the one before it, which those above might not see.
  __device__ __forceinline__ void load_stored(const T* p) {
    load(p, [](const Unit* unit) { return coreai_torch::load_stored(unit); });
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kBytes == 2) {
      coreai_torch::store(reinterpret_cast<Unit*>(p), Unit(words[0]));
    } else {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        coreai_torch::store(reinterpret_cast<Unit*>(p) + i, units[i]);
      }
    }
  }

  // By way of shared memory: unit i lies `stride` units behind unit 0.
  template <int stride>
  static __device__ __forceinline__ void copy_async(Word16* shared, const T* p, L2Policy policy) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      coreai_torch::copy_async(shared + i * stride, reinterpret_cast<const Word16*>(p) + i, policy);
    }
  }
  template <int stride>
  __device__ __forceinline__ void load_shared(const Word16* shared) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) units[i] = shared[i * stride];
  }

  // What was unpacked before is unpacked anew when it is used again, instead of being kept in twice
  // the registers: blockIdx.z is 0, but the compiler does not know.
  __device__ __forceinline__ void stay_packed() {
    if constexpr (kIs16Bit<T> && kBytes >= 4) {
#pragma unroll
      for (int i = 0; i < kBytes / 4; ++i) words[i] ^= blockIdx.z;
    }
  }

  // All elements as float (double where T is double).
  __device__ __forceinline__ void unpack(Accumulate<T> (&values)[N]) const {
    if constexpr (!kIs16Bit<T>) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = elements[i];
    } else if constexpr (N == 1) {
      values[0] = to_float(T{uint16_t(words[0])});
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
      words[0] = pack2<T>(float(values[0]), 0.0f);
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

 private:
  template <class Load>
  __device__ __forceinline__ void load(const T* p, Load&& load) {
    if constexpr (kBytes == 2) {
      words[0] = load(reinterpret_cast<const Unit*>(p));
    } else {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) units[i] = load(reinterpret_cast<const Unit*>(p) + i);
    }
  }
};

}  // namespace coreai_torch
