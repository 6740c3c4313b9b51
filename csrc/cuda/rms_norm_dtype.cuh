// The entry points of one input dtype; one source file each, so that they compile side by side.
#pragma once

#include "coreai_torch/rms_norm_cuda.h"

namespace coreai_torch {

template <class Input>
struct RmsNormCuda {
  static cudaError_t forward(const RmsNormForward& call, int device, cudaStream_t stream);
  static int64_t backward_workspace(const RmsNormBackward& call, int device);
  static cudaError_t backward(const RmsNormBackward& call, int device, cudaStream_t stream);
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
