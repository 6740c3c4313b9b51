// Can an operand be accessed N elements at a time? Where does what is aligned to 16 bytes begin?
#pragma once

#include "coreai_torch/rms_norm.h"
#include "pack.cuh"

namespace coreai_torch {

constexpr int64_t round_up_16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

template <class T, int N>
bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(typename Pack<T, N>::Unit) == 0;
}

// Also at the start of every row.
template <class T, int N>
bool is_aligned(const RmsNormShape& shape, const void* p, const int64_t* row_strides) {
  bool aligned = is_aligned<T, N>(p);
  for (int d = 0; d < shape.row_ndim; ++d) {
    aligned =
        aligned &&
        row_strides[d] * int64_t(sizeof(T)) % int64_t(alignof(typename Pack<T, N>::Unit)) == 0;
  }
  return aligned;
}

}  // namespace coreai_torch
