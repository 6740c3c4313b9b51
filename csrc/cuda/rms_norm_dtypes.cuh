// The dtype rule of RMSNorm: see coreai_torch/rms_norm.h.
#pragma once

#include "pack.cuh"
#include "widths.cuh"

namespace coreai_torch {

template <class Input, class Scale>
struct OutputOf {
  using Type = float;  // of float, or of two different 16-bit types
};
template <class T>
struct OutputOf<T, T> {
  using Type = T;
};
template <>
struct OutputOf<Float16, float> {
  using Type = Float16;
};
template <>
struct OutputOf<BFloat16, float> {
  using Type = BFloat16;
};
template <class Scale>
struct OutputOf<double, Scale> {
  using Type = double;
};
template <>
struct OutputOf<double, double> {
  using Type = double;
};
template <class Input, class Scale>
using Output = typename OutputOf<Input, Scale>::Type;

template <class A, class B>
constexpr bool kIsSame = false;
template <class A>
constexpr bool kIsSame<A, A> = true;

// Is the normalized row rounded to the input's dtype before it is multiplied by the scale?
template <class Input, class Scale>
constexpr bool kRoundsNormalized = kIs16Bit<Input> && !kIsSame<Scale, float>;

// Elements of one access: 16 bytes of input, or one element where rows are not aligned to that.
template <class Input>
constexpr int kAccessElements = kIs16Bit<Input> ? 8 : 4;

// float64 runs on the kernels that take any width, element by element.
template <class Input>
constexpr bool kHasRowKernels = !kIsSame<Input, double>;

// The widths, out of `Candidates`, for rows that are read element by element. With the residual add
// there are none: such rows are rare, and take the kernels for any width.
template <class Input, bool kAdds, class Candidates>
struct ElementWidthsOf {
  using Type = Candidates;
};
template <class Input, class Candidates>
struct ElementWidthsOf<Input, true, Candidates> {
  using Type = Widths<>;
};
template <class Candidates>
struct ElementWidthsOf<double, false, Candidates> {
  using Type = Widths<>;
};
template <class Input, bool kAdds, class Candidates>
using ElementWidths = typename ElementWidthsOf<Input, kAdds, Candidates>::Type;

}  // namespace coreai_torch
