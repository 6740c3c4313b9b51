// What the RMSNorm kernels of one SIMD level offer to rms_norm.cpp.
#pragma once

#include "coreai_torch/rms_norm.h"
#include "cpu/streamed.h"

namespace coreai_torch {

// Rows [begin, end) of the output or, where groups take turns, rows [begin, end) of every group,
// see rms_norm_plan.h. What is to be streamed is stored past the caches, and rows are asked for
// ahead, where that is worth it; all operands are contiguous then.
using RmsNormForwardKernel = void (*)(const RmsNormForward&, Streamed, int64_t begin, int64_t end);
// Tasks [begin, end) of backward_plan(): their rows of grad_input, and their sums of grad_scale in
// their rows of the workspace.
using RmsNormBackwardKernel =
    void (*)(const RmsNormBackward&, Streamed, int64_t begin, int64_t end);
// Column blocks [begin, end) of grad_scale, from the workspace.
using RmsNormReduceKernel = void (*)(const RmsNormBackward&, Streamed, int64_t begin, int64_t end);

constexpr int kDTypes = 4;               // values of DType
constexpr int64_t kReduceColumns = 512;  // columns in a column block

// Indexed by input dtype and scale dtype; null where another table has the pair: that of float64,
// or that of the level below, where the level has nothing better. See Tables in run.h.
struct RmsNormKernels {
  RmsNormForwardKernel forward[kDTypes][kDTypes];
  RmsNormBackwardKernel backward[kDTypes][kDTypes];
  RmsNormReduceKernel reduce[kDTypes];
};

// The end of backward: grad_scale, if it is wanted, from the sums in the workspace.
void sum_grad_scale_cpu(const RmsNormBackward& args, ParallelFor parallel_for);

}  // namespace coreai_torch
