// The current stream of a tensor's card, and what to say where a call of the kernels failed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

// libtorch_cuda's C interface. Weak, so that the module also loads, and its build can be tested,
// beside a torch without CUDA.
extern "C" __attribute__((weak)) int32_t
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace coreai_torch {

inline cudaStream_t current_stream(const at::Tensor& input) {
  void* stream = nullptr;
  TORCH_CHECK(
      aoti_torch_get_current_cuda_stream &&
          aoti_torch_get_current_cuda_stream(input.get_device(), &stream) == 0,
      "rms_norm: no CUDA stream; coreai_torch was built for a torch without CUDA, build it again "
      "with: pip install --no-build-isolation --force-reinstall --no-deps .");
  return static_cast<cudaStream_t>(stream);
}

// Names what failed: the call, the card, and what to do where that is known.
inline void check_cuda(cudaError_t error, const char* what, const at::Tensor& input) {
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
      false, what, " of input of shape ", input.sizes(), " on ", input.device(), " (", card.name,
      ", compute capability ", card.major, ".", card.minor, ") failed: ", cudaGetErrorString(error),
      remedy);
}

}  // namespace coreai_torch
