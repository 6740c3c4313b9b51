// The residual add fused with RMSNorm on CUDA; what rms_norm_cuda.h says holds here too.
#pragma once

#include "coreai_torch/add_rms_norm.h"
#include "coreai_torch/rms_norm_cuda.h"

namespace coreai_torch {

cudaError_t add_rms_norm_forward_cuda(
    const AddRmsNormForward& args, int device, cudaStream_t stream);

int64_t add_rms_norm_backward_workspace_cuda(const AddRmsNormBackward& args, int device);
cudaError_t add_rms_norm_backward_cuda(
    const AddRmsNormBackward& args, int device, cudaStream_t stream);

}  // namespace coreai_torch
