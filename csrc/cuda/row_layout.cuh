// Where rows begin: row number -> offsets of that row in every operand.
#pragma once

#include "coreai_torch/rms_norm_cuda.h"
#include "device.cuh"

namespace coreai_torch {

// Division by a number known at launch. For dividends below 2^31 it is a multiplication and a shift
// (Granlund & Montgomery 1994, "Division by invariant integers using multiplication").
struct Divisor {
  int64_t value = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t d) : value(d) {
    if (d >= int64_t(1) << 31) return;  // never asked for a quotient by multiplication
    while ((uint64_t(1) << shift) < uint64_t(d)) ++shift;
    multiplier = uint32_t((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d) / d + 1);
  }
};

// Integer is uint32_t for dividends below 2^31, else int64_t.
template <class Integer>
struct QuotientRemainder {
  Integer quotient;
  Integer remainder;
};

__device__ __forceinline__ QuotientRemainder<uint32_t> divide(uint32_t n, const Divisor& d) {
  const uint32_t high = uint32_t((uint64_t(n) * d.multiplier) >> 32);
  const uint32_t quotient = (high + n) >> d.shift;
  return {quotient, n - quotient * uint32_t(d.value)};
}
__device__ __forceinline__ QuotientRemainder<int64_t> divide(int64_t n, const Divisor& d) {
  const int64_t quotient = n / d.value;
  return {quotient, n - quotient * d.value};
}

// The rows of up to four operands of the same sizes, and which row of the scale belongs to each.
template <int operands>
struct RowLayout {
  int64_t rows;
  bool narrow;  // fewer than 2^31 rows: divide by multiplication
  bool flat;    // narrow, one row dimension and one row of the scale: nothing to divide
  int ndim;
  int64_t strides[kMaxRowDimsCuda][operands];
  Divisor sizes[kMaxRowDimsCuda];
  int64_t groups;
  Divisor group_count;
  Divisor inner;

  RowLayout(const RmsNormShape& shape, const int64_t* const (&operand_strides)[operands])
      : rows(shape.rows),
        narrow(shape.rows < int64_t(1) << 31),
        flat(narrow && shape.row_ndim == 1 && shape.groups == 1),
        ndim(shape.row_ndim),
        groups(shape.groups),
        group_count(shape.groups),
        inner(shape.inner) {
    for (int d = 0; d < ndim; ++d) {
      sizes[d] = Divisor(shape.row_sizes[d]);
      for (int k = 0; k < operands; ++k) strides[d][k] = operand_strides[k][d];
    }
  }

  // Where a row begins in all operands, and the row of the scale that multiplies it.
  __device__ __forceinline__ void find(
      int64_t row, int64_t (&offset)[operands], int64_t& group) const {
    if (flat) {
      group = 0;
      multiply(uint32_t(row), offset, 0);
    } else if (narrow) {
      group = group_of(uint32_t(row));
      add_up(uint32_t(row), offset, 0);
    } else {
      group = group_of(row);
      add_up(row, offset, 0);
    }
  }

  // The k-th of the rows that the scale's row `group` multiplies, and where it begins in operands
  // first, first + 1, ...
  template <int count>
  __device__ __forceinline__ int64_t
  find_in_group(int64_t group, int64_t k, int64_t (&offset)[count], int first = 0) const {
    if (flat) {
      multiply(uint32_t(k), offset, first);
      return k;
    }
    if (narrow) {
      const int64_t row = row_of_group(group, k);
      add_up(uint32_t(row), offset, first);
      return row;
    }
    const int64_t row = row_of_group(group, k);
    add_up(row, offset, first);
    return row;
  }

 private:
  __device__ __forceinline__ int64_t row_of_group(int64_t group, int64_t k) const {
    if (groups == 1) return k;
    if (narrow) return row_of_group_as(uint32_t(group), uint32_t(k));
    return row_of_group_as(group, k);
  }

  template <class Integer, int count>
  __device__ __forceinline__ void multiply(Integer row, int64_t (&offset)[count], int first) const {
#pragma unroll
    for (int k = 0; k < count; ++k) offset[k] = int64_t(row) * strides[0][first + k];
  }

  template <class Integer, int count>
  __device__ __forceinline__ void add_up(Integer row, int64_t (&offset)[count], int first) const {
#pragma unroll
    for (int k = 0; k < count; ++k) offset[k] = 0;
#pragma unroll 1
    for (int d = ndim - 1; d > 0; --d) {
      const QuotientRemainder<Integer> index = divide(row, sizes[d]);
#pragma unroll
      for (int k = 0; k < count; ++k) {
        offset[k] += int64_t(index.remainder) * strides[d][first + k];
      }
      row = index.quotient;
    }
#pragma unroll
    for (int k = 0; k < count; ++k) offset[k] += int64_t(row) * strides[0][first + k];
  }

  template <class Integer>
  __device__ __forceinline__ int64_t group_of(Integer row) const {
    if (groups == 1) return 0;
    return int64_t(divide(divide(row, inner).quotient, group_count).remainder);
  }

  template <class Integer>
  __device__ __forceinline__ Integer row_of_group_as(Integer group, Integer k) const {
    const QuotientRemainder<Integer> index = divide(k, inner);
    return (index.quotient * Integer(groups) + group) * Integer(inner.value) + index.remainder;
  }
};

}  // namespace coreai_torch
