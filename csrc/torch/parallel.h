// Who runs the CPU kernels' threads: libtorch.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/stable/c/shim.h>

#include "coreai_torch/parallel.h"

namespace coreai_torch {

// In libtorch's own thread pool, through its C interface: at::parallel_for is a header-only
// template that turns serial without a word where this file is not compiled with OpenMP.
inline void torch_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  TORCH_CHECK(
      torch_parallel_for(begin, end, grain, body, context) == 0,
      "coreai_torch: torch_parallel_for failed");
}

}  // namespace coreai_torch
