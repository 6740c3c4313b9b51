// What the C++ tests share.
#pragma once

#include <cstdio>
#include <cstring>
#include <vector>

#include "coreai_torch/rms_norm.h"

namespace coreai_torch {

inline int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      ++failures;                                                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

// Splits every range into single indices, last first: the result must not notice.
inline void scattered_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  for (int64_t i = end - 1; i >= begin; --i) body(i, i + 1, context);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Float32, and rows of one dimension, whose strides are left to say.
inline RmsNormShape shape_of(int64_t rows, int64_t groups, int64_t inner, int64_t dim) {
  RmsNormShape shape = {};
  shape.input_dtype = shape.scale_dtype = DType::kFloat32;
  shape.rows = rows;
  shape.dim = dim;
  shape.groups = groups;
  shape.inner = inner;
  shape.eps = 1e-5;
  shape.row_ndim = 1;
  shape.row_sizes[0] = rows;
  return shape;
}

}  // namespace coreai_torch
