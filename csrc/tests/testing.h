// What the C++ tests share.
#pragma once

#include <cstdio>
#include <cstring>
#include <vector>

#include "coreai_torch/parallel.h"

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

}  // namespace coreai_torch
