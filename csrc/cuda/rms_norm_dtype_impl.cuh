// Definitions of RmsNormCuda<Input, kAdds>; included by the source file of each input dtype.
#pragma once

#include "rms_norm_backward.cuh"
#include "rms_norm_dtype.cuh"
#include "rms_norm_forward.cuh"

namespace coreai_torch {

// float64 beside a lower input dtype is no pair of ours.
template <class Input, class Scale>
constexpr bool kIsPair = kIsSame<Input, double> || !kIsSame<Scale, double>;

// As add_rms_norm_has_kernels() says.
template <class Input, class Scale>
constexpr bool kIsAddPair =
    kIsSame<Scale, Input> || (kIsSame<Scale, float> && !kIsSame<Input, double>);

template <class Input, bool kAdds>
cudaError_t RmsNormCuda<Input, kAdds>::forward(
    const Forward& call, int device, cudaStream_t stream) {
  return with_dtype(call.shape.scale_dtype, [&](auto scale) -> cudaError_t {
    using Scale = decltype(scale);
    if constexpr (kAdds ? kIsAddPair<Input, Scale> : kIsPair<Input, Scale>) {
      return rms_norm_forward<Input, Scale>(call, device, stream);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

template <class Input, bool kAdds>
int64_t RmsNormCuda<Input, kAdds>::backward_workspace(const Backward& call, int device) {
  return with_dtype(call.shape.scale_dtype, [&](auto scale) -> int64_t {
    using Scale = decltype(scale);
    if constexpr (kAdds ? kIsAddPair<Input, Scale> : kIsPair<Input, Scale>) {
      return rms_norm_backward_workspace<Input, Scale>(call, device);
    } else {
      return 0;
    }
  });
}

template <class Input, bool kAdds>
cudaError_t RmsNormCuda<Input, kAdds>::backward(
    const Backward& call, int device, cudaStream_t stream) {
  return with_dtype(call.shape.scale_dtype, [&](auto scale) -> cudaError_t {
    using Scale = decltype(scale);
    if constexpr (kAdds ? kIsAddPair<Input, Scale> : kIsPair<Input, Scale>) {
      return rms_norm_backward<Input, Scale>(call, device, stream);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

}  // namespace coreai_torch
