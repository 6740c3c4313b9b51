// rms_norm on CUDA.
#include "coreai_torch/rms_norm_cuda.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "torch/rms_norm.h"

// libtorch_cuda's C interface. Weak, so that the module also loads, and its build can be tested,
// beside a torch without CUDA.
extern "C" __attribute__((weak)) int32_t
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace coreai_torch {
namespace {

cudaStream_t current_stream(const at::Tensor& input) {
  void* stream = nullptr;
  TORCH_CHECK(
      aoti_torch_get_current_cuda_stream &&
          aoti_torch_get_current_cuda_stream(input.get_device(), &stream) == 0,
      "rms_norm: no CUDA stream; coreai_torch was built for a torch without CUDA, build it again "
      "with: pip install --no-build-isolation --force-reinstall --no-deps .");
  return static_cast<cudaStream_t>(stream);
}

// Names what failed: the call, the card, and what to do where that is known.
void check_cuda(cudaError_t error, const char* direction, const at::Tensor& input) {
  if (error == cudaSuccess) return;
  cudaDeviceProp card = {};
  cudaGetDeviceProperties(&card, input.get_device());
  const char* remedy = "";
  if (error == cudaErrorNoKernelImageForDevice) {
    remedy =
        "; this build has no code for that card: python -m coreai_torch lists what it has, and "
        "TORCH_CUDA_ARCH_LIST chooses what to build";
  }
  TORCH_CHECK(
      false, "rms_norm: ", direction, " of input of shape ", input.sizes(), " on ", input.device(),
      " (", card.name, ", compute capability ", card.major, ".", card.minor,
      ") failed: ", cudaGetErrorString(error), remedy);
}

constexpr RmsNormDevice kCuda = {
    kMaxRowDimsCuda,
    [](const RmsNormForward& args, const at::Tensor& input) {
      check_cuda(
          rms_norm_forward_cuda(args, input.get_device(), current_stream(input)), "forward", input);
    },
    [](const RmsNormBackward& args, const at::Tensor& input) {
      return rms_norm_backward_workspace_cuda(args, input.get_device());
    },
    [](const RmsNormBackward& args, const at::Tensor& input) {
      check_cuda(
          rms_norm_backward_cuda(args, input.get_device(), current_stream(input)), "backward",
          input);
    },
};

at::Tensor fused_rms_norm_cuda(const at::Tensor& input, const at::Tensor& scale, double eps) {
  const c10::DeviceGuard guard(input.device());
  return fused_rms_norm(input, scale, eps, kCuda);
}

std::tuple<at::Tensor, at::Tensor> fused_rms_norm_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, double eps,
    std::array<bool, 2> output_mask) {
  const c10::DeviceGuard guard(input.device());
  return fused_rms_norm_backward(grad_output, input, scale, eps, output_mask, kCuda);
}

}  // namespace

TORCH_LIBRARY_IMPL(coreai_torch, CUDA, m) {
  m.impl("fused_rms_norm", fused_rms_norm_cuda);
  m.impl("fused_rms_norm_backward", fused_rms_norm_backward_cuda);
}

}  // namespace coreai_torch
