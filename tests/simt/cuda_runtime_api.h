// The few types of the CUDA runtime that csrc/include/coreai_torch/rms_norm_cuda.h names, so that
// the emulator needs no CUDA toolkit.
#pragma once

typedef struct CUstream_st* cudaStream_t;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
