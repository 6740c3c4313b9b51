// RMSNorm(x, w) = x / sqrt(mean(x^2) + eps) * w over the last dimension, forward and backward
// (Zhang & Sennrich 2019, arXiv:1910.07467). Framework-free: pointers, sizes and strides only.
//
// Output dtype, and where rounding happens:
//   n = x * rstd                             in float (double where the input is float64)
//   16-bit input and float32 scale:          output = round(n * w), of the input's dtype
//   otherwise:                               output = round(n to the input's dtype) * w,
//                                            of the dtype that the two promote to
#pragma once

#include <stdint.h>

#include "coreai_torch/dtype.h"
#include "coreai_torch/parallel.h"

namespace coreai_torch {

// PyTorch's own limit on the dimensions of a tensor.
constexpr int kMaxDims = 64;

// What forward and backward have in common. A row is a run of `dim` adjacent elements. The row
// dimensions are all dimensions but the last; row r counts through them with the last one fastest,
// and starts sum(index[d] * strides[d]) elements after the operand's pointer.
struct RmsNormShape {
  DType input_dtype;
  DType scale_dtype;
  int64_t rows;    // product of row_sizes
  int64_t dim;     // length of a row
  int64_t groups;  // scale is contiguous, (groups, dim); row r is multiplied by
  int64_t inner;   //   scale row (r / inner) % groups; rows % (groups * inner) == 0
  double eps;      // >= 0
  int row_ndim;
  int64_t row_sizes[kMaxDims];
};

struct RmsNormForward {
  RmsNormShape shape;
  const void* input;
  const void* scale;
  void* output;
  int64_t input_strides[kMaxDims];
  int64_t output_strides[kMaxDims];
};

struct RmsNormBackward {
  RmsNormShape shape;
  const void* grad_output;  // of the output's dtype
  const void* input;
  const void* scale;
  void* grad_input;  // of the input's dtype, or nullptr if not wanted
  void* grad_scale;  // of the scale's dtype, contiguous (groups, dim), or nullptr if not wanted
  void* workspace;   // rms_norm_backward_workspace(shape) bytes; unused without grad_scale
  int64_t grad_output_strides[kMaxDims];
  int64_t input_strides[kMaxDims];
  int64_t grad_input_strides[kMaxDims];
};

DType rms_norm_output_dtype(DType input, DType scale);

// CPU. The result depends neither on the number of threads nor on the SIMD level.
void rms_norm_forward_cpu(const RmsNormForward& args, ParallelFor parallel_for);
int64_t rms_norm_backward_workspace_cpu(const RmsNormShape& shape);
void rms_norm_backward_cpu(const RmsNormBackward& args, ParallelFor parallel_for);

}  // namespace coreai_torch
