// Spreads the work of a kernel over threads, and what else the ops ask before they call one.
#pragma once

#include <initializer_list>

#include "coreai_torch/cpu_level.h"
#include "coreai_torch/rms_norm.h"
#include "cpu/output_memory.h"
#include "cpu/rms_norm_plan.h"

namespace coreai_torch {
namespace {

constexpr int64_t kSizes[] = {4, 2, 2, 8};  // in the order of DType

constexpr int64_t kGrainElements = 32768;  // at::internal::GRAIN_SIZE: worth waking a thread for

// Are the rows of every operand one behind the other, so that the next row's place is known?
inline bool is_contiguous(
    const RmsNormShape& shape, std::initializer_list<const int64_t*> strides) {
  for (const int64_t* of_operand : strides) {
    if (!has_adjacent_rows(shape, of_operand)) return false;
  }
  return true;
}

// grad_input of rms_norm and of add_rms_norm, one of so many operands of its size.
inline Outputs backward_outputs(
    const RmsNormBackward& args, const BackwardPlan& plan, int operands,
    bool inputs_are_contiguous) {
  const RmsNormShape& shape = args.shape;
  if (args.grad_input == nullptr || !is_contiguous(shape, {args.grad_input_strides})) return {};
  const int64_t row_bytes = shape.dim * kSizes[int(shape.input_dtype)];
  const int64_t bytes = shape.rows * row_bytes;
  const int64_t task_bytes = shape.groups == 1 ? plan.chunk_rows * row_bytes : 0;
  return {{{args.grad_input, bytes, task_bytes}}, operands * bytes, inputs_are_contiguous};
}

// An op's tables of kernels: those of the levels, lowest first, and that of float64.
template <class Table>
class Tables {
 public:
  template <int kCount>
  constexpr Tables(const Table* const (&levels)[kCount], const Table& float64)
      : levels_(levels), count_(kCount), float64_(float64) {}

  auto forward(const RmsNormShape& shape) const {
    return find(shape, [&](const Table& table) {
      return table.forward[int(shape.input_dtype)][int(shape.scale_dtype)];
    });
  }
  auto backward(const RmsNormShape& shape) const {
    return find(shape, [&](const Table& table) {
      return table.backward[int(shape.input_dtype)][int(shape.scale_dtype)];
    });
  }
  auto reduce(const RmsNormShape& shape) const {
    return find(shape, [&](const Table& table) { return table.reduce[int(shape.scale_dtype)]; });
  }

 private:
  // Of the level in use or, where its table has none, of the next one below that has.
  template <class KernelOf>
  auto find(const RmsNormShape& shape, const KernelOf& kernel_of) const {
    if (shape.input_dtype == DType::kFloat64) return kernel_of(float64_);
    const int current = cpu_level();
    auto kernel = kernel_of(*levels_[0]);
    for (int level = 1; level < count_ && level <= current; ++level) {
      if (auto of_level = kernel_of(*levels_[level])) kernel = of_level;
    }
    return kernel;
  }

  const Table* const* levels_;
  int count_;
  const Table& float64_;
};

template <class Kernel, class Args>
void run(
    Kernel kernel, const Args& args, const Outputs& outputs, int64_t count, int64_t elements_each,
    ParallelFor parallel_for) {
  struct Context {
    Kernel kernel;
    const Args* args;
    const Outputs* outputs;
  } context{kernel, &args, &outputs};
  const int64_t grain = elements_each < kGrainElements ? kGrainElements / elements_each : 1;
  parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* opaque) {
        const auto& [kernel, args, outputs] = *static_cast<const Context*>(opaque);
        const int64_t requested = outputs->units_to_request();
        if (requested == 0) {
          kernel(*args, outputs->streamed(), begin, end);
          return;
        }
        for (int64_t unit = begin; unit < end; unit += requested) {
          const int64_t next = end - unit < requested ? end : unit + requested;
          outputs->request(unit, next);
          kernel(*args, Streamed::kNone, unit, next);
        }
      },
      &context);
}

}  // namespace
}  // namespace coreai_torch
