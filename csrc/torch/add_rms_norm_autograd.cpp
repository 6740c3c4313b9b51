// Autograd of add_rms_norm. Saved for backward: new_residual, which is an output, and scale,
// nothing else. A gradient of one output alone is what rms_norm or the add have for it.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "torch/add_rms_norm.h"
#include "torch/autograd.h"
#include "torch/rms_norm.h"

namespace coreai_torch {

std::tuple<at::Tensor, at::Tensor> call_add_rms_norm(
    const at::Tensor& input, const at::Tensor& residual, const at::Tensor& scale, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coreai_torch::fused_add_rms_norm", "")
                             .typed<decltype(call_add_rms_norm)>();
  return op.call(input, residual, scale, eps);
}

namespace {

std::tuple<at::Tensor, at::Tensor> call_backward(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual,
    const at::Tensor& new_residual, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coreai_torch::fused_add_rms_norm_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(grad_output, grad_new_residual, new_residual, scale, eps, output_mask);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class AddRmsNormBackwardFunction : public torch::autograd::Function<AddRmsNormBackwardFunction> {
 public:
  static constexpr bool is_traceable = true;  // by compiled autograd

  static variable_list forward(
      AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& grad_new_residual,
      const at::Tensor& new_residual, const at::Tensor& scale, double eps,
      std::array<bool, 2> output_mask, HiddenTransforms* hidden) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({grad_output, new_residual, scale});
    ctx->saved_data["eps"] = eps;
    const HiddenTransforms::Shown shown(hidden);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [grad_input, grad_scale] =
        call_backward(grad_output, grad_new_residual, new_residual, scale, eps, output_mask);
    return {grad_input, grad_scale};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const std::array<bool, 4> wanted = {
        ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
        ctx->needs_input_grad(3)};
    auto [grad_grad_output, grad_new_residual, grad_scale] = composite_rms_norm_double_backward(
        grads[0], grads[1], saved[0], saved[1], saved[2], ctx->saved_data["eps"].toDouble());
    return {
        if_wanted(wanted[0], grad_grad_output),
        if_wanted(wanted[1], grads[0]),
        if_wanted(wanted[2], grad_new_residual),
        if_wanted(wanted[3], grad_scale),
        {},
        {},
        {}};
  }
};

class AddRmsNormFunction : public torch::autograd::Function<AddRmsNormFunction> {
 public:
  static constexpr bool is_traceable = true;  // by compiled autograd

  static variable_list forward(
      AutogradContext* ctx, const at::Tensor& input, const at::Tensor& residual,
      const at::Tensor& scale, double eps, HiddenTransforms* hidden) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["eps"] = eps;
    const HiddenTransforms::Shown shown(hidden);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, new_residual] = call_add_rms_norm(input, residual, scale, eps);
    ctx->save_for_backward({new_residual, scale});
    return {output, new_residual};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool wants_sum = ctx->needs_input_grad(0) || ctx->needs_input_grad(1);
    const bool wants_scale = ctx->needs_input_grad(2);
    at::Tensor grad_sum, grad_scale;
    if (!grads[0].defined()) {
      grad_sum = grads[1];
    } else if (wants_sum || wants_scale) {
      const auto saved = ctx->get_saved_variables();
      const double eps = ctx->saved_data["eps"].toDouble();
      const std::array<bool, 2> wanted = {wants_sum, wants_scale};
      std::tie(grad_sum, grad_scale) =
          wants_sum && grads[1].defined()
              ? call_backward(grads[0], grads[1], saved[0], saved[1], eps, wanted)
              : call_rms_norm_backward(grads[0], saved[0], saved[1], eps, wanted);
    }
    return {
        if_wanted(ctx->needs_input_grad(0), grad_sum),
        if_wanted(ctx->needs_input_grad(1), grad_sum),
        if_wanted(wants_scale, grad_scale),
        {},
        {}};
  }
};

// A forward tangent is carried through the formula in ATen operations; so is one that comes where
// no gradient is recorded.
std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm_autograd(
    const at::Tensor& input, const at::Tensor& residual, const at::Tensor& scale, double eps) {
  check_tensors("add_rms_norm", {{"input", input}, {"residual", residual}, {"scale", scale}});
  if (have_tangent(input, residual, scale)) {
    return composite_add_rms_norm(input, residual, scale, eps);
  }
  if (!require_grad(input, residual, scale)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_add_rms_norm(input, residual, scale, eps);
  }
  HiddenTransforms hidden;
  const variable_list outputs = AddRmsNormFunction::apply(input, residual, scale, eps, &hidden);
  return {outputs[0], outputs[1]};
}

std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm_backward_autograd(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual,
    const at::Tensor& new_residual, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  check_tensors(
      "add_rms_norm", {{"grad_output", grad_output},
                       {"grad_new_residual", grad_new_residual},
                       {"new_residual", new_residual},
                       {"scale", scale}});
  if (have_tangent(grad_output, grad_new_residual, new_residual, scale)) {
    return composite_add_rms_norm_backward(
        grad_output, grad_new_residual, new_residual, scale, eps, output_mask);
  }
  if (!require_grad(grad_output, grad_new_residual, new_residual, scale)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_backward(grad_output, grad_new_residual, new_residual, scale, eps, output_mask);
  }
  HiddenTransforms hidden;
  const variable_list grads = AddRmsNormBackwardFunction::apply(
      grad_output, grad_new_residual, new_residual, scale, eps, output_mask, &hidden);
  return {grads[0], grads[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(coreai_torch, Autograd, m) {
  m.impl("fused_add_rms_norm", fused_add_rms_norm_autograd);
  m.impl("fused_add_rms_norm_backward", fused_add_rms_norm_backward_autograd);
}

}  // namespace coreai_torch
