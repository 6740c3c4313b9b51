// Autograd of rms_norm. Saved for backward: input and scale, nothing else; backward takes the
// statistics anew in the sweep that it makes anyway.
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "torch/rms_norm.h"

namespace coreai_torch {
namespace {

at::Tensor call_forward(const at::Tensor& input, const at::Tensor& scale, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coreai_torch::fused_rms_norm", "")
                             .typed<decltype(call_forward)>();
  return op.call(input, scale, eps);
}

std::tuple<at::Tensor, at::Tensor> call_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coreai_torch::fused_rms_norm_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(grad_output, input, scale, eps, output_mask);
}

class RmsNormFunction : public torch::autograd::Function<RmsNormFunction> {
 public:
  static at::Tensor forward(
      torch::autograd::AutogradContext* ctx, const at::Tensor& input, const at::Tensor& scale,
      double eps) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({input, scale});
    ctx->saved_data["eps"] = eps;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_forward(input, scale, eps);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    const std::array<bool, 2> wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    if (!grads[0].defined() || !(wanted[0] || wanted[1])) return {{}, {}, {}};
    const auto saved = ctx->get_saved_variables();
    auto [grad_input, grad_scale] =
        call_backward(grads[0], saved[0], saved[1], ctx->saved_data["eps"].toDouble(), wanted);
    return {wanted[0] ? grad_input : at::Tensor(), wanted[1] ? grad_scale : at::Tensor(), {}};
  }
};

bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

// torch.func's transforms do not support C++ autograd functions.
bool in_functorch_transform() {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch) return false;
  try {
    functorch->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

at::Tensor fused_rms_norm_autograd(const at::Tensor& input, const at::Tensor& scale, double eps) {
  if (has_tangent(input) || has_tangent(scale) || in_functorch_transform()) {
    return composite_rms_norm(input, scale, eps);
  }
  if (!at::GradMode::is_enabled() || !(input.requires_grad() || scale.requires_grad())) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_forward(input, scale, eps);
  }
  return RmsNormFunction::apply(input, scale, eps);
}

// Where the gradient itself is to be differentiated, it is the formula in ATen operations.
std::tuple<at::Tensor, at::Tensor> fused_rms_norm_backward_autograd(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  const bool differentiated =
      at::GradMode::is_enabled() &&
      (grad_output.requires_grad() || input.requires_grad() || scale.requires_grad());
  if (differentiated || has_tangent(grad_output) || has_tangent(input) || has_tangent(scale) ||
      in_functorch_transform()) {
    return composite_rms_norm_backward(grad_output, input, scale, eps, output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward(grad_output, input, scale, eps, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(coreai_torch, Autograd, m) {
  m.impl("fused_rms_norm", fused_rms_norm_autograd);
  m.impl("fused_rms_norm_backward", fused_rms_norm_backward_autograd);
}

}  // namespace coreai_torch
