// rms_norm on CUDA.
#include "coreai_torch/rms_norm_cuda.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "torch/cuda.h"
#include "torch/rms_norm.h"

namespace coreai_torch {
namespace {

constexpr RmsNormDevice kCuda = {
    kMaxRowDimsCuda,
    [](const RmsNormForward& args, const at::Tensor& input) {
      check_cuda(
          rms_norm_forward_cuda(args, input.get_device(), current_stream(input)),
          "rms_norm: forward", input);
    },
    [](const RmsNormBackward& args, const at::Tensor& input) {
      return rms_norm_backward_workspace_cuda(args, input.get_device());
    },
    [](const RmsNormBackward& args, const at::Tensor& input) {
      check_cuda(
          rms_norm_backward_cuda(args, input.get_device(), current_stream(input)),
          "rms_norm: backward", input);
    },
};

at::Tensor fused_rms_norm_cuda(const at::Tensor& input, const at::Tensor& scale, double eps) {
  const c10::DeviceGuard guard(input.device());
  return fused_rms_norm(input, scale, eps, kCuda);
}

std::tuple<at::Tensor, at::Tensor> fused_rms_norm_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  const c10::DeviceGuard guard(input.device());
  return fused_rms_norm_backward(grad_output, input, scale, eps, output_mask, kCuda);
}

}  // namespace

TORCH_LIBRARY_IMPL(coreai_torch, CUDA, m) {
  m.impl("fused_rms_norm", fused_rms_norm_cuda);
  m.impl("fused_rms_norm_backward", fused_rms_norm_backward_cuda);
}

}  // namespace coreai_torch
