// RMSNorm on CUDA, with and without the residual add: the entry points, by input dtype.
#include "coreai_torch/add_rms_norm_cuda.h"

#include "device.cuh"
#include "rms_norm_dtype.cuh"

namespace coreai_torch {
namespace {

template <bool kAdds>
cudaError_t forward(const typename Calls<kAdds>::Forward& args, int device, cudaStream_t stream) {
  if (args.shape.row_ndim > kMaxRowDimsCuda) return cudaErrorInvalidValue;
  if (args.shape.rows == 0 || args.shape.dim == 0) return cudaSuccess;
  return with_dtype(args.shape.input_dtype, [&](auto input) {
    return RmsNormCuda<decltype(input), kAdds>::forward(args, device, stream);
  });
}

template <bool kAdds>
int64_t backward_workspace(const typename Calls<kAdds>::Backward& args, int device) {
  if (args.shape.rows == 0 || args.shape.dim == 0) return 0;
  return with_dtype(args.shape.input_dtype, [&](auto input) {
    return RmsNormCuda<decltype(input), kAdds>::backward_workspace(args, device);
  });
}

template <bool kAdds>
cudaError_t backward(const typename Calls<kAdds>::Backward& args, int device, cudaStream_t stream) {
  const RmsNormShape& shape = args.shape;
  if (shape.row_ndim > kMaxRowDimsCuda) return cudaErrorInvalidValue;
  if (shape.rows == 0 || shape.dim == 0) {
    if (!args.grad_scale) return cudaSuccess;
    const size_t element = with_dtype(shape.scale_dtype, [](auto t) { return sizeof(t); });
    return fill_zero(args.grad_scale, element * shape.groups * shape.dim, stream);
  }
  return with_dtype(shape.input_dtype, [&](auto input) {
    return RmsNormCuda<decltype(input), kAdds>::backward(args, device, stream);
  });
}

}  // namespace

cudaError_t rms_norm_forward_cuda(const RmsNormForward& args, int device, cudaStream_t stream) {
  return forward<false>(args, device, stream);
}
int64_t rms_norm_backward_workspace_cuda(const RmsNormBackward& args, int device) {
  return backward_workspace<false>(args, device);
}
cudaError_t rms_norm_backward_cuda(const RmsNormBackward& args, int device, cudaStream_t stream) {
  return backward<false>(args, device, stream);
}

cudaError_t add_rms_norm_forward_cuda(
    const AddRmsNormForward& args, int device, cudaStream_t stream) {
  return forward<true>(args, device, stream);
}
int64_t add_rms_norm_backward_workspace_cuda(const AddRmsNormBackward& args, int device) {
  return backward_workspace<true>(args, device);
}
cudaError_t add_rms_norm_backward_cuda(
    const AddRmsNormBackward& args, int device, cudaStream_t stream) {
  return backward<true>(args, device, stream);
}

}  // namespace coreai_torch
