// add_rms_norm on the CPU.
#include <torch/library.h>

#include "torch/add_rms_norm.h"
#include "torch/parallel.h"

namespace coreai_torch {
namespace {

constexpr AddRmsNormDevice kCpu = {
    kMaxDims,
    [](const AddRmsNormForward& args, const at::Tensor&) {
      add_rms_norm_forward_cpu(args, torch_for);
    },
    [](const AddRmsNormBackward& args, const at::Tensor&) {
      return args.grad_scale ? rms_norm_backward_workspace_cpu(args.shape) : 0;
    },
    [](const AddRmsNormBackward& args, const at::Tensor&) {
      add_rms_norm_backward_cpu(args, torch_for);
    },
};

std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm_cpu(
    const at::Tensor& input, const at::Tensor& residual, const at::Tensor& scale, double eps) {
  return fused_add_rms_norm(input, residual, scale, eps, kCpu);
}

std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual,
    const at::Tensor& new_residual, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  return fused_add_rms_norm_backward(
      grad_output, grad_new_residual, new_residual, scale, eps, output_mask, kCpu);
}

}  // namespace

TORCH_LIBRARY_IMPL(coreai_torch, CPU, m) {
  m.impl("fused_add_rms_norm", fused_add_rms_norm_cpu);
  m.impl("fused_add_rms_norm_backward", fused_add_rms_norm_backward_cpu);
}

// Devices without a kernel (MPS, XPU, ...) run the formula in ATen operations.
TORCH_LIBRARY_IMPL(coreai_torch, CompositeExplicitAutograd, m) {
  m.impl("fused_add_rms_norm", composite_add_rms_norm);
  m.impl("fused_add_rms_norm_backward", composite_add_rms_norm_backward);
}

}  // namespace coreai_torch
