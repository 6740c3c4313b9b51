// Picks the kernel for the dtypes and the SIMD level, and spreads its work over threads.
#include "coreai_torch/rms_norm.h"

#include "cpu/levels.h"
#include "cpu/rms_norm_kernels.h"
#include "cpu/rms_norm_plan.h"
#include "cpu/run.h"

namespace coreai_torch {

#define COREAI_TORCH_DECLARE(id, name) extern const RmsNormKernels rms_norm_kernels_##id;
COREAI_TORCH_CPU_LEVELS(COREAI_TORCH_DECLARE)
extern const RmsNormKernels rms_norm_kernels_float64;

namespace {

#define COREAI_TORCH_ADDRESS(id, name) &rms_norm_kernels_##id,
constexpr const RmsNormKernels* kLevels[] = {COREAI_TORCH_CPU_LEVELS(COREAI_TORCH_ADDRESS)};

constexpr Tables<RmsNormKernels> kTables(kLevels, rms_norm_kernels_float64);

// The sum over no rows. Zero has the same bytes in every dtype.
void set_to_zero(void* grad_scale, const RmsNormShape& shape) {
  const int64_t bytes = shape.groups * shape.dim * kSizes[int(shape.scale_dtype)];
  for (int64_t i = 0; i < bytes; ++i) static_cast<char*>(grad_scale)[i] = 0;
}

}  // namespace

DType rms_norm_output_dtype(DType input, DType scale) {
  if (scale == input || scale == DType::kFloat32 || input == DType::kFloat64) return input;
  return scale == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

void rms_norm_forward_cpu(const RmsNormForward& args, ParallelFor parallel_for) {
  const RmsNormShape& shape = args.shape;
  if (shape.rows == 0 || shape.dim == 0) return;
  const DType output_dtype = rms_norm_output_dtype(shape.input_dtype, shape.scale_dtype);
  const int64_t input_row_bytes = shape.dim * kSizes[int(shape.input_dtype)];
  const int64_t row_bytes = shape.dim * kSizes[int(output_dtype)];
  Outputs outputs;
  if (is_contiguous(shape, {args.output_strides})) {
    outputs = Outputs(
        {{args.output, shape.rows * row_bytes, row_bytes}},
        shape.rows * (input_row_bytes + row_bytes), is_contiguous(shape, {args.input_strides}));
  }
  const int64_t unit = rows_in_unit(shape, args.input_strides);
  run(kTables.forward(shape), args, outputs, shape.rows / unit, unit * shape.dim, parallel_for);
}

int64_t rms_norm_backward_workspace_cpu(const RmsNormShape& shape) {
  if (shape.rows == 0 || shape.dim == 0) return 0;
  const int64_t element = shape.input_dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return backward_plan(shape).tasks * workspace_stride(shape.dim) * element;
}

void rms_norm_backward_cpu(const RmsNormBackward& args, ParallelFor parallel_for) {
  const RmsNormShape& shape = args.shape;
  if (shape.rows > 0 && shape.dim > 0) {
    const BackwardPlan plan = backward_plan(shape);
    const Outputs outputs = backward_outputs(
        args, plan, 3, is_contiguous(shape, {args.grad_output_strides, args.input_strides}));
    run(kTables.backward(shape), args, outputs, plan.tasks, plan.chunk_rows * shape.dim,
        parallel_for);
  }
  sum_grad_scale_cpu(args, parallel_for);
}

void sum_grad_scale_cpu(const RmsNormBackward& args, ParallelFor parallel_for) {
  const RmsNormShape& shape = args.shape;
  if (args.grad_scale == nullptr || shape.dim == 0) return;
  if (shape.rows == 0) {
    set_to_zero(args.grad_scale, shape);
    return;
  }
  const int64_t blocks_per_group = (shape.dim + kReduceColumns - 1) / kReduceColumns;
  const int64_t columns = shape.dim < kReduceColumns ? shape.dim : kReduceColumns;
  run(kTables.reduce(shape), args, Outputs(), shape.groups * blocks_per_group,
      columns * backward_plan(shape).chunks_per_group, parallel_for);
}

}  // namespace coreai_torch
