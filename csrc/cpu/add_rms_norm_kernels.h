// What the kernels of one SIMD level for the residual add and RMSNorm offer to add_rms_norm.cpp.
#pragma once

#include "coreai_torch/add_rms_norm.h"
#include "cpu/rms_norm_kernels.h"

namespace coreai_torch {

// As RmsNormForwardKernel and RmsNormBackwardKernel. What follows backward is the same.
using AddRmsNormForwardKernel =
    void (*)(const AddRmsNormForward&, Streamed, int64_t begin, int64_t end);
using AddRmsNormBackwardKernel =
    void (*)(const AddRmsNormBackward&, Streamed, int64_t begin, int64_t end);

// Indexed by input dtype and scale dtype; null where there is no kernel, or another table has it.
struct AddRmsNormKernels {
  AddRmsNormForwardKernel forward[kDTypes][kDTypes];
  AddRmsNormBackwardKernel backward[kDTypes][kDTypes];
};

}  // namespace coreai_torch
