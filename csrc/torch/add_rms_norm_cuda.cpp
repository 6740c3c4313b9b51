// add_rms_norm on CUDA.
#include "coreai_torch/add_rms_norm_cuda.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "torch/add_rms_norm.h"
#include "torch/cuda.h"

namespace coreai_torch {
namespace {

constexpr AddRmsNormDevice kCuda = {
    kMaxRowDimsCuda,
    [](const AddRmsNormForward& args, const at::Tensor& input) {
      check_cuda(
          add_rms_norm_forward_cuda(args, input.get_device(), current_stream(input)),
          "add_rms_norm: forward", input);
    },
    [](const AddRmsNormBackward& args, const at::Tensor& input) {
      return add_rms_norm_backward_workspace_cuda(args, input.get_device());
    },
    [](const AddRmsNormBackward& args, const at::Tensor& input) {
      check_cuda(
          add_rms_norm_backward_cuda(args, input.get_device(), current_stream(input)),
          "add_rms_norm: backward", input);
    },
};

std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm_cuda(
    const at::Tensor& input, const at::Tensor& residual, const at::Tensor& scale, double eps) {
  const c10::DeviceGuard guard(input.device());
  return fused_add_rms_norm(input, residual, scale, eps, kCuda);
}

std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual,
    const at::Tensor& new_residual, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  const c10::DeviceGuard guard(new_residual.device());
  return fused_add_rms_norm_backward(
      grad_output, grad_new_residual, new_residual, scale, eps, output_mask, kCuda);
}

}  // namespace

TORCH_LIBRARY_IMPL(coreai_torch, CUDA, m) {
  m.impl("fused_add_rms_norm", fused_add_rms_norm_cuda);
  m.impl("fused_add_rms_norm_backward", fused_add_rms_norm_backward_cuda);
}

}  // namespace coreai_torch
