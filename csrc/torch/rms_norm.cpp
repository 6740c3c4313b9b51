#include "torch/rms_norm.h"

#include <algorithm>

#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Formatting.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace coreai_torch {
namespace {

bool is_floating(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

void check_floating(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      is_floating(tensor.scalar_type()), op, ": expected ", name,
      " of dtype float64, float32, float16 or bfloat16, got ", name_of(tensor.scalar_type()));
}

DType to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat64;
  }
}

// Statistics are taken in float64 for float64 input and in float32 for every other.
at::ScalarType statistics_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

std::string name_of(at::ScalarType type) {
  return "torch." + std::string(c10::getDtypeNames(type).first);
}

void check_tensor(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), op, ": expected ", name, " to be a tensor, got None");
  TORCH_CHECK(
      !tensor.is_nested(), op, ": expected ", name,
      " to be a dense tensor, got a nested tensor; convert it with .to_padded_tensor()");
}

void check_tensors(
    const char* op, std::initializer_list<std::pair<const char*, const at::Tensor&>> tensors) {
  for (const auto& [name, tensor] : tensors) check_tensor(op, name, tensor);
}

void check_storage(const char* op, const char* name, const at::Tensor& tensor) {
  const size_t needed = at::detail::computeStorageNbytes(
      tensor.sizes(), tensor.strides(), tensor.element_size(), tensor.storage_offset());
  const size_t held = tensor.storage().nbytes();
  TORCH_CHECK(
      held >= needed, op, ": expected ", name, " with ", needed, " bytes of storage for its shape ",
      tensor.sizes(), ", got ", held, " bytes; the storage has been freed or resized");
}

void check_dense(const char* op, const char* name, const at::Tensor& tensor) {
  check_tensor(op, name, tensor);
  TORCH_CHECK(
      tensor.layout() == at::kStrided, op, ": expected ", name,
      " to be a dense tensor, got layout ", tensor.layout(), "; convert it with .to_dense()");
}

void check_device(
    const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& input,
    const char* of) {
  TORCH_CHECK(
      tensor.device() == input.device(), op, ": expected ", name, " on the device of ", of, ", ",
      input.device(), ", got ", tensor.device(), "; move one of them with .to()");
}

void check_rms_norm(const at::Tensor& input, const at::Tensor& scale, double eps, const char* op) {
  check_dense(op, "input", input);
  check_dense(op, "scale", scale);
  check_floating(op, "input", input);
  check_floating(op, "scale", scale);
  TORCH_CHECK(
      input.dim() >= 1, op, ": expected input with at least one dimension, got shape ",
      input.sizes());
  TORCH_CHECK(
      scale.dim() >= 1 && scale.size(-1) == input.size(-1), op,
      ": expected scale with last dimension ", input.size(-1),
      " (the last dimension of input), got shape ", scale.sizes());
  bool broadcasts = scale.dim() <= input.dim();
  for (int64_t d = 1; broadcasts && d <= scale.dim(); ++d) {
    broadcasts = scale.size(-d) == 1 || scale.size(-d) == input.size(-d);
  }
  TORCH_CHECK(
      broadcasts, op, ": expected scale that broadcasts to the shape of input, ", input.sizes(),
      ", got shape ", scale.sizes());
  check_device(op, "scale", scale, input);
  TORCH_CHECK_VALUE(eps >= 0, op, ": expected eps >= 0, got ", eps);
}

void check_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    const char* op) {
  check_rms_norm(input, scale, eps, op);
  check_dense(op, "grad_output", grad_output);
  TORCH_CHECK(
      grad_output.sizes() == input.sizes(), op,
      ": expected grad_output with the shape of the output, ", input.sizes(), ", got shape ",
      grad_output.sizes());
  const at::ScalarType output_type = rms_norm_output_type(input.scalar_type(), scale.scalar_type());
  TORCH_CHECK(
      grad_output.scalar_type() == output_type, op,
      ": expected grad_output of the output's dtype, ", name_of(output_type), ", got ",
      name_of(grad_output.scalar_type()));
  check_device(op, "grad_output", grad_output, input);
}

at::ScalarType rms_norm_output_type(at::ScalarType input, at::ScalarType scale) {
  const bool keeps_input = scale == input || scale == at::kFloat || input == at::kDouble;
  return keeps_input ? input : c10::promoteTypes(input, scale);
}

at::Tensor composite_rms_norm(const at::Tensor& input, const at::Tensor& scale, double eps) {
  check_rms_norm(input, scale, eps);
  const at::Tensor x = input.to(statistics_type(input));
  const at::Tensor normalized = x * x.square().mean(-1, /*keepdim=*/true).add(eps).rsqrt();
  if (scale.scalar_type() == at::kFloat && input.scalar_type() != at::kFloat) {
    return (normalized * scale).to(input.scalar_type());
  }
  return normalized.to(input.scalar_type()) * scale;
}

std::tuple<at::Tensor, at::Tensor> composite_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  check_rms_norm_backward(grad_output, input, scale, eps);
  return composite_backward(grad_output, {}, input, scale, eps, output_mask);
}

std::tuple<at::Tensor, at::Tensor> composite_backward(
    const at::Tensor& grad_output, const at::Tensor& grad_new_residual, const at::Tensor& input,
    const at::Tensor& scale, double eps, std::array<bool, 2> output_mask) {
  const at::ScalarType type = c10::promoteTypes(statistics_type(input), scale.scalar_type());
  const at::Tensor x = input.to(type);
  const at::Tensor rstd = x.square().mean(-1, /*keepdim=*/true).add(eps).rsqrt();
  const at::Tensor normalized = x * rstd;
  const at::Tensor grad = grad_output.to(type);
  at::Tensor grad_input = at::empty({0}, input.options());
  at::Tensor grad_scale = at::empty({0}, scale.options());
  if (output_mask[0]) {
    const at::Tensor scaled = grad * scale.to(type);
    const at::Tensor mean_dot = (scaled * normalized).mean(-1, /*keepdim=*/true);
    grad_input = (scaled - normalized * mean_dot) * rstd;
    if (grad_new_residual.defined()) grad_input = grad_input + grad_new_residual.to(type);
    grad_input = with_layout_of(input, grad_input.to(input.scalar_type()));
  }
  if (output_mask[1]) {
    grad_scale = (grad * normalized).sum_to_size(scale.sizes()).to(scale.scalar_type());
    grad_scale = grad_scale.contiguous();
  }
  return {grad_input, grad_scale};
}

at::Tensor with_layout_of(const at::Tensor& input, const at::Tensor& result) {
  at::Tensor layout = at::empty_like(input);
  return result.strides() == layout.strides() ? result : layout.copy_(result);
}

// With r = rstd, n = x r, s = g w, and mean(a, b) the mean of a b over a row:
//   grad_input = r (s - n mean(s, n))     u = grad_grad_input, its cotangent
//   grad_scale = sum of g n               v = grad_grad_scale
// The derivatives of n and r along x make what follows.
std::tuple<at::Tensor, at::Tensor, at::Tensor> composite_rms_norm_double_backward(
    const at::Tensor& grad_grad_input, const at::Tensor& grad_grad_scale,
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps) {
  const at::ScalarType type = c10::promoteTypes(statistics_type(input), scale.scalar_type());
  const at::Tensor x = input.to(type), g = grad_output.to(type), w = scale.to(type);
  const auto mean = [](const at::Tensor& a, const at::Tensor& b) {
    return (a * b).mean(-1, /*keepdim=*/true);
  };
  const at::Tensor r = mean(x, x).add(eps).rsqrt();
  const at::Tensor n = x * r;
  at::Tensor grad_g, grad_x, grad_w;
  if (grad_grad_input.defined()) {
    const at::Tensor u = grad_grad_input.to(type), s = g * w;
    const at::Tensor un = mean(u, n), sn = mean(s, n);
    const at::Tensor grad_s = r * (u - n * un);
    grad_g = w * grad_s;
    grad_w = g * grad_s;
    grad_x = -r.square() * (n * (mean(u, s) - 3 * un * sn) + un * s + sn * u);
  }
  if (grad_grad_scale.defined()) {
    const at::Tensor v = grad_grad_scale.to(type), q = g * v;
    const at::Tensor along_g = v * n, along_x = r * (q - n * mean(q, n));
    grad_g = grad_g.defined() ? grad_g + along_g : along_g;
    grad_x = grad_x.defined() ? grad_x + along_x : along_x;
  }
  if (grad_w.defined()) grad_w = grad_w.sum_to_size(scale.sizes()).to(scale.scalar_type());
  if (grad_g.defined()) grad_g = grad_g.to(grad_output.scalar_type());
  if (grad_x.defined()) grad_x = grad_x.to(input.scalar_type());
  return {grad_g, grad_x, grad_w};
}

bool describe_rms_norm(
    const at::Tensor& input, const at::Tensor& scale, double eps, RmsNormShape* shape) {
  // A float64 scale beside a lower input takes its statistics in float32 and its products in
  // float64, which is no kernel's business.
  if (scale.scalar_type() == at::kDouble && input.scalar_type() != at::kDouble) return false;
  shape->input_dtype = to_dtype(input.scalar_type());
  shape->scale_dtype = to_dtype(scale.scalar_type());
  shape->dim = input.size(-1);
  shape->eps = eps;
  shape->rows = 1;
  for (const int64_t size : input.sizes().slice(0, input.dim() - 1)) shape->rows *= size;
  shape->groups = 1;
  shape->inner = 1;
  // From the last row dimension to the first: those where the scale is expanded make `inner`, then
  // those that it spans make `groups`, and before them it must be expanded again.
  bool closed = false;
  for (int64_t d = 2; d <= input.dim(); ++d) {
    const int64_t input_size = input.size(-d);
    const int64_t scale_size = d <= scale.dim() ? scale.size(-d) : 1;
    if (input_size == 1) continue;
    if (scale_size == 1) {
      if (shape->groups == 1) {
        shape->inner *= input_size;
      } else {
        closed = true;
      }
    } else {
      if (closed) return false;
      shape->groups *= scale_size;
    }
  }
  return true;
}

void describe_rows(
    const at::Tensor& input, std::initializer_list<RowOperand> operands, RmsNormShape* shape) {
  const at::IntArrayRef sizes = input.sizes(), strides = input.strides();
  c10::SmallVector<size_t, 8> dims;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) {
    if (sizes[d] != 1) dims.push_back(d);
  }
  const auto is_outer = [&](size_t a, size_t b) { return strides[a] > strides[b]; };
  if (shape->groups == 1 && !std::is_sorted(dims.begin(), dims.end(), is_outer) &&
      input.is_non_overlapping_and_dense()) {
    std::sort(dims.begin(), dims.end(), is_outer);
  }
  int ndim = 0;
  for (const size_t d : dims) {
    bool joins = ndim > 0;  // can this dimension and the one before it be walked as one?
    for (const RowOperand& operand : operands) {
      joins = joins && operand.row_strides[ndim - 1] == operand.strides[d] * sizes[d];
    }
    if (joins) {
      --ndim;
      shape->row_sizes[ndim] *= sizes[d];
    } else {
      shape->row_sizes[ndim] = sizes[d];
    }
    for (const RowOperand& operand : operands) operand.row_strides[ndim] = operand.strides[d];
    ++ndim;
  }
  if (ndim == 0) {
    shape->row_sizes[0] = 1;
    for (const RowOperand& operand : operands) operand.row_strides[0] = 0;
    ndim = 1;
  }
  shape->row_ndim = ndim;
}

bool has_adjacent_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1;
}

at::Tensor with_adjacent_rows(const at::Tensor& tensor) {
  if (has_adjacent_rows(tensor)) return tensor;
  at::Tensor base = tensor;
  for (int64_t d = 0; d < tensor.dim() - 1; ++d) {
    if (tensor.stride(d) == 0 && tensor.size(d) > 1) base = base.narrow(d, 0, 1);
  }
  return base.contiguous().expand(tensor.sizes());
}

at::Tensor written_for(const at::Tensor& result) {
  return has_adjacent_rows(result) ? result : at::empty(result.sizes(), result.options());
}

at::Tensor fused_rms_norm(
    const at::Tensor& input, const at::Tensor& scale, double eps, const RmsNormDevice& device) {
  check_rms_norm(input, scale, eps);
  check_storage("rms_norm", "input", input);
  check_storage("rms_norm", "scale", scale);
  const at::TensorOptions output_options =
      input.options().dtype(rms_norm_output_type(input.scalar_type(), scale.scalar_type()));
  // Nothing to compute, and maybe more dimensions than can be described.
  if (input.numel() == 0) return at::empty_like(input, output_options);
  RmsNormForward args;
  if (!describe_rms_norm(input, scale, eps, &args.shape)) {
    return composite_rms_norm(input, scale, eps);
  }
  const at::Tensor output = at::empty_like(input, output_options);
  at::Tensor x = with_adjacent_rows(input);
  at::Tensor y = written_for(output);
  const auto describe = [&] {
    describe_rows(
        x, {{x.strides(), args.input_strides}, {y.strides(), args.output_strides}}, &args.shape);
  };
  describe();
  if (args.shape.row_ndim > device.max_row_dims) {
    x = x.contiguous();
    if (!y.is_contiguous()) y = at::empty(output.sizes(), output.options());
    describe();
  }
  const at::Tensor w = scale.contiguous();
  args.input = x.const_data_ptr();
  args.scale = w.const_data_ptr();
  args.output = y.mutable_data_ptr();
  device.forward(args, input);
  if (!y.is_same(output)) output.copy_(y);
  return output;
}

std::tuple<at::Tensor, at::Tensor> fused_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask, const RmsNormDevice& device) {
  check_rms_norm_backward(grad_output, input, scale, eps);
  check_storage("rms_norm", "grad_output", grad_output);
  check_storage("rms_norm", "input", input);
  check_storage("rms_norm", "scale", scale);
  RmsNormBackward args;
  const bool empty = input.numel() == 0;
  if (!empty && !describe_rms_norm(input, scale, eps, &args.shape)) {
    return composite_rms_norm_backward(grad_output, input, scale, eps, output_mask);
  }
  const at::Tensor grad_input =
      output_mask[0] ? at::empty_like(input) : at::empty({0}, input.options());
  constexpr int64_t kNone[] = {0};
  const at::IntArrayRef grad_scale_sizes = output_mask[1] ? scale.sizes() : at::IntArrayRef(kNone);
  if (empty) return {grad_input, at::zeros(grad_scale_sizes, scale.options())};
  const at::Tensor grad_scale = at::empty(grad_scale_sizes, scale.options());
  if (!output_mask[0] && !output_mask[1]) return {grad_input, grad_scale};

  at::Tensor dy = with_adjacent_rows(grad_output);
  at::Tensor x = with_adjacent_rows(input);
  at::Tensor dx;
  if (output_mask[0]) dx = written_for(grad_input);
  const auto describe = [&] {
    describe_rows(
        x,
        {{dy.strides(), args.grad_output_strides},
         {x.strides(), args.input_strides},
         {output_mask[0] ? dx.strides() : x.strides(), args.grad_input_strides}},
        &args.shape);
  };
  describe();
  if (args.shape.row_ndim > device.max_row_dims) {
    dy = dy.contiguous();
    x = x.contiguous();
    if (output_mask[0] && !dx.is_contiguous()) dx = at::empty(input.sizes(), input.options());
    describe();
  }
  const at::Tensor w = scale.contiguous();
  args.grad_output = dy.const_data_ptr();
  args.input = x.const_data_ptr();
  args.scale = w.const_data_ptr();
  args.grad_input = output_mask[0] ? dx.mutable_data_ptr() : nullptr;
  args.grad_scale = output_mask[1] ? grad_scale.mutable_data_ptr() : nullptr;
  at::Tensor workspace;
  if (const int64_t bytes = device.backward_workspace(args, input); bytes > 0) {
    workspace = at::empty({bytes}, input.options().dtype(at::kByte));
    args.workspace = workspace.mutable_data_ptr();
  } else {
    args.workspace = nullptr;
  }
  device.backward(args, input);
  if (output_mask[0] && !dx.is_same(grad_input)) grad_input.copy_(dx);
  return {grad_input, grad_scale};
}

}  // namespace coreai_torch
