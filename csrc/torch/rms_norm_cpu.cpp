// rms_norm on the CPU: check, allocate, describe, call the kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include "torch/rms_norm.h"

namespace coreai_torch {
namespace {

// In libtorch's own thread pool, through its C interface: at::parallel_for is a header-only
// template that turns serial without a word where this file is not compiled with OpenMP.
void torch_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  TORCH_CHECK(torch_parallel_for(begin, end, grain, body, context) == 0, "rms_norm: failed");
}

at::Tensor fused_rms_norm_cpu(const at::Tensor& input, const at::Tensor& scale, double eps) {
  check_rms_norm(input, scale, eps);
  RmsNormForward args;
  if (!describe_rms_norm(input, scale, eps, &args.shape)) {
    return composite_rms_norm(input, scale, eps);
  }
  at::Tensor output = at::empty_like(
      input, input.options().dtype(rms_norm_output_type(input.scalar_type(), scale.scalar_type())));
  const at::Tensor x = with_adjacent_rows(input);
  const at::Tensor w = scale.contiguous();
  const bool adjacent = output.size(-1) <= 1 || output.stride(-1) == 1;
  at::Tensor y = adjacent ? output : at::empty(output.sizes(), output.options());

  args.input = x.const_data_ptr();
  args.scale = w.const_data_ptr();
  args.output = y.mutable_data_ptr();
  describe_rows(
      input.sizes(), {{x.strides(), args.input_strides}, {y.strides(), args.output_strides}},
      &args.shape);
  rms_norm_forward_cpu(args, torch_for);
  if (!adjacent) output.copy_(y);
  return output;
}

std::tuple<at::Tensor, at::Tensor> fused_rms_norm_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  check_rms_norm_backward(grad_output, input, scale, eps);
  RmsNormBackward args;
  if (!describe_rms_norm(input, scale, eps, &args.shape)) {
    return composite_rms_norm_backward(grad_output, input, scale, eps, output_mask);
  }
  const at::Tensor dy = with_adjacent_rows(grad_output);
  const at::Tensor x = with_adjacent_rows(input);
  const at::Tensor w = scale.contiguous();
  args.grad_output = dy.const_data_ptr();
  args.input = x.const_data_ptr();
  args.scale = w.const_data_ptr();

  at::Tensor grad_input, dx;
  if (output_mask[0]) {
    grad_input = at::empty_like(input);
    const bool adjacent = grad_input.size(-1) <= 1 || grad_input.stride(-1) == 1;
    dx = adjacent ? grad_input : at::empty(input.sizes(), input.options());
  } else {
    grad_input = at::empty({0}, input.options());
  }
  args.grad_input = output_mask[0] ? dx.mutable_data_ptr() : nullptr;

  at::Tensor grad_scale, workspace;
  if (output_mask[1]) {
    grad_scale = at::empty(scale.sizes(), scale.options());
    workspace =
        at::empty({rms_norm_backward_workspace_cpu(args.shape)}, input.options().dtype(at::kByte));
    args.workspace = workspace.mutable_data_ptr();
  } else {
    grad_scale = at::empty({0}, scale.options());
  }
  args.grad_scale = output_mask[1] ? grad_scale.mutable_data_ptr() : nullptr;

  describe_rows(
      input.sizes(),
      {{dy.strides(), args.grad_output_strides},
       {x.strides(), args.input_strides},
       {output_mask[0] ? dx.strides() : x.strides(), args.grad_input_strides}},
      &args.shape);
  if (output_mask[0] || output_mask[1]) rms_norm_backward_cpu(args, torch_for);
  if (output_mask[0] && !dx.is_same(grad_input)) grad_input.copy_(dx);
  return {grad_input, grad_scale};
}

}  // namespace

TORCH_LIBRARY_IMPL(coreai_torch, CPU, m) {
  m.impl("fused_rms_norm", fused_rms_norm_cpu);
  m.impl("fused_rms_norm_backward", fused_rms_norm_backward_cpu);
}

// Devices without a kernel (MPS, XPU, ...) run the formula in ATen operations.
TORCH_LIBRARY_IMPL(coreai_torch, CompositeExplicitAutograd, m) {
  m.impl("fused_rms_norm", composite_rms_norm);
  m.impl("fused_rms_norm_backward", composite_rms_norm_backward);
}

}  // namespace coreai_torch
