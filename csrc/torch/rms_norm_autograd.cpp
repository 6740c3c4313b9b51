// Autograd of rms_norm. Saved for backward: input and scale, nothing else; backward takes the
// statistics anew in the sweep that it makes anyway. Backward is an op with a formula of its own,
// so that the gradient can be differentiated in turn.
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

template <typename... Tensors>
bool require_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

template <typename... Tensors>
bool have_tangent(const Tensors&... tensors) {
  return (tensors._fw_grad(/*level=*/0).defined() || ...);
}

// Function::apply refuses to run under torch.func's transforms, because it cannot know what a
// forward does. Ours do one thing, they call the op on the layer below, and that is right under the
// transforms: it is what the formulas of PyTorch's own ops do. So the transforms are out of sight
// while apply is at work, and back while a forward is. So is the recording of gradients, which
// apply switches off: a transform further out has its own to record.
class HiddenTransforms {
 public:
  HiddenTransforms() { swap(); }
  ~HiddenTransforms() { swap(); }
  HiddenTransforms(const HiddenTransforms&) = delete;
  HiddenTransforms& operator=(const HiddenTransforms&) = delete;

  class Shown {
   public:
    explicit Shown(HiddenTransforms* hidden) : hidden_(hidden), grad_mode_(true) {
      hidden_->swap();
    }
    ~Shown() { hidden_->swap(); }
    Shown(const Shown&) = delete;
    Shown& operator=(const Shown&) = delete;

   private:
    HiddenTransforms* hidden_;
    at::AutoGradMode grad_mode_;
  };

 private:
  void swap() { std::swap(transforms_, at::functorch::functorchTLSAccessor()); }

  std::unique_ptr<at::functorch::FuncTorchTLSBase> transforms_;
};

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A gradient that was not asked for has no place in what backward returns.
at::Tensor if_wanted(bool wanted, const at::Tensor& grad) { return wanted ? grad : at::Tensor(); }

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
    auto [grad_input, grad_scale] = call_backward(grad_output, input, scale, eps, output_mask);
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
    return call_forward(input, scale, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const std::array<bool, 2> wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    if (!grads[0].defined() || !(wanted[0] || wanted[1])) return {{}, {}, {}, {}};
    const auto saved = ctx->get_saved_variables();
    auto [grad_input, grad_scale] =
        call_backward(grads[0], saved[0], saved[1], ctx->saved_data["eps"].toDouble(), wanted);
    return {if_wanted(wanted[0], grad_input), if_wanted(wanted[1], grad_scale), {}, {}};
  }
};

// A forward tangent is carried through the formula in ATen operations; so is one that comes where
// no gradient is recorded.
at::Tensor fused_rms_norm_autograd(const at::Tensor& input, const at::Tensor& scale, double eps) {
  check_tensor("input", input);
  check_tensor("scale", scale);
  if (have_tangent(input, scale)) return composite_rms_norm(input, scale, eps);
  if (!require_grad(input, scale)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_forward(input, scale, eps);
  }
  HiddenTransforms hidden;
  return RmsNormFunction::apply(input, scale, eps, &hidden);
}

std::tuple<at::Tensor, at::Tensor> fused_rms_norm_backward_autograd(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  check_tensor("grad_output", grad_output);
  check_tensor("input", input);
  check_tensor("scale", scale);
  if (have_tangent(grad_output, input, scale)) {
    return composite_rms_norm_backward(grad_output, input, scale, eps, output_mask);
  }
  if (!require_grad(grad_output, input, scale)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_backward(grad_output, input, scale, eps, output_mask);
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
