// Spreads the work of a kernel over threads, and what else the ops ask before they call one.
#pragma once

#include <initializer_list>

#include "coreai_torch/rms_norm.h"

namespace coreai_torch {
namespace {

constexpr int64_t kSizes[] = {4, 2, 2, 8};  // in the order of DType

constexpr int64_t kGrainElements = 32768;  // at::internal::GRAIN_SIZE: worth waking a thread for

// Are the rows of every operand one behind the other, so that the next row's place is known?
inline bool is_contiguous(
    const RmsNormShape& shape, std::initializer_list<const int64_t*> strides) {
  if (shape.row_ndim != 1) return false;
  for (const int64_t* stride : strides) {
    if (stride[0] != shape.dim) return false;
  }
  return true;
}

template <class Kernel, class Args>
void run(
    Kernel kernel, const Args& args, bool stream, int64_t count, int64_t elements_each,
    ParallelFor parallel_for) {
  struct Context {
    Kernel kernel;
    const Args* args;
    bool stream;
  } context{kernel, &args, stream};
  const int64_t grain = elements_each < kGrainElements ? kGrainElements / elements_each : 1;
  parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* opaque) {
        const Context* context = static_cast<const Context*>(opaque);
        context->kernel(*context->args, context->stream, begin, end);
      },
      &context);
}

}  // namespace
}  // namespace coreai_torch
