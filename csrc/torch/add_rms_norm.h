// What the files of this folder share about add_rms_norm; see rms_norm.h.
#pragma once

#include <array>
#include <tuple>

#include <ATen/core/Tensor.h>

#include "coreai_torch/add_rms_norm.h"

namespace coreai_torch {

// Raise what the error contract says; coreai_torch/reference/add_rms_norm.py has the same in
// Python.
void check_add_rms_norm(
    const at::Tensor& input, const at::Tensor& residual, const at::Tensor& scale, double eps);
void check_add_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual,
    const at::Tensor& new_residual, const at::Tensor& scale, double eps);

// The same function and its gradient in differentiable ATen operations.
std::tuple<at::Tensor, at::Tensor> composite_add_rms_norm(
    const at::Tensor& input, const at::Tensor& residual, const at::Tensor& scale, double eps);
std::tuple<at::Tensor, at::Tensor> composite_add_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual,
    const at::Tensor& new_residual, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask);

// The kernels of a device.
struct AddRmsNormDevice {
  int max_row_dims;  // of a shape
  void (*forward)(const AddRmsNormForward& args, const at::Tensor& input);
  int64_t (*backward_workspace)(const AddRmsNormBackward& args, const at::Tensor& input);  // bytes
  void (*backward)(const AddRmsNormBackward& args, const at::Tensor& input);
};

// Check, allocate, describe, call the kernels. What no kernel takes runs in ATen operations.
std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm(
    const at::Tensor& input, const at::Tensor& residual, const at::Tensor& scale, double eps,
    const AddRmsNormDevice& device);
std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual,
    const at::Tensor& new_residual, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask, const AddRmsNormDevice& device);

// The op coreai_torch::fused_add_rms_norm, through the dispatcher.
std::tuple<at::Tensor, at::Tensor> call_add_rms_norm(
    const at::Tensor& input, const at::Tensor& residual, const at::Tensor& scale, double eps);

}  // namespace coreai_torch
