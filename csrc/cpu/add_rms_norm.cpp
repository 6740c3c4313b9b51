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
constexpr const AddRmsNormKernels* kLevels[] = {COREAI_TORCH_CPU_LEVELS(COREAI_TORCH_ADDRESS)};

constexpr Tables<AddRmsNormKernels> kTables(kLevels, add_rms_norm_kernels_float64);

}  // namespace

void add_rms_norm_forward_cpu(const AddRmsNormForward& args, ParallelFor parallel_for) {
  const RmsNormShape& shape = args.shape;
  if (shape.rows == 0 || shape.dim == 0) return;
  const int64_t row_bytes = shape.dim * kSizes[int(shape.input_dtype)];  // the output's, too
  Outputs outputs;
  if (is_contiguous(shape, {args.output_strides, args.new_residual_strides})) {
    const int64_t bytes = shape.rows * row_bytes;
    outputs = Outputs(
        {{args.output, bytes, row_bytes}, {args.new_residual, bytes, row_bytes}}, 4 * bytes,
        is_contiguous(shape, {args.input_strides, args.residual_strides}));
  }
  const int64_t unit = rows_in_unit(shape, args.input_strides);
  run(kTables.forward(shape), args, outputs, shape.rows / unit, unit * shape.dim, parallel_for);
}

void add_rms_norm_backward_cpu(const AddRmsNormBackward& args, ParallelFor parallel_for) {
  const RmsNormShape& shape = args.shape;
  if (shape.rows > 0 && shape.dim > 0) {
    const BackwardPlan plan = backward_plan(shape);
    const Outputs outputs = backward_outputs(
        args, plan, 4,
        is_contiguous(
            shape, {args.grad_output_strides, args.grad_new_residual_strides, args.input_strides}));
    run(kTables.backward(shape), args, outputs, plan.tasks, plan.chunk_rows * shape.dim,
        parallel_for);
  }
  sum_grad_scale_cpu(args, parallel_for);
}

}  // namespace coreai_torch
