// SIMD for x86-64-v3 (AVX2 and F16C). See simd.h for what a level provides.
#pragma once

#include <immintrin.h>

namespace coreai_torch {
namespace {

using Real = float;

using Vector = __m256;

struct Pair {
  static constexpr int kLanes = 16;
  static constexpr bool kHasShortNaNs = false;
  __m256 lo, hi;
};
struct OfBFloat16 : Pair {
  static constexpr bool kHasShortNaNs = true;
};

constexpr int kForwardRows = 2;
constexpr bool kStreams = true;
constexpr bool kStreamsAnyRow = false;

inline void split(Pair v, Vector* parts) {
  parts[0] = v.lo;
  parts[1] = v.hi;
}

inline Pair splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline Pair operator+(Pair a, Pair b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Pair operator-(Pair a, Pair b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Pair operator*(Pair a, Pair b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}

inline __m256i load_256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m128i load_128(const void* p) { return _mm_loadu_si128((const __m128i*)p); }

inline Pair load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
// `unpack` widens eight numbers of 16 bits.
inline __m256 unpack(__m128i v, Float16) { return _mm256_cvtph_ps(v); }
// The load puts them into both halves: one shuffle for a widening and a shift.
inline __m256 unpack(__m128i v, BFloat16) {
  const __m256i twice = _mm256_broadcastsi128_si256(v);
  const __m256i upper_halves = _mm256_set_epi8(
      15, 14, -1, -1, 13, 12, -1, -1, 11, 10, -1, -1, 9, 8, -1, -1,  //
      7, 6, -1, -1, 5, 4, -1, -1, 3, 2, -1, -1, 1, 0, -1, -1);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, upper_halves));
}
template <class T>
inline Pair load(const T* p) {
  return {unpack(load_128(p), T()), unpack(load_128(p + 8), T())};
}

// The float whose upper half is `v` rounded to bfloat16 (to nearest, ties to even; a NaN stays
// one). The lower half is rubbish.
template <class Values>
inline __m256i bfloat16_in_upper_half(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  if constexpr (Values::kHasShortNaNs) return rounded;
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), is_nan));
}

// 16 numbers of 16 bits.
inline __m256i pack(Pair v, Float16) {
  const __m128i lo = _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT);
  const __m128i hi = _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(lo), hi, 1);
}
template <class Values>
inline __m256i pack(Values v, BFloat16) {
  const __m256i lo = _mm256_srli_epi32(bfloat16_in_upper_half<Values>(v.lo), 16);
  const __m256i hi = _mm256_srli_epi32(bfloat16_in_upper_half<Values>(v.hi), 16);
  const __m256i packed = _mm256_packus_epi32(lo, hi);  // by 128-bit halves: 0 2 1 3
  return _mm256_permute4x64_epi64(packed, 0xd8);
}

inline void store(float* p, Pair v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
inline void store(Float16* p, Pair v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}
template <class Values>
inline void store(BFloat16* p, Values v) {
  _mm256_storeu_si256((__m256i*)p, pack(v, BFloat16()));
}

// The first `count` of eight numbers, and zeros. What is not one instruction is for the ends of
// rows only, and would take registers from the loops before them if it were inlined.
inline __m256 load_first_half(const float* p, int64_t count) {
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lanes));
}
template <class T>
__attribute__((noinline)) __m128i load_first_half(const T* p, int64_t count) {
  if (count >= 8) return load_128(p);
  uint64_t four = 0, rest = 0;
  if (count & 4) {
    __builtin_memcpy(&four, p, 8);
    p += 4;
  }
  if (count & 2) {
    __builtin_memcpy(&rest, p, 4);
    p += 2;
  }
  if (count & 1) {
    uint16_t last;
    __builtin_memcpy(&last, p, 2);
    rest |= uint64_t(last) << (count & 2 ? 32 : 0);
  }
  return count & 4 ? _mm_set_epi64x(rest, four) : _mm_cvtsi64_si128(rest);
}
inline Pair load_first(const float* p, int64_t count) {
  return {load_first_half(p, count), load_first_half(p + 8, count - 8)};
}
template <class T>
inline Pair load_first(const T* p, int64_t count) {
  const Pair v{unpack(load_first_half(p, count), T()), _mm256_setzero_ps()};
  return count <= 8 ? v : Pair{v.lo, unpack(load_first_half(p + 8, count - 8), T())};
}

__attribute__((noinline)) void store_first_half(float* p, __m256 v, int64_t count) {
  if (count >= 8) return _mm256_storeu_ps(p, v);
  __m128 rest = _mm256_castps256_ps128(v);
  if (count & 4) {
    _mm_storeu_ps(p, rest);
    rest = _mm256_extractf128_ps(v, 1);
    p += 4;
  }
  if (count & 2) {
    _mm_storel_pi((__m64*)p, rest);
    rest = _mm_movehl_ps(rest, rest);
    p += 2;
  }
  if (count & 1) _mm_store_ss(p, rest);
}
template <class T>
__attribute__((noinline)) void store_first_half(T* p, __m128i v, int64_t count) {
  if (count >= 8) return _mm_storeu_si128((__m128i*)p, v);
  if (count & 4) {
    _mm_storel_epi64((__m128i*)p, v);
    v = _mm_unpackhi_epi64(v, v);
    p += 4;
  }
  const uint64_t rest = _mm_cvtsi128_si64(v);
  if (count & 2) {
    __builtin_memcpy(p, &rest, 4);
    p += 2;
  }
  if (count & 1) {
    const uint16_t last = uint16_t(rest >> (count & 2 ? 32 : 0));
    __builtin_memcpy(p, &last, 2);
  }
}
inline void store_first(float* p, Pair v, int64_t count) {
  store_first_half(p, v.lo, count);
  if (count > 8) store_first_half(p + 8, v.hi, count - 8);
}
template <class T, class Values>
inline void store_first(T* p, Values v, int64_t count) {
  const __m256i packed = pack(v, T());
  store_first_half(p, _mm256_castsi256_si128(packed), count);
  if (count > 8) store_first_half(p + 8, _mm256_extracti128_si256(packed, 1), count - 8);
}

inline void stream(float* p, Pair v) {
  _mm256_stream_ps(p, v.lo);
  _mm256_stream_ps(p + 8, v.hi);
}
template <class T, class Values>
inline void stream(T* p, Values v) {
  _mm256_stream_si256((__m256i*)p, pack(v, T()));
}
template <class T>
inline void stream_end(const T*) {
  _mm_sfence();
}

template <class T>
Pair round_to(Pair v);
template <>
inline Pair round_to<Float16>(Pair v) {
  return {
      _mm256_cvtph_ps(_mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT)),
      _mm256_cvtph_ps(_mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT))};
}
template <class Values>
inline Pair round_to_bfloat16(Values v) {
  const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
  return {
      _mm256_castsi256_ps(_mm256_and_si256(bfloat16_in_upper_half<Values>(v.lo), upper)),
      _mm256_castsi256_ps(_mm256_and_si256(bfloat16_in_upper_half<Values>(v.hi), upper))};
}
template <>
inline Pair round_to<BFloat16>(Pair v) {
  return round_to_bfloat16(v);
}
template <class T>
Pair round_to(OfBFloat16 v);
template <>
inline Pair round_to<BFloat16>(OfBFloat16 v) {
  return round_to_bfloat16(v);
}

}  // namespace
}  // namespace coreai_torch

#include "cpu/simd/native.h"
#include "cpu/simd/normal.h"
