// The entry points of one input dtype; one source file each, so that they compile side by side.
#pragma once

#include "coreai_torch/add_rms_norm_cuda.h"

namespace coreai_torch {

template <bool kAdds>
struct Calls {
  using Forward = RmsNormForward;
  using Backward = RmsNormBackward;
};
template <>
struct Calls<true> {
  using Forward = AddRmsNormForward;
  using Backward = AddRmsNormBackward;
};

// With kAdds, after a residual add.
template <class Input, bool kAdds>
struct RmsNormCuda {
  using Forward = typename Calls<kAdds>::Forward;
  using Backward = typename Calls<kAdds>::Backward;
  static cudaError_t forward(const Forward& call, int device, cudaStream_t stream);
  static int64_t backward_workspace(const Backward& call, int device);
  static cudaError_t backward(const Backward& call, int device, cudaStream_t stream);
};

// The number of element types is known: calls f with a value of the one that `dtype` names.
template <class F>
auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kFloat16:
      return f(Float16());
    case DType::kBFloat16:
      return f(BFloat16());
    default:
      return f(double());
  }
}

}  // namespace coreai_torch
