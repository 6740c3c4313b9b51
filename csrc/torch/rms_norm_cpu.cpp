// rms_norm on the CPU.
#include <torch/library.h>

#include "torch/parallel.h"
#include "torch/rms_norm.h"

namespace coreai_torch {
namespace {

constexpr RmsNormDevice kCpu = {
    kMaxDims,
    [](const RmsNormForward& args, const at::Tensor&) { rms_norm_forward_cpu(args, torch_for); },
    [](const RmsNormBackward& args, const at::Tensor&) {
      return args.grad_scale ? rms_norm_backward_workspace_cpu(args.shape) : 0;
    },
    [](const RmsNormBackward& args, const at::Tensor&) { rms_norm_backward_cpu(args, torch_for); },
};

at::Tensor fused_rms_norm_cpu(const at::Tensor& input, const at::Tensor& scale, double eps) {
  return fused_rms_norm(input, scale, eps, kCpu);
}

std::tuple<at::Tensor, at::Tensor> fused_rms_norm_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  return fused_rms_norm_backward(grad_output, input, scale, eps, output_mask, kCpu);
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
