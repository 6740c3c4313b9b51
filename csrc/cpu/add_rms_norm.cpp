// Picks the kernel for the dtypes and the SIMD level, and spreads its work over threads.
#include "coreai_torch/add_rms_norm.h"

#include "cpu/add_rms_norm_kernels.h"
#include "cpu/levels.h"
#include "cpu/rms_norm_plan.h"
#include "cpu/run.h"

namespace coreai_torch {

#define COREAI_TORCH_DECLARE(id, name) extern const AddRmsNormKernels add_rms_norm_kernels_##id;
COREAI_TORCH_CPU_LEVELS(COREAI_TORCH_DECLARE)
extern const AddRmsNormKernels add_rms_norm_kernels_float64;

namespace {

#define COREAI_TORCH_ADDRESS(id, name) &add_rms_norm_kernels_##id,
constexpr const AddRmsNormKernels* kTables[] = {COREAI_TORCH_CPU_LEVELS(COREAI_TORCH_ADDRESS)};

template <class Find>
auto kernel_for(const RmsNormShape& shape, const Find& find) {
  if (shape.input_dtype == DType::kFloat64) return find(add_rms_norm_kernels_float64);
  return kernel_of(kTables, find);
}

AddRmsNormForwardKernel forward_kernel(const RmsNormShape& shape) {
  return kernel_for(shape, [&](const AddRmsNormKernels& kernels) {
    return kernels.forward[int(shape.input_dtype)][int(shape.scale_dtype)];
  });
}

AddRmsNormBackwardKernel backward_kernel(const RmsNormShape& shape) {
  return kernel_for(shape, [&](const AddRmsNormKernels& kernels) {
    return kernels.backward[int(shape.input_dtype)][int(shape.scale_dtype)];
  });
}

}  // namespace

void add_rms_norm_forward_cpu(const AddRmsNormForward& args, ParallelFor parallel_for) {
  const RmsNormShape& shape = args.shape;
  if (shape.rows == 0 || shape.dim == 0) return;
  const int64_t row_bytes = shape.dim * kSizes[int(shape.input_dtype)];  // the output's, too
  Outputs outputs;
  if (is_contiguous(shape, {args.output_strides, args.new_residual_strides})) {
    const int64_t bytes = shape.rows * row_bytes;
    outputs = Outputs(
        {{args.output, bytes, row_bytes}, {args.new_residual, bytes, row_bytes}},
        is_contiguous(shape, {args.input_strides, args.residual_strides}) &&
            row_bytes % kLine == 0);
  }
  const int64_t unit = rows_in_unit(shape, args.input_strides);
  run(forward_kernel(shape), args, outputs, shape.rows / unit, unit * shape.dim, parallel_for);
}

void add_rms_norm_backward_cpu(const AddRmsNormBackward& args, ParallelFor parallel_for) {
  const RmsNormShape& shape = args.shape;
  if (shape.rows > 0 && shape.dim > 0) {
    const BackwardPlan plan = backward_plan(shape);
    const Outputs outputs = backward_outputs(
        args, plan,
        is_contiguous(
            shape, {args.grad_output_strides, args.grad_new_residual_strides, args.input_strides}));
    run(backward_kernel(shape), args, outputs, plan.tasks, plan.chunk_rows * shape.dim,
        parallel_for);
  }
  sum_grad_scale_cpu(args, parallel_for);
}

}  // namespace coreai_torch
