// The residual add fused with the norm that follows it:
//
//   new_residual = input + residual                  rounded to the dtype that the two share
//   output = RMSNorm(new_residual, scale)            of the rounded sum; see rms_norm.h
//
// Every operand is read once, and written once. Framework-free: pointers, sizes and strides only.
#pragma once

#include "coreai_torch/rms_norm.h"

namespace coreai_torch {

// The pairs of dtypes that there are kernels for: scale in the input's dtype, or in float32 beside
// 16-bit input.
constexpr bool add_rms_norm_has_kernels(DType input, DType scale) {
  return scale == input || (scale == DType::kFloat32 && input != DType::kFloat64);
}

// shape.input_dtype is the dtype of input, residual and new_residual.
struct AddRmsNormForward : RmsNormForward {
  const void* residual;
  void* new_residual;
  int64_t residual_strides[kMaxDims];
  int64_t new_residual_strides[kMaxDims];
};

// `input` is what was normalized, forward's new_residual, and grad_input is the gradient of both
// addends: that of the norm plus grad_new_residual, rounded once. It is not nullptr.
struct AddRmsNormBackward : RmsNormBackward {
  const void* grad_new_residual;  // of the input's dtype
  int64_t grad_new_residual_strides[kMaxDims];
};

// CPU. The result depends neither on the number of threads nor on the SIMD level. The workspace of
// backward is rms_norm_backward_workspace_cpu(shape) bytes.
void add_rms_norm_forward_cpu(const AddRmsNormForward& args, ParallelFor parallel_for);
void add_rms_norm_backward_cpu(const AddRmsNormBackward& args, ParallelFor parallel_for);

}  // namespace coreai_torch
