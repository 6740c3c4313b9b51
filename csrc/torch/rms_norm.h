// What the files of this folder share about rms_norm: argument checks, the formula in ATen
// operations, and the description of a call for the kernels.
#pragma once

#include <array>
#include <tuple>

#include <ATen/core/Tensor.h>

#include "coreai_torch/rms_norm.h"

namespace coreai_torch {

// That there is a tensor (where Python has None, the dispatcher passes an undefined one), and that
// it has sizes and strides.
void check_tensor(const char* name, const at::Tensor& tensor);

// Raise what the error contract says; coreai_torch/reference/rms_norm.py has the same in Python.
void check_rms_norm(const at::Tensor& input, const at::Tensor& scale, double eps);
void check_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps);

// The dtype that the output has.
at::ScalarType rms_norm_output_type(at::ScalarType input, at::ScalarType scale);

// The same function and its gradient in differentiable ATen operations: for transforms that have to
// see inside (functorch, forward-mode AD, double backward), for devices without a kernel, and for
// scales that the kernels do not take.
at::Tensor composite_rms_norm(const at::Tensor& input, const at::Tensor& scale, double eps);
std::tuple<at::Tensor, at::Tensor> composite_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask);

// The gradient of that gradient: of <grad_grad_input, grad_input> + <grad_grad_scale, grad_scale>
// with respect to grad_output, input and scale, in differentiable ATen operations. Either of
// grad_grad_input and grad_grad_scale may be undefined, which stands for zero.
std::tuple<at::Tensor, at::Tensor, at::Tensor> composite_rms_norm_double_backward(
    const at::Tensor& grad_grad_input, const at::Tensor& grad_grad_scale,
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps);

// The kernels of a device.
struct RmsNormDevice {
  int max_row_dims;  // of a shape
  void (*forward)(const RmsNormForward& args, const at::Tensor& input);
  int64_t (*backward_workspace)(const RmsNormBackward& args, const at::Tensor& input);  // bytes
  void (*backward)(const RmsNormBackward& args, const at::Tensor& input);
};

// Check, allocate, describe, call the kernels. What no kernel takes runs in ATen operations.
at::Tensor fused_rms_norm(
    const at::Tensor& input, const at::Tensor& scale, double eps, const RmsNormDevice& device);
std::tuple<at::Tensor, at::Tensor> fused_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask, const RmsNormDevice& device);

}  // namespace coreai_torch
