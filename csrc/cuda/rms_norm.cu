// RMSNorm on CUDA: the entry points, by input dtype.
#include "coreai_torch/rms_norm_cuda.h"

#include "device.cuh"
#include "rms_norm_dtype.cuh"

namespace coreai_torch {

cudaError_t rms_norm_forward_cuda(const RmsNormForward& args, int device, cudaStream_t stream) {
  if (args.shape.row_ndim > kMaxRowDimsCuda) return cudaErrorInvalidValue;
  if (args.shape.rows == 0 || args.shape.dim == 0) return cudaSuccess;
  return with_dtype(args.shape.input_dtype, [&](auto input) {
    return RmsNormCuda<decltype(input)>::forward(args, device, stream);
  });
}

int64_t rms_norm_backward_workspace_cuda(const RmsNormBackward& args, int device) {
  if (args.shape.rows == 0 || args.shape.dim == 0) return 0;
  return with_dtype(args.shape.input_dtype, [&](auto input) {
    return RmsNormCuda<decltype(input)>::backward_workspace(args, device);
  });
}

cudaError_t rms_norm_backward_cuda(const RmsNormBackward& args, int device, cudaStream_t stream) {
  const RmsNormShape& shape = args.shape;
  if (shape.row_ndim > kMaxRowDimsCuda) return cudaErrorInvalidValue;
  if (shape.rows == 0 || shape.dim == 0) {
    if (!args.grad_scale) return cudaSuccess;
    const size_t element = with_dtype(shape.scale_dtype, [](auto t) { return sizeof(t); });
    return fill_zero(args.grad_scale, element * shape.groups * shape.dim, stream);
  }
  return with_dtype(shape.input_dtype, [&](auto input) {
    return RmsNormCuda<decltype(input)>::backward(args, device, stream);
  });
}

}  // namespace coreai_torch
