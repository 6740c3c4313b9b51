// Autograd of rms_norm. Saved for backward: input and scale, nothing else; backward takes the
// statistics anew in the sweep that it makes anyway. Backward is an op with a formula of its own,
// so that the gradient can be differentiated in turn.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "torch/autograd.h"
#include "torch/rms_norm.h"

namespace coreai_torch {

at::Tensor call_rms_norm(const at::Tensor& input, const at::Tensor& scale, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coreai_torch::fused_rms_norm", "")
                             .typed<decltype(call_rms_norm)>();
  return op.call(input, scale, eps);
}

std::tuple<at::Tensor, at::Tensor> call_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coreai_torch::fused_rms_norm_backward", "")
                             .typed<decltype(call_rms_norm_backward)>();
  return op.call(grad_output, input, scale, eps, output_mask);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class RmsNormBackwardFunction : public torch::autograd::Function<RmsNormBackwardFunction> {
 public:
  static constexpr bool is_traceable = true;  // by compiled autograd

  static variable_list forward(
      AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& input,
      const at::Tensor& scale, double eps, std::array<bool, 2> output_mask,
      HiddenTransforms* hidden) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({grad_output, input, scale});
    ctx->saved_data["eps"] = eps;
    const HiddenTransforms::Shown shown(hidden);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [grad_input, grad_scale] =
        call_rms_norm_backward(grad_output, input, scale, eps, output_mask);
    return {grad_input, grad_scale};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const std::array<bool, 3> wanted = {
        ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    auto [grad_grad_output, grad_input, grad_scale] = composite_rms_norm_double_backward(
        grads[0], grads[1], saved[0], saved[1], saved[2], ctx->saved_data["eps"].toDouble());
    return {
        if_wanted(wanted[0], grad_grad_output),
        if_wanted(wanted[1], grad_input),
        if_wanted(wanted[2], grad_scale),
        {},
        {},
        {}};
  }
};

class RmsNormFunction : public torch::autograd::Function<RmsNormFunction> {
 public:
  static constexpr bool is_traceable = true;  // by compiled autograd

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, const at::Tensor& scale, double eps,
      HiddenTransforms* hidden) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({input, scale});
    ctx->saved_data["eps"] = eps;
    const HiddenTransforms::Shown shown(hidden);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_rms_norm(input, scale, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const std::array<bool, 2> wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    if (!grads[0].defined() || !(wanted[0] || wanted[1])) return {{}, {}, {}, {}};
    const auto saved = ctx->get_saved_variables();
    auto [grad_input, grad_scale] = call_rms_norm_backward(
        grads[0], saved[0], saved[1], ctx->saved_data["eps"].toDouble(), wanted);
    return {if_wanted(wanted[0], grad_input), if_wanted(wanted[1], grad_scale), {}, {}};
  }
};

// A forward tangent is carried through the formula in ATen operations; so is one that comes where
// no gradient is recorded.
at::Tensor fused_rms_norm_autograd(const at::Tensor& input, const at::Tensor& scale, double eps) {
  check_tensors("rms_norm", {{"input", input}, {"scale", scale}});
  if (have_tangent(input, scale)) return composite_rms_norm(input, scale, eps);
  if (!require_grad(input, scale)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_rms_norm(input, scale, eps);
  }
  HiddenTransforms hidden;
  return RmsNormFunction::apply(input, scale, eps, &hidden);
}

std::tuple<at::Tensor, at::Tensor> fused_rms_norm_backward_autograd(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  check_tensors("rms_norm", {{"grad_output", grad_output}, {"input", input}, {"scale", scale}});
  if (have_tangent(grad_output, input, scale)) {
    return composite_rms_norm_backward(grad_output, input, scale, eps, output_mask);
  }
  if (!require_grad(grad_output, input, scale)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_rms_norm_backward(grad_output, input, scale, eps, output_mask);
  }
  HiddenTransforms hidden;
  const variable_list grads =
      RmsNormBackwardFunction::apply(grad_output, input, scale, eps, output_mask, &hidden);
  return {grads[0], grads[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(coreai_torch, Autograd, m) {
  m.impl("fused_rms_norm", fused_rms_norm_autograd);
  m.impl("fused_rms_norm_backward", fused_rms_norm_backward_autograd);
}

}  // namespace coreai_torch
