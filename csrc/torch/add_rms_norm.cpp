#include "torch/add_rms_norm.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "torch/rms_norm.h"

namespace coreai_torch {
namespace {

constexpr const char* kOp = "add_rms_norm";

void check_like(
    const char* name, const at::Tensor& tensor, const char* of, const at::Tensor& input) {
  check_dense(kOp, name, tensor);
  TORCH_CHECK(
      tensor.sizes() == input.sizes(), kOp, ": expected ", name, " with the shape of ", of, ", ",
      input.sizes(), ", got shape ", tensor.sizes());
  TORCH_CHECK(
      tensor.scalar_type() == input.scalar_type(), kOp, ": expected ", name, " of the dtype of ",
      of, ", ", name_of(input.scalar_type()), ", got ", name_of(tensor.scalar_type()));
  check_device(kOp, name, tensor, input, of);
}

// The dtype in which the kernels take the scale. Beside input that is not of 16 bits, a lower one
// is converted: the products are of the input's dtype either way.
at::ScalarType kernel_scale_type(const at::Tensor& input, const at::Tensor& scale) {
  return input.element_size() == 2 ? scale.scalar_type() : input.scalar_type();
}

// As describe_rms_norm(), for the scale in that dtype.
bool describe_add_rms_norm(
    const at::Tensor& input, const at::Tensor& scale, double eps, RmsNormShape* shape) {
  if (!describe_rms_norm(input, scale, eps, shape)) return false;
  if (input.element_size() != 2) shape->scale_dtype = shape->input_dtype;
  return add_rms_norm_has_kernels(shape->input_dtype, shape->scale_dtype);
}

}  // namespace

void check_add_rms_norm(
    const at::Tensor& input, const at::Tensor& residual, const at::Tensor& scale, double eps) {
  check_rms_norm(input, scale, eps, kOp);
  check_like("residual", residual, "input", input);
}

void check_add_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual,
    const at::Tensor& new_residual, const at::Tensor& scale, double eps) {
  check_rms_norm_backward(grad_output, new_residual, scale, eps, kOp);
  check_like("grad_new_residual", grad_new_residual, "new_residual", new_residual);
}

std::tuple<at::Tensor, at::Tensor> composite_add_rms_norm(
    const at::Tensor& input, const at::Tensor& residual, const at::Tensor& scale, double eps) {
  check_add_rms_norm(input, residual, scale, eps);
  const at::Tensor new_residual = with_layout_of(input, input + residual);
  return {composite_rms_norm(new_residual, scale, eps), new_residual};
}

std::tuple<at::Tensor, at::Tensor> composite_add_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual,
    const at::Tensor& new_residual, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  check_add_rms_norm_backward(grad_output, grad_new_residual, new_residual, scale, eps);
  return composite_backward(grad_output, grad_new_residual, new_residual, scale, eps, output_mask);
}

std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm(
    const at::Tensor& input, const at::Tensor& residual, const at::Tensor& scale, double eps,
    const AddRmsNormDevice& device) {
  check_add_rms_norm(input, residual, scale, eps);
  check_storage(kOp, "input", input);
  check_storage(kOp, "residual", residual);
  check_storage(kOp, "scale", scale);
  const at::TensorOptions output_options =
      input.options().dtype(rms_norm_output_type(input.scalar_type(), scale.scalar_type()));
  // Nothing to compute, and maybe more dimensions than can be described.
  if (input.numel() == 0) return {at::empty_like(input, output_options), at::empty_like(input)};
  AddRmsNormForward args;
  if (!describe_add_rms_norm(input, scale, eps, &args.shape)) {
    return composite_add_rms_norm(input, residual, scale, eps);
  }
  const at::Tensor output = at::empty_like(input, output_options);
  const at::Tensor new_residual = at::empty_like(input);
  at::Tensor x = with_adjacent_rows(input), r = with_adjacent_rows(residual);
  at::Tensor y = written_for(output), h = written_for(new_residual);
  const auto describe = [&] {
    describe_rows(
        x,
        {{x.strides(), args.input_strides},
         {r.strides(), args.residual_strides},
         {y.strides(), args.output_strides},
         {h.strides(), args.new_residual_strides}},
        &args.shape);
  };
  describe();
  if (args.shape.row_ndim > device.max_row_dims) {
    x = x.contiguous();
    r = r.contiguous();
    if (!y.is_contiguous()) y = at::empty(output.sizes(), output.options());
    if (!h.is_contiguous()) h = at::empty(input.sizes(), input.options());
    describe();
  }
  const at::Tensor w = scale.to(kernel_scale_type(input, scale)).contiguous();
  args.input = x.const_data_ptr();
  args.residual = r.const_data_ptr();
  args.scale = w.const_data_ptr();
  args.output = y.mutable_data_ptr();
  args.new_residual = h.mutable_data_ptr();
  device.forward(args, input);
  if (!y.is_same(output)) output.copy_(y);
  if (!h.is_same(new_residual)) new_residual.copy_(h);
  return {output, new_residual};
}

std::tuple<at::Tensor, at::Tensor> fused_add_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual,
    const at::Tensor& new_residual, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask, const AddRmsNormDevice& device) {
  check_add_rms_norm_backward(grad_output, grad_new_residual, new_residual, scale, eps);
  if (!output_mask[0]) {  // nothing to add to
    return call_rms_norm_backward(grad_output, new_residual, scale, eps, output_mask);
  }
  check_storage(kOp, "grad_output", grad_output);
  check_storage(kOp, "grad_new_residual", grad_new_residual);
  check_storage(kOp, "new_residual", new_residual);
  check_storage(kOp, "scale", scale);
  constexpr int64_t kNone[] = {0};
  if (new_residual.numel() == 0) {
    const at::IntArrayRef sizes = output_mask[1] ? scale.sizes() : at::IntArrayRef(kNone);
    return {at::empty_like(new_residual), at::zeros(sizes, scale.options())};
  }
  AddRmsNormBackward args;
  if (!describe_add_rms_norm(new_residual, scale, eps, &args.shape)) {
    return composite_backward(
        grad_output, grad_new_residual, new_residual, scale, eps, output_mask);
  }
  const at::Tensor grad_input = at::empty_like(new_residual);
  at::Tensor dy = with_adjacent_rows(grad_output), dh = with_adjacent_rows(grad_new_residual);
  at::Tensor h = with_adjacent_rows(new_residual), dx = written_for(grad_input);
  const auto describe = [&] {
    describe_rows(
        h,
        {{dy.strides(), args.grad_output_strides},
         {dh.strides(), args.grad_new_residual_strides},
         {h.strides(), args.input_strides},
         {dx.strides(), args.grad_input_strides}},
        &args.shape);
  };
  describe();
  if (args.shape.row_ndim > device.max_row_dims) {
    dy = dy.contiguous();
    dh = dh.contiguous();
    h = h.contiguous();
    if (!dx.is_contiguous()) dx = at::empty(grad_input.sizes(), grad_input.options());
    describe();
  }
  const at::Tensor w = scale.to(kernel_scale_type(new_residual, scale)).contiguous();
  const at::Tensor dw = at::empty(output_mask[1] ? w.sizes() : at::IntArrayRef(kNone), w.options());
  args.grad_output = dy.const_data_ptr();
  args.grad_new_residual = dh.const_data_ptr();
  args.input = h.const_data_ptr();
  args.scale = w.const_data_ptr();
  args.grad_input = dx.mutable_data_ptr();
  args.grad_scale = output_mask[1] ? dw.mutable_data_ptr() : nullptr;
  at::Tensor workspace;
  if (const int64_t bytes = device.backward_workspace(args, new_residual); bytes > 0) {
    workspace = at::empty({bytes}, new_residual.options().dtype(at::kByte));
    args.workspace = workspace.mutable_data_ptr();
  } else {
    args.workspace = nullptr;
  }
  device.backward(args, new_residual);
  if (!dx.is_same(grad_input)) grad_input.copy_(dx);
  return {grad_input, dw.to(scale.scalar_type())};
}

}  // namespace coreai_torch
