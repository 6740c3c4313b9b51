// For levels that compute with floats only. Included at the end of such a level.
#pragma once

namespace coreai_torch {
namespace {

template <class T>
constexpr bool kIsNative = false;

struct Native {  // never made
  static Native rounded(Pair v);
  Pair widened() const;
};

}  // namespace
}  // namespace coreai_torch
