// SIMD for x86-64-v4 (AVX-512 F, BW, CD, DQ, VL), with AVX512-BF16 conversions and AVX512-FP16
// arithmetic where the level has them. See simd.h for what a level provides.
#pragma once

#include <immintrin.h>

namespace coreai_torch {
namespace {

using Real = float;

using Vector = __m256;

struct Pair {
  static constexpr int kLanes = 32;
  static constexpr bool kHasShortNaNs = false;
  __m512 lo, hi;
};
struct OfBFloat16 : Pair {
  static constexpr bool kHasShortNaNs = true;
};

constexpr int kForwardRows = 4;
constexpr bool kStreams = true;
constexpr bool kStreamsAnyRow = true;

inline void split(Pair v, Vector* parts) {
  parts[0] = _mm512_castps512_ps256(v.lo);
  parts[1] = _mm512_extractf32x8_ps(v.lo, 1);
  parts[2] = _mm512_castps512_ps256(v.hi);
  parts[3] = _mm512_extractf32x8_ps(v.hi, 1);
}

inline Pair splat(float v) { return {_mm512_set1_ps(v), _mm512_set1_ps(v)}; }
inline Pair operator+(Pair a, Pair b) {
  return {_mm512_add_ps(a.lo, b.lo), _mm512_add_ps(a.hi, b.hi)};
}
inline Pair operator-(Pair a, Pair b) {
  return {_mm512_sub_ps(a.lo, b.lo), _mm512_sub_ps(a.hi, b.hi)};
}
inline Pair operator*(Pair a, Pair b) {
  return {_mm512_mul_ps(a.lo, b.lo), _mm512_mul_ps(a.hi, b.hi)};
}

inline __m256i load_256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }

inline Pair load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
inline Pair load(const Float16* p) {
  return {_mm512_cvtph_ps(load_256(p)), _mm512_cvtph_ps(load_256(p + 16))};
}
inline __m512 from_bfloat16(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

#if defined(__AVX512BF16__)
// One permutation for a widening and a shift.
inline Pair from_bfloat16(__m512i packed) {
  const __m512i lo = _mm512_set_epi16(
      15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,  //
      7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i hi = _mm512_set_epi16(
      31, 0, 30, 0, 29, 0, 28, 0, 27, 0, 26, 0, 25, 0, 24, 0,  //
      23, 0, 22, 0, 21, 0, 20, 0, 19, 0, 18, 0, 17, 0, 16, 0);
  constexpr __mmask32 kUpperHalves = 0xaaaaaaaa;
  return {
      _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpperHalves, lo, packed)),
      _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpperHalves, hi, packed))};
}
inline Pair load(const BFloat16* p) { return from_bfloat16(_mm512_loadu_si512(p)); }
#else
inline Pair from_bfloat16(__m512i packed) {
  return {
      from_bfloat16(_mm512_castsi512_si256(packed)),
      from_bfloat16(_mm512_extracti64x4_epi64(packed, 1))};
}
inline Pair load(const BFloat16* p) {
  return {from_bfloat16(load_256(p)), from_bfloat16(load_256(p + 16))};
}
#endif

// The float whose upper half is `v` rounded to bfloat16 (to nearest, ties to even; a NaN stays
// one). The lower half is rubbish.
template <class Values>
inline __m512i bfloat16_in_upper_half(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  if constexpr (Values::kHasShortNaNs) return rounded;
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
}

template <class Values>
inline __m512i to_bfloat16_by_bits(Values v) {
  const __m512i upper_halves = _mm512_set_epi16(
      63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,  //
      31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(
      bfloat16_in_upper_half<Values>(v.lo), upper_halves, bfloat16_in_upper_half<Values>(v.hi));
}

// `pack` gives 32 numbers of 16 bits, in the order of the pair's elements.
#if defined(__AVX512BF16__)
// One instruction, which takes denormal numbers for zero, as no other level does.
inline __m512i normal_to_bfloat16(Pair v) { return (__m512i)_mm512_cvtne2ps_pbh(v.hi, v.lo); }

// So a zero is looked into.
inline __m512i pack(Pair v, BFloat16) {
  const __m512i packed = normal_to_bfloat16(v);
  const __mmask32 zero = _mm512_testn_epi16_mask(packed, _mm512_set1_epi16(0x7fff));
  if (__builtin_expect(_kortestz_mask32_u8(zero, zero), 1)) return packed;
  constexpr int kDenormal = 0x20;
  const __mmask16 lo = _mm512_fpclass_ps_mask(v.lo, kDenormal);
  const __mmask16 hi = _mm512_fpclass_ps_mask(v.hi, kDenormal);
  if (__builtin_expect(_kortestz_mask16_u8(lo, hi), 1)) return packed;
  return to_bfloat16_by_bits(v);
}
#else
template <class Values>
inline __m512i pack(Values v, BFloat16) {
  return to_bfloat16_by_bits(v);
}
#endif

inline __m512i pack(Pair v, Float16) {
  const __m256i lo = _mm512_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT);
  const __m256i hi = _mm512_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}

inline void store(float* p, Pair v) {
  _mm512_storeu_ps(p, v.lo);
  _mm512_storeu_ps(p + 16, v.hi);
}
inline void store(Float16* p, Pair v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256((__m256i*)(p + 16), _mm512_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}
template <class Values>
inline void store(BFloat16* p, Values v) {
  _mm512_storeu_si512(p, pack(v, BFloat16()));
}

// A mask of the first `count` lanes, of 32 at most.
inline __mmask32 first_lanes(int64_t count) { return __mmask32((uint64_t(1) << count) - 1); }

inline Pair load_first(const float* p, int64_t count) {
  const __mmask32 mask = first_lanes(count);
  return {
      _mm512_maskz_loadu_ps((__mmask16)mask, p),
      _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), p + 16)};
}
inline Pair load_first(const Float16* p, int64_t count) {
  const __m512i bits = _mm512_maskz_loadu_epi16(first_lanes(count), p);
  return {
      _mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
      _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1))};
}
inline Pair load_first(const BFloat16* p, int64_t count) {
  return from_bfloat16(_mm512_maskz_loadu_epi16(first_lanes(count), p));
}
inline void store_first(float* p, Pair v, int64_t count) {
  const __mmask32 mask = first_lanes(count);
  _mm512_mask_storeu_ps(p, (__mmask16)mask, v.lo);
  // Masked out or not, a line would be waited for that the next row streams.
  if (count > 16) _mm512_mask_storeu_ps(p + 16, (__mmask16)(mask >> 16), v.hi);
}
template <class Values>
inline void store_first(Float16* p, Values v, int64_t count) {
  _mm512_mask_storeu_epi16(p, first_lanes(count), pack(v, Float16()));
}
template <class Values>
inline void store_first(BFloat16* p, Values v, int64_t count) {
  _mm512_mask_storeu_epi16(p, first_lanes(count), pack(v, BFloat16()));
}

inline void stream(float* p, Pair v) {
  _mm512_stream_ps(p, v.lo);
  _mm512_stream_ps(p + 16, v.hi);
}
template <class Values>
inline void stream(Float16* p, Values v) {
  _mm512_stream_si512((__m512i*)p, pack(v, Float16()));
}
template <class Values>
inline void stream(BFloat16* p, Values v) {
  _mm512_stream_si512((__m512i*)p, pack(v, BFloat16()));
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
      _mm512_cvtph_ps(_mm512_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT)),
      _mm512_cvtph_ps(_mm512_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT))};
}

#if defined(__AVX512BF16__)

template <>
inline Pair round_to<BFloat16>(Pair v) {
  return from_bfloat16(pack(v, BFloat16()));
}

template <class T>
constexpr bool kPrefersNormal = false;
template <>
constexpr bool kPrefersNormal<BFloat16> = true;

struct Normal : Pair {};

inline __m512i pack(Normal v, BFloat16) { return normal_to_bfloat16(v); }

template <class T>
Pair round_to(Normal v);
template <>
inline Pair round_to<BFloat16>(Normal v) {
  return from_bfloat16(pack(v, BFloat16()));
}

// Magnitudes are compared as 16 bits: those of a bfloat16 without its sign, doubled and less one,
// which makes zero the largest; the same of a float, cut off.
class Smallest {
 public:
  void add(const BFloat16* p) { add(_mm512_loadu_si512(p)); }
  void add_first(const BFloat16* p, int64_t count) {
    add(_mm512_maskz_loadu_epi16(first_lanes(count), p));
  }
  void add(Pair v) {
    const __m256i lo = upper_halves(v.lo), hi = upper_halves(v.hi);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
    least_ = _mm512_min_epu16(least_, both);
  }

  float value() const {
    const __m256i half =
        _mm256_min_epu16(_mm512_castsi512_si256(least_), _mm512_extracti64x4_epi64(least_, 1));
    const __m128i quarter =
        _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const uint32_t least = _mm_extract_epi16(_mm_minpos_epu16(quarter), 0);
    constexpr uint32_t kInfinity = 0x7f80;
    const uint32_t bits = least / 2 + 1 < kInfinity ? least / 2 + 1 : kInfinity;
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int(bits << 16))));
  }

 private:
  void add(__m512i bits) {
    const __m512i doubled = _mm512_add_epi16(bits, bits);
    least_ = _mm512_min_epu16(least_, _mm512_sub_epi16(doubled, _mm512_set1_epi16(1)));
  }
  static __m256i upper_halves(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i doubled = _mm512_add_epi32(bits, bits);
    const __m512i less_one = _mm512_sub_epi32(doubled, _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(less_one, 16));
  }

  __m512i least_ = _mm512_set1_epi16(-1);
};

#else

template <class Values>
inline Pair round_to_bfloat16(Values v) {
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
  return {
      _mm512_castsi512_ps(_mm512_and_si512(bfloat16_in_upper_half<Values>(v.lo), upper)),
      _mm512_castsi512_ps(_mm512_and_si512(bfloat16_in_upper_half<Values>(v.hi), upper))};
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

#endif

#if defined(__AVX512FP16__)

template <class T>
constexpr bool kIsNative = false;
template <>
constexpr bool kIsNative<Float16> = true;

struct Native {
  static Native rounded(Pair v) {
    return {
        _mm256_castsi256_ph(_mm512_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT)),
        _mm256_castsi256_ph(_mm512_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT))};
  }
  Pair widened() const {
    return {_mm512_cvtph_ps(_mm256_castph_si256(lo)), _mm512_cvtph_ps(_mm256_castph_si256(hi))};
  }

  __m256h lo, hi;
};

inline Native operator+(Native a, Native b) {
  return {_mm256_add_ph(a.lo, b.lo), _mm256_add_ph(a.hi, b.hi)};
}
inline Native operator*(Native a, Native b) {
  return {_mm256_mul_ph(a.lo, b.lo), _mm256_mul_ph(a.hi, b.hi)};
}

inline __m512i pack(Native v, Float16) {
  return _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_castph_si256(v.lo)), _mm256_castph_si256(v.hi), 1);
}
inline Native load_native(const Float16* p) {
  return {_mm256_castsi256_ph(load_256(p)), _mm256_castsi256_ph(load_256(p + 16))};
}
inline Native load_native_first(const Float16* p, int64_t count) {
  const __m512i bits = _mm512_maskz_loadu_epi16(first_lanes(count), p);
  return {
      _mm256_castsi256_ph(_mm512_castsi512_si256(bits)),
      _mm256_castsi256_ph(_mm512_extracti64x4_epi64(bits, 1))};
}
inline void store(Float16* p, Native v) {
  _mm256_storeu_si256((__m256i*)p, _mm256_castph_si256(v.lo));
  _mm256_storeu_si256((__m256i*)(p + 16), _mm256_castph_si256(v.hi));
}

#endif

// The lines that a Pair fills.
template <class T, class Values>
inline void lines_of(Values v, __m512i (&lines)[1]) {
  lines[0] = pack(v, T());
}
template <class T>
inline void lines_of(Pair v, __m512i (&lines)[2]) {
  lines[0] = _mm512_castps_si512(v.lo);
  lines[1] = _mm512_castps_si512(v.hi);
}

// Keeps what it has been given of a line that ends in the next Pair; a permutation puts the line
// together. The row's first and last line, of which its neighbours have parts, are stored as usual,
// but as lines, too: an address within a line would take the next one along, masked out or not, and
// wait until that has been streamed.
template <class T>
class ShiftedStream {
 public:
  ShiftedStream() = default;
  explicit ShiftedStream(T* row)
      : lead_(int(-uintptr_t(row) % 64 / sizeof(T))), lines_(row + lead_ - kLine) {
    if constexpr (sizeof(T) == 2) {
      const __m512i lanes = _mm512_set_epi16(
          31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16,  //
          15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      from_ = _mm512_add_epi16(lanes, _mm512_set1_epi16(int16_t(lead_)));
    } else {
      const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      from_ = _mm512_add_epi32(lanes, _mm512_set1_epi32(lead_));
    }
  }

  template <class Values>
  void write(int64_t i, Values v) {
    __m512i given[kLines];
    lines_of<T>(v, given);
    for (int l = 0; l < kLines; ++l) {
      const __m512i line = joined(kept_, given[l]);
      if (i == 0 && l == 0) {
        store_lanes(lines_, line, ~first_lanes(kLine - lead_));
      } else {
        _mm512_stream_si512((__m512i*)(lines_ + i + l * kLine), line);
      }
      kept_ = given[l];
    }
  }
  template <class Values>
  void write_first(int64_t i, Values v, int64_t count) {
    __m512i given[kLines];
    lines_of<T>(v, given);
    int64_t left = kLine - lead_ + count;
    for (int l = 0; left > 0; ++l, left -= kLine) {
      const __m512i line = l < kLines ? joined(kept_, given[l]) : joined(kept_, kept_);
      store_lanes(lines_ + i + l * kLine, line, first_lanes(left < kLine ? left : kLine));
      if (l < kLines) kept_ = given[l];
    }
  }

 private:
  static constexpr int kLine = 64 / sizeof(T);
  static constexpr int kLines = Pair::kLanes / kLine;

  __m512i joined(__m512i a, __m512i b) const {
    return sizeof(T) == 2 ? _mm512_permutex2var_epi16(a, from_, b)
                          : _mm512_permutex2var_epi32(a, from_, b);
  }
  static void store_lanes(T* line, __m512i lanes, __mmask32 mask) {
    if constexpr (sizeof(T) == 2) {
      _mm512_mask_storeu_epi16(line, mask, lanes);
    } else {
      _mm512_mask_storeu_epi32(line, (__mmask16)mask, lanes);
    }
  }

  int lead_;  // elements before the first line that begins in the row
  T* lines_;  // the line before that
  __m512i from_, kept_;
};

}  // namespace
}  // namespace coreai_torch

#if !defined(__AVX512BF16__)
#include "cpu/simd/normal.h"
#endif
#if !defined(__AVX512FP16__)
#include "cpu/simd/native.h"
#endif
