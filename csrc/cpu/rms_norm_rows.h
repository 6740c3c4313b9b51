// What the RMSNorm kernels of both directions share. They are written once for every SIMD level and
// for double precision (simd.h or simd/float64.h comes first), with and without the residual add.
// Everything in these files has internal linkage.
#pragma once

#include "coreai_torch/add_rms_norm.h"
#include "cpu/rms_norm_kernels.h"
#include "cpu/rms_norm_plan.h"
#include "cpu/row_sum.h"

namespace coreai_torch {
namespace {

template <bool kCondition, class A, class B>
struct Conditional {
  using type = A;
};
template <class A, class B>
struct Conditional<false, A, B> {
  using type = B;
};

// The dtype rule of coreai_torch/rms_norm.h. `float` stands for every type that is not 16 bits
// wide.
template <class Input, class Scale>
struct DTypeRule {
  static constexpr bool kNarrowInput = sizeof(Input) == 2;
  static constexpr bool kRoundsNormalized = kNarrowInput && !kSame<Scale, float>;
  static constexpr bool kOutputIsInput =
      !kNarrowInput || kSame<Scale, float> || kSame<Scale, Input>;
  using Output = typename Conditional<kOutputIsInput, Input, float>::type;
};

// A Pair that was computed from numbers of these types.
template <class Input, class Scale>
using PairOf =
    typename Conditional<kSame<Input, BFloat16> && kSame<Scale, BFloat16>, OfBFloat16, Pair>::type;

// Walks through rows and keeps the offset, in elements, of the current row in each of N operands.
template <int N>
class RowCursor {
 public:
  RowCursor(const RmsNormShape& shape, const int64_t* const (&strides)[N]) : shape_(shape) {
    for (int n = 0; n < N; ++n) strides_[n] = strides[n];
  }

  int64_t offset(int n) const { return offset_[n]; }
  int64_t step(int n) const { return step_[n]; }  // to the next row, where the dimension goes on
  int64_t stride(int n, int d) const { return strides_[n][d]; }

  void seek(int64_t row) {
    for (int n = 0; n < N; ++n) offset_[n] = 0;
    for (int d = shape_.row_ndim - 1; d >= 0; --d) {
      const int64_t rest = d > 0 ? row / shape_.row_sizes[d] : 0;
      index_[d] = row - rest * shape_.row_sizes[d];
      for (int n = 0; n < N; ++n) offset_[n] += index_[d] * strides_[n][d];
      row = rest;
    }
    start_last();
  }

  COREAI_TORCH_INLINE void next() {
    for (int n = 0; n < N; ++n) offset_[n] += step_[n];
    if (--left_ == 0) carry();
  }

  // Are the next rows, so many, `step` apart from each other, and is there one after them?
  bool has_in_step(int rows) const { return left_ > rows; }
  void skip_in_step(int rows) {
    for (int n = 0; n < N; ++n) offset_[n] += rows * step_[n];
    left_ -= rows;
  }

 private:
  // Of the last row dimension left_ rows are left, step_ apart; its index_ is not kept up to date.
  void start_last() {
    const int last = shape_.row_ndim - 1;
    left_ = last > 0 ? shape_.row_sizes[last] - index_[last] : INT64_MAX;
    for (int n = 0; n < N; ++n) step_[n] = last >= 0 ? strides_[n][last] : 0;
  }

  // After the last row of the last dimension.
  __attribute__((noinline)) void carry() {
    int d = shape_.row_ndim - 1;
    index_[d] = shape_.row_sizes[d];
    while (d > 0 && index_[d] == shape_.row_sizes[d]) {
      for (int n = 0; n < N; ++n) offset_[n] -= index_[d] * strides_[n][d];
      index_[d] = 0;
      --d;
      for (int n = 0; n < N; ++n) offset_[n] += strides_[n][d];
      ++index_[d];
    }
    start_last();
  }

  const RmsNormShape& shape_;
  const int64_t* strides_[N];
  int64_t index_[kMaxDims];
  int64_t offset_[N];
  int64_t step_[N];
  int64_t left_;
};

// A pointer in a register of its own. GCC would put those to a block's rows together in vectors,
// only to take them apart again.
template <class T>
inline T* alone(T* p) {
  asm("" : "+r"(p));
  return p;
}

// How results are written: by usual stores, or past the caches, in rows of whole lines or in
// others.
enum class Stores { kCached, kStreamed, kShifted };

template <class T>
class ShiftedStream;

// Writes a row of them from its beginning to its end.
template <Stores kStores, class T>
struct RowWriter {
  template <class Part, class Values>
  COREAI_TORCH_INLINE void write(Part part, int64_t i, Values v) {
    if constexpr (kStores == Stores::kStreamed && kSame<Part, Whole>) {
      stream(row + i, v);
    } else {
      part.store_to(row + i, v);
    }
  }

  T* row;
};
template <class T>
struct RowWriter<Stores::kShifted, T> {
  RowWriter() = default;
  RowWriter(T* row) : stream(row) {}

  template <class Values>
  COREAI_TORCH_INLINE void write(Whole, int64_t i, Values v) {
    stream.write(i, v);
  }
  template <class Values>
  COREAI_TORCH_INLINE void write(First part, int64_t i, Values v) {
    stream.write_first(i, v, part.count);
  }

  ShiftedStream<T> stream;
};

template <Stores kStores>
struct StoresConstant {
  static constexpr Stores value = kStores;
};

// May rows that are not whole lines be stored past the caches? Where dtypes are mixed, but for a
// scale of float32, it isn't worth the code.
template <class Input, class Scale>
constexpr bool kStreamsRowsOf = kStreamsAnyRow && (kSame<Scale, Input> || kSame<Scale, float>);

// Calls body(StoresConstant<...>()) with how rows of elements T are stored past the caches. False:
// they are not. Short rows would lose as much by the lines that they share with their neighbours as
// they gain by the others, so that kAnyRow counts from 1000 elements on.
template <class T, bool kAnyRow, class Body>
bool with_streams(int64_t dim, const Body& body) {
  constexpr int64_t kLine = 64 / sizeof(T), kLongRow = 1000;  // elements
  if (dim % kLine == 0) {
    body(StoresConstant<Stores::kStreamed>());
    return true;
  }
  if constexpr (kAnyRow) {
    if (dim >= kLongRow) {
      body(StoresConstant<Stores::kShifted>());
      return true;
    }
  }
  return false;
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

inline Quad rstd_of(Quad sums_of_squares, const RowLength& length, double eps) {
  Quad root = length.mean(sums_of_squares) + Real(eps);
  for (int r = 0; r < kQuad; ++r) root[r] = square_root(root[r]);
  return 1 / root;
}
inline Real rstd_of(Real sum_of_squares, const RowLength& length, double eps) {
  return 1 / square_root(length.mean(sum_of_squares) + Real(eps));
}

// Rows that share a scale row are taken in blocks of so many, or fewer.
static_assert(kBlockRows == kQuad, "the statistics of a block are one Quad");

// Calls body(Constant<dim>()) for the usual lengths of attention heads, so that these have kernels
// of their own, whose loops over a row are unrolled, and body(Constant<0>()) for all others. Where
// dtypes are mixed it isn't worth the code.
template <class Input, class Scale, class Body>
void with_known_dim(int64_t dim, const Body& body) {
  if constexpr (kSame<Input, Scale> && kSame<Real, float>) {
    if (dim == 64) return body(Constant<64>());
    if (dim == 128) return body(Constant<128>());
  }
  body(Constant<0>());
}

// The length of with_known_dim(), as a constant; where it is not known, any.
template <int kDim>
constexpr RowLength kKnownLength(kDim != 0 ? kDim : 1);

// Asks for the cache lines of a Pair of elements, for the first or for the second cache, or to
// write them.
enum Cache { kFirstCache = 3, kSecondCache = 2 };  // as __builtin_prefetch counts them
template <Cache kCache, class T, bool kToWrite = false>
inline void prefetch(const T* p) {
  for (int byte = 0; byte < Pair::kLanes * int(sizeof(T)); byte += 64) {
    __builtin_prefetch((const char*)p + byte, kToWrite, kCache);
  }
}

template <class T>
inline void prefetch_to_write(const T* p) {
  prefetch<kSecondCache, T, true>(p);
}

// Bytes of what is read, from which on it does not stay in the caches together with what is
// written.
constexpr int64_t kBeyondCaches = int64_t(12) << 20;

// Bytes of an operand from which on what is written is asked for as well. The second cache does not
// have it any more: of a training step, that place was used a whole step ago.
template <class T>
constexpr int64_t kColdPlace = int64_t(sizeof(T) == 2 ? 4 : 8) << 20;

// Rows are asked for as long as they stay in the second cache until they are needed, beside those
// of the current block: up to so many bytes.
template <bool kStream>
constexpr int64_t kMostAhead = int64_t(kStream ? 512 : 256) << 10;

// But where rows follow each other, and do not stay in the caches, at least so many bytes ahead,
// since short rows are over before memory has answered: so many times as far as bytes_ahead.
constexpr int64_t kLeastAhead = 16384;
inline int64_t times_of_least_ahead(int64_t bytes_ahead) {
  return bytes_ahead < kLeastAhead ? kLeastAhead / bytes_ahead : 1;
}

}  // namespace
}  // namespace coreai_torch
