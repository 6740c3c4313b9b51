// add_rms_norm on CUDA in a build without CUDA kernels: say so, and how to get them.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "torch/add_rms_norm.h"

namespace coreai_torch {
namespace {

[[noreturn]] void not_built(const at::Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "add_rms_norm: expected input on a device that this build has kernels for, got ",
      input.device(),
      "; coreai_torch was built without CUDA kernels, coreai_torch.reference.add_rms_norm runs on "
      "any device");
}

std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm_cuda(
    const at::Tensor& input, const at::Tensor&, const at::Tensor&, double) {
  not_built(input);
}

std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm_backward_cuda(
    const at::Tensor&, const at::Tensor&, const at::Tensor& new_residual, const at::Tensor&, double,
    std::array<bool, 2>) {
  not_built(new_residual);
}

}  // namespace

TORCH_LIBRARY_IMPL(coreai_torch, CUDA, m) {
  m.impl("fused_add_rms_norm", fused_add_rms_norm_cuda);
  m.impl("fused_add_rms_norm_backward", fused_add_rms_norm_backward_cuda);
}

}  // namespace coreai_torch
