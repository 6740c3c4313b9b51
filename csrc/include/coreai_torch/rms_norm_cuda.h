// RMSNorm on CUDA. Pointers are device memory of `device`, which must be the current device; work
// is queued on `stream`, nothing is allocated and nothing waited for, so calls can be captured in a
// CUDA graph. Framework-free.
#pragma once

#include <cuda_runtime_api.h>

#include "coreai_torch/rms_norm.h"

namespace coreai_torch {

// Rows are addressed with at most this many row dimensions (RmsNormShape::row_ndim).
constexpr int kMaxRowDimsCuda = 8;

cudaError_t rms_norm_forward_cuda(const RmsNormForward& args, int device, cudaStream_t stream);

// Bytes of workspace that rms_norm_backward_cuda() needs, from the pointers' alignment and from
// which gradients are wanted (args.workspace itself is not looked at). May be 0.
int64_t rms_norm_backward_workspace_cuda(const RmsNormBackward& args, int device);
cudaError_t rms_norm_backward_cuda(const RmsNormBackward& args, int device, cudaStream_t stream);

}  // namespace coreai_torch
