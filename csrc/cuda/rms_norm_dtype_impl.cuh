// Definitions of RmsNormCuda<Input>; included by the source file of each input dtype.
#pragma once

#include "rms_norm_backward.cuh"
#include "rms_norm_dtype.cuh"
#include "rms_norm_forward.cuh"

namespace coreai_torch {

// float64 beside a lower input dtype is no pair of ours.
template <class Input, class Scale>
constexpr bool kIsPair = kIsSame<Input, double> || !kIsSame<Scale, double>;

template <class Input>
cudaError_t RmsNormCuda<Input>::forward(
    const RmsNormForward& call, int device, cudaStream_t stream) {
  return with_dtype(call.shape.scale_dtype, [&](auto scale) -> cudaError_t {
    using Scale = decltype(scale);
    if constexpr (kIsPair<Input, Scale>) {
      return rms_norm_forward<Input, Scale>(call, device, stream);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

template <class Input>
int64_t RmsNormCuda<Input>::backward_workspace(const RmsNormBackward& call, int device) {
  return with_dtype(call.shape.scale_dtype, [&](auto scale) -> int64_t {
    using Scale = decltype(scale);
    if constexpr (kIsPair<Input, Scale>) {
      return rms_norm_backward_workspace<Input, Scale>(call, device);
    } else {
      return 0;
    }
  });
}

template <class Input>
cudaError_t RmsNormCuda<Input>::backward(
    const RmsNormBackward& call, int device, cudaStream_t stream) {
  return with_dtype(call.shape.scale_dtype, [&](auto scale) -> cudaError_t {
    using Scale = decltype(scale);
    if constexpr (kIsPair<Input, Scale>) {
      return rms_norm_backward<Input, Scale>(call, device, stream);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

}  // namespace coreai_torch
