// What the autograd formulas of the ops share.
#pragma once

#include <memory>
#include <utility>

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

namespace coreai_torch {

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

// A gradient that was not asked for has no place in what backward returns.
inline at::Tensor if_wanted(bool wanted, const at::Tensor& grad) {
  return wanted ? grad : at::Tensor();
}

}  // namespace coreai_torch
