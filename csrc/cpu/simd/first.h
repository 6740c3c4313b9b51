// Parts of a Pair, for levels without masked loads and stores. Included at the end of such a level.
#pragma once

namespace coreai_torch {
namespace {

// The first `count` elements only, count < Pair::kLanes; the lanes behind are zero.
template <class T>
inline Pair load_first(const T* p, int64_t count) {
  T padded[Pair::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}
template <class T, class Values>
inline void store_first(T* p, Values v, int64_t count) {
  T padded[Pair::kLanes];
  store(padded, v);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

}  // namespace
}  // namespace coreai_torch
