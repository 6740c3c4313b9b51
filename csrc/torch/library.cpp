// Every schema of the library, and nothing else
#include <torch/library.h>

TORCH_LIBRARY(coreai_torch, m) {
  // Public. Its one kernel is CompositeImplicitAutograd and is registered from Python
  // (coreai_torch/ops/rms_norm.py): plain ATen operations while exporting, fused_rms_norm
  // otherwise.
  m.def("rms_norm(Tensor input, Tensor scale, float eps=1e-05) -> Tensor");

  // Private. The strides of the output and of grad_input are those of torch.empty_like(input).
  // A gradient that is not asked for is an empty tensor of shape (0,).
  m.def("fused_rms_norm(Tensor input, Tensor scale, float eps) -> Tensor");
  m.def(
      "fused_rms_norm_backward(Tensor grad_output, Tensor input, Tensor scale, float eps, "
      "bool[2] output_mask) -> (Tensor grad_input, Tensor grad_scale)");

  // Private; input and residual have one shape and dtype. new_residual is their sum, and output its
  // norm; both have the strides of torch.empty_like(input). The gradient of input is that of
  // residual, too.
  m.def(
      "fused_add_rms_norm(Tensor input, Tensor residual, Tensor scale, float eps) -> "
      "(Tensor output, Tensor new_residual)");
  m.def(
      "fused_add_rms_norm_backward(Tensor grad_output, Tensor grad_new_residual, "
      "Tensor new_residual, Tensor scale, float eps, bool[2] output_mask) -> "
      "(Tensor grad_input, Tensor grad_scale)");
}
