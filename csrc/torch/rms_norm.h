// What the files of this folder share about rms_norm: argument checks, the formula in ATen
// operations, and the description of a call for the kernels.
#pragma once

#include <array>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>

#include <ATen/core/Tensor.h>

#include "coreai_torch/rms_norm.h"

namespace coreai_torch {

std::string name_of(at::ScalarType type);  // as Python prints it

// Raise what the error contract says, in the name of `op`; coreai_torch/reference/rms_norm.py has
// the same in Python.
//
// check_tensor: there is one (where Python has None, the dispatcher passes an undefined one), and
// it has sizes and strides. check_storage: it has not been resized behind the back of its tensors,
// as FSDP does to free parameters.
void check_tensor(const char* op, const char* name, const at::Tensor& tensor);
void check_tensors(
    const char* op, std::initializer_list<std::pair<const char*, const at::Tensor&>> tensors);
void check_storage(const char* op, const char* name, const at::Tensor& tensor);
void check_dense(const char* op, const char* name, const at::Tensor& tensor);
// `of` is what the user knows `input` as.
void check_device(
    const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& input,
    const char* of = "input");
void check_rms_norm(
    const at::Tensor& input, const at::Tensor& scale, double eps, const char* op = "rms_norm");
void check_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    const char* op = "rms_norm");

// The dtype that the output has.
at::ScalarType rms_norm_output_type(at::ScalarType input, at::ScalarType scale);

// The same function and its gradient in differentiable ATen operations: for transforms that have to
// see inside (functorch, forward-mode AD, double backward), for devices without a kernel, and for
// scales that the kernels do not take.
at::Tensor composite_rms_norm(const at::Tensor& input, const at::Tensor& scale, double eps);
std::tuple<at::Tensor, at::Tensor> composite_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask);

// The same without the checks. grad_new_residual may be undefined; otherwise it is added to
// grad_input before that is rounded.
std::tuple<at::Tensor, at::Tensor> composite_backward(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual, const at::Tensor& input,
    const at::Tensor& scale, double eps, std::array<bool, 2> output_mask);

// `result`, or a copy of it, with the strides that the kernels give: those of empty_like(input).
at::Tensor with_layout_of(const at::Tensor& input, const at::Tensor& result);

// The gradient of that gradient: of <grad_grad_input, grad_input> + <grad_grad_scale, grad_scale>
// with respect to grad_output, input and scale, in differentiable ATen operations. Either of
// grad_grad_input and grad_grad_scale may be undefined, which stands for zero.
std::tuple<at::Tensor, at::Tensor, at::Tensor> composite_rms_norm_double_backward(
    const at::Tensor& grad_grad_input, const at::Tensor& grad_grad_scale,
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps);

// ---- the description of a call -----------------------------------------------------------------

// Fills all of a shape but its row layout. Returns false where the kernels do not take the scale:
// they take those where row r uses scale row (r / inner) % groups.
bool describe_rms_norm(
    const at::Tensor& input, const at::Tensor& scale, double eps, RmsNormShape* shape);

// Fills the row layout of `shape` and the row strides of each operand, all of the input's sizes,
// with as few row dimensions as the strides allow. Rows that all share one scale row are counted as
// the input has them in memory, if it is dense: heads of a transposed view are rows like others
// then.
struct RowOperand {
  at::IntArrayRef strides;
  int64_t* row_strides;
};
void describe_rows(
    const at::Tensor& input, std::initializer_list<RowOperand> operands, RmsNormShape* shape);

// Are the elements of a row adjacent in memory?
bool has_adjacent_rows(const at::Tensor& tensor);
// `tensor` itself where they are, else a copy in which they are and in which expanded dimensions
// stay expanded.
at::Tensor with_adjacent_rows(const at::Tensor& tensor);
// What the kernels write to: `result` where they are, else something that is copied to it.
at::Tensor written_for(const at::Tensor& result);

// ---- the call ----------------------------------------------------------------------------------

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

// The ops coreai_torch::fused_rms_norm and fused_rms_norm_backward, through the dispatcher.
at::Tensor call_rms_norm(const at::Tensor& input, const at::Tensor& scale, double eps);
std::tuple<at::Tensor, at::Tensor> call_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask);

}  // namespace coreai_torch
