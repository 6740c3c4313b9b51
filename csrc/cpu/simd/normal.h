// For levels that round normal numbers as they round any. Included at the end of such a level.
#pragma once

namespace coreai_torch {
namespace {

template <class T>
constexpr bool kPrefersNormal = false;

struct Normal : Pair {};

class Smallest {  // never called
 public:
  template <class T>
  void add(const T* p);
  template <class T>
  void add_first(const T* p, int64_t count);
  void add(Pair v);
  float value() const;
};

}  // namespace
}  // namespace coreai_torch
