// The RMSNorm kernels, with and without the residual add, written once for every SIMD level and for
// double precision (simd.h or simd/float64.h comes first). Everything here has internal linkage.
#pragma once

#include "coreai_torch/add_rms_norm.h"
#include "cpu/rms_norm_kernels.h"
#include "cpu/rms_norm_plan.h"
#include "cpu/row_sum.h"

namespace coreai_torch {
namespace {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <bool kCondition, class A, class B>
struct Conditional {
  using type = A;
};
template <class A, class B>
struct Conditional<false, A, B> {
  using type = B;
};

// The dtype rule of coreai_torch/rms_norm.h. `float` stands for every type that is not 16 bits
// wide.
template <class Input, class Scale>
struct DTypeRule {
  static constexpr bool kNarrowInput = sizeof(Input) == 2;
  static constexpr bool kRoundsNormalized = kNarrowInput && !kSame<Scale, float>;
  static constexpr bool kOutputIsInput =
      !kNarrowInput || kSame<Scale, float> || kSame<Scale, Input>;
  using Output = typename Conditional<kOutputIsInput, Input, float>::type;
};

// Walks through rows and keeps the offset, in elements, of the current row in each of N operands.
template <int N>
class RowCursor {
 public:
  RowCursor(const RmsNormShape& shape, const int64_t* const (&strides)[N]) : shape_(shape) {
    for (int n = 0; n < N; ++n) strides_[n] = strides[n];
  }

  int64_t offset(int n) const { return offset_[n]; }

  void seek(int64_t row) {
    for (int n = 0; n < N; ++n) offset_[n] = 0;
    for (int d = shape_.row_ndim - 1; d >= 0; --d) {
      const int64_t rest = d > 0 ? row / shape_.row_sizes[d] : 0;
      index_[d] = row - rest * shape_.row_sizes[d];
      for (int n = 0; n < N; ++n) offset_[n] += index_[d] * strides_[n][d];
      row = rest;
    }
  }

  void next() {
    for (int d = shape_.row_ndim - 1; d >= 0; --d) {
      for (int n = 0; n < N; ++n) offset_[n] += strides_[n][d];
      if (++index_[d] < shape_.row_sizes[d] || d == 0) return;
      for (int n = 0; n < N; ++n) offset_[n] -= index_[d] * strides_[n][d];
      index_[d] = 0;
    }
  }

 private:
  const RmsNormShape& shape_;
  const int64_t* strides_[N];
  int64_t index_[kMaxDims];
  int64_t offset_[N];
};

template <class T>
inline Pair rounded_to(Pair v) {
  if constexpr (sizeof(T) < sizeof(Real)) {
    return round_to<T>(v);
  } else {
    return v;
  }
}

inline RowCursor<2> cursor_of(const RmsNormForward& args) {
  return {args.shape, {args.input_strides, args.output_strides}};
}
inline RowCursor<4> cursor_of(const AddRmsNormForward& args) {
  return {
      args.shape,
      {args.input_strides, args.output_strides, args.residual_strides, args.new_residual_strides}};
}
inline RowCursor<3> cursor_of(const RmsNormBackward& args) {
  return {args.shape, {args.grad_output_strides, args.input_strides, args.grad_input_strides}};
}
inline RowCursor<4> cursor_of(const AddRmsNormBackward& args) {
  return {
      args.shape,
      {args.grad_output_strides, args.input_strides, args.grad_input_strides,
       args.grad_new_residual_strides}};
}

inline Real rstd_of(Real sum_of_squares, const RmsNormShape& shape) {
  const Real mean = sum_of_squares / Real(shape.dim) + Real(shape.eps);
  if constexpr (sizeof(Real) == sizeof(float)) {
    return 1 / __builtin_sqrtf(mean);
  } else {
    return 1 / __builtin_sqrt(mean);
  }
}

// Asks for the cache lines of a Pair of elements.
template <class T>
inline void prefetch(const T* p) {
  for (int byte = 0; byte < Pair::kLanes * int(sizeof(T)); byte += 64) {
    __builtin_prefetch((const char*)p + byte);
  }
}

// What is normalized: the input or, after the residual add, the sum. A sum is written when it is
// taken, for row_sums(), and read again from the cache. Written past the caches it would not be
// there, so where rows are streamed it is taken a second time, and written then.
template <class Input>
struct InputRows {
  const Input* input[kForwardRows];

  template <class Part>
  Pair first(Part part, int r, int64_t i) const {
    return part.load_from(input[r] + i);
  }
  template <class Part>
  Pair again(Part part, int r, int64_t i) const {
    return part.load_from(input[r] + i);
  }
  void prefetch_at(int r, int64_t i) const { prefetch(input[r] + i); }
};

template <bool kStream, class Input>
struct SummedRows {
  const Input* input[kForwardRows];
  const Input* residual[kForwardRows];
  Input* new_residual[kForwardRows];

  template <class Part>
  Pair sum(Part part, int r, int64_t i) const {
    return part.load_from(input[r] + i) + part.load_from(residual[r] + i);
  }
  template <class Part>
  Pair first(Part part, int r, int64_t i) const {
    if constexpr (kStream) {
      return rounded_to<Input>(sum(part, r, i));
    } else {
      part.store_to(new_residual[r] + i, sum(part, r, i));
      return again(part, r, i);
    }
  }
  template <class Part>
  Pair again(Part part, int r, int64_t i) const {
    if constexpr (kStream) {
      const Pair rounded = rounded_to<Input>(sum(part, r, i));
      part.store_to(new_residual[r] + i, rounded);
      return rounded;
    } else {
      return part.load_from(new_residual[r] + i);
    }
  }
  void prefetch_at(int r, int64_t i) const {
    prefetch(input[r] + i);
    prefetch(residual[r] + i);
  }
};

// Normalises kRows rows that share a scale row.
template <int kRows, bool kStream, class Input, class Scale, class Rows, class Output>
inline void forward_rows(
    const RmsNormShape& shape, const Rows& rows, const Scale* scale, Output* const* output) {
  const int64_t dim = shape.dim;
  Real sums[kRows];
  row_sums<kRows>(
      dim,
      [&](auto part, int64_t i, Pair* terms) {
        for (int r = 0; r < kRows; ++r) {
          const Pair x = rows.first(part, r, i);
          terms[r] = x * x;
        }
      },
      sums);
  Pair rstd[kRows];
  for (int r = 0; r < kRows; ++r) rstd[r] = splat(rstd_of(sums[r], shape));
  using Part = typename Conditional<kStream, Streamed, Whole>::type;
  for_each_pair<Part>(0, dim, [&](auto part, int64_t i) {
    const Pair w = part.load_from(scale + i);
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kStream) rows.prefetch_at(r, kRows * dim + i);  // the next rows
      Pair normalized = rows.again(part, r, i) * rstd[r];
      if constexpr (DTypeRule<Input, Scale>::kRoundsNormalized) {
        normalized = round_to<Input>(normalized);
      }
      part.store_to(output[r] + i, normalized * w);
    }
  });
}

template <bool kStream, class Input, class Scale, class Args>
void forward_range(const Args& args, int64_t begin, int64_t end) {
  constexpr bool kAdds = kSame<Args, AddRmsNormForward>;
  using Output = typename DTypeRule<Input, Scale>::Output;
  const RmsNormShape& shape = args.shape;
  auto cursor = cursor_of(args);
  cursor.seek(begin);
  typename Conditional<kAdds, SummedRows<kStream, Input>, InputRows<Input>>::type rows;
  Output* output[kForwardRows];
  const auto take_rows = [&](int count) {
    for (int r = 0; r < count; ++r, cursor.next()) {
      rows.input[r] = (const Input*)args.input + cursor.offset(0);
      output[r] = (Output*)args.output + cursor.offset(1);
      if constexpr (kAdds) {
        rows.residual[r] = (const Input*)args.residual + cursor.offset(2);
        rows.new_residual[r] = (Input*)args.new_residual + cursor.offset(3);
      }
    }
  };
  int64_t row = begin;
  while (row < end) {
    const int64_t run =
        row / shape.inner;  // rows [run * inner, (run + 1) * inner) share a scale row
    const Scale* scale = (const Scale*)args.scale + run % shape.groups * shape.dim;
    const int64_t run_end = (run + 1) * shape.inner < end ? (run + 1) * shape.inner : end;
    for (; row + kForwardRows <= run_end; row += kForwardRows) {
      take_rows(kForwardRows);
      forward_rows<kForwardRows, kStream, Input>(shape, rows, scale, output);
    }
    for (; row < run_end; ++row) {
      take_rows(1);
      forward_rows<1, kStream, Input>(shape, rows, scale, output);
    }
  }
}

template <class Input, class Scale, class Args>
void forward(const Args& args, bool stream, int64_t begin, int64_t end) {
  if (stream) {
    forward_range<true, Input, Scale>(args, begin, end);
    stream_end();
  } else {
    forward_range<false, Input, Scale>(args, begin, end);
  }
}

// Up to kBlockRows rows of backward that share a scale row.
template <class Input, class Output>
struct BackwardBlock {
  const Output* grad_output[kBlockRows];
  const Input* input[kBlockRows];
  Input* grad_input[kBlockRows];
  Real rstd[kBlockRows];
  Real mean_dot[kBlockRows];                   // mean(grad_output * scale * normalized)
  const Input* grad_new_residual[kBlockRows];  // of the residual add
};

// Fills rstd and mean_dot of kRows rows from `first` on.
template <int kRows, bool kGradInput, class Input, class Scale, class Output>
inline void backward_sums(
    const RmsNormShape& shape, const Scale* scale, int first, BackwardBlock<Input, Output>& block) {
  constexpr int kSums = kGradInput ? 2 * kRows : kRows;
  Real sums[kSums];
  row_sums<kSums>(
      shape.dim,
      [&](auto part, int64_t i, Pair* terms) {
        Pair w;
        if constexpr (kGradInput) w = part.load_from(scale + i);
        for (int r = 0; r < kRows; ++r) {
          const Pair x = part.load_from(block.input[first + r] + i);
          terms[r] = x * x;
          if constexpr (kGradInput) {
            terms[kRows + r] = part.load_from(block.grad_output[first + r] + i) * w * x;
          }
        }
      },
      sums);
  for (int r = 0; r < kRows; ++r) {
    block.rstd[first + r] = rstd_of(sums[r], shape);
    if constexpr (kGradInput) {
      block.mean_dot[first + r] = sums[kRows + r] * block.rstd[first + r] / Real(shape.dim);
    }
  }
}

// kRows is kBlockRows, or 0 for `rows` rows. With kAdds, grad_new_residual is added to grad_input.
template <
    int kRows, bool kAdds, bool kGradInput, bool kGradScale, bool kStream, class Input, class Scale,
    class Output>
inline void backward_block(
    const RmsNormShape& shape, const Scale* scale, int rows, BackwardBlock<Input, Output>& block,
    Real* grad_scale, bool first_of_chunk) {
  if constexpr (kRows != 0) rows = kRows;
  int summed = 0;
  for (; summed + kBackwardSumRows <= rows; summed += kBackwardSumRows) {
    backward_sums<kBackwardSumRows, kGradInput>(shape, scale, summed, block);
  }
  for (; summed < rows; ++summed) backward_sums<1, kGradInput>(shape, scale, summed, block);

  for_each_pair(0, shape.dim, [&](auto part, int64_t i) {
    Pair w, sum;
    if constexpr (kGradInput) w = part.load_from(scale + i);
    for (int r = 0; r < rows; ++r) {
      const Pair rstd = splat(block.rstd[r]);
      const Pair normalized = part.load_from(block.input[r] + i) * rstd;
      const Pair grad = part.load_from(block.grad_output[r] + i);
      if constexpr (kGradInput) {
        Pair grad_input = (grad * w - normalized * splat(block.mean_dot[r])) * rstd;
        if constexpr (kAdds) {
          grad_input = grad_input + part.load_from(block.grad_new_residual[r] + i);
        }
        if constexpr (kStream && kSame<decltype(part), Whole>) {
          if constexpr (kAdds) prefetch(block.grad_new_residual[r] + kBlockRows * shape.dim + i);
          prefetch(block.input[r] + kBlockRows * shape.dim + i);  // the next block
          prefetch(block.grad_output[r] + kBlockRows * shape.dim + i);
          stream(block.grad_input[r] + i, grad_input);
        } else {
          part.store_to(block.grad_input[r] + i, grad_input);
        }
      }
      if constexpr (kGradScale) {
        const Pair term = grad * normalized;
        sum = r == 0 ? term : sum + term;
      }
    }
    if constexpr (kGradScale) {
      if (!first_of_chunk) sum = part.load_from(grad_scale + i) + sum;
      part.store_to(grad_scale + i, sum);
    }
  });
}

template <bool kGradInput, bool kGradScale, bool kStream, class Input, class Scale, class Args>
void backward_tasks(const Args& args, int64_t begin, int64_t end) {
  constexpr bool kAdds = kSame<Args, AddRmsNormBackward>;
  using Output = typename DTypeRule<Input, Scale>::Output;
  const RmsNormShape& shape = args.shape;
  const BackwardPlan plan = backward_plan(shape);
  auto cursor = cursor_of(args);
  BackwardBlock<Input, Output> block;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / plan.chunks_per_group;
    const int64_t chunk_begin = task % plan.chunks_per_group * plan.chunk_rows;
    const int64_t left = plan.rows_per_group - chunk_begin;
    const int64_t chunk_rows = left < plan.chunk_rows ? left : plan.chunk_rows;
    const Scale* scale = (const Scale*)args.scale + group * shape.dim;
    Real* grad_scale = kGradScale ? (Real*)args.workspace + task * shape.dim : nullptr;

    int64_t run_left = 0;  // rows before the group goes on elsewhere
    for (int64_t done = 0; done < chunk_rows; done += kBlockRows) {
      const int rows = int(chunk_rows - done < kBlockRows ? chunk_rows - done : kBlockRows);
      for (int r = 0; r < rows; ++r) {
        if (run_left > 0) {
          cursor.next();
        } else {
          const int64_t run = (chunk_begin + done + r) / shape.inner;
          const int64_t in_run = (chunk_begin + done + r) % shape.inner;
          cursor.seek((run * shape.groups + group) * shape.inner + in_run);
          run_left = shape.inner - in_run;
        }
        --run_left;
        block.grad_output[r] = (const Output*)args.grad_output + cursor.offset(0);
        block.input[r] = (const Input*)args.input + cursor.offset(1);
        block.grad_input[r] = (Input*)args.grad_input + cursor.offset(2);
        if constexpr (kAdds) {
          block.grad_new_residual[r] = (const Input*)args.grad_new_residual + cursor.offset(3);
        }
      }
      if (rows == kBlockRows) {
        backward_block<kBlockRows, kAdds, kGradInput, kGradScale, kStream>(
            shape, scale, rows, block, grad_scale, done == 0);
      } else {
        backward_block<0, kAdds, kGradInput, kGradScale, kStream>(
            shape, scale, rows, block, grad_scale, done == 0);
      }
    }
  }
}

template <class Input, class Scale, class Args>
void backward(const Args& args, bool stream, int64_t begin, int64_t end) {
  if constexpr (kSame<Args, RmsNormBackward>) {
    if (args.grad_input == nullptr) {
      backward_tasks<false, true, false, Input, Scale>(args, begin, end);
      return;
    }
  }
  if (args.grad_scale == nullptr) {
    backward_tasks<true, false, false, Input, Scale>(args, begin, end);
  } else if (!stream) {
    backward_tasks<true, true, false, Input, Scale>(args, begin, end);
  } else {
    backward_tasks<true, true, true, Input, Scale>(args, begin, end);
    stream_end();
  }
}

// The sum of `count` rows of the workspace, pairwise.
template <class Part>
Pair sum_chunks(Part part, const Real* first, int64_t stride, int64_t count) {
  constexpr int64_t kInOrder = 8;
  if (count > kInOrder) {
    const int64_t half = (count / 2 + kInOrder - 1) / kInOrder * kInOrder;
    return sum_chunks(part, first, stride, half) +
           sum_chunks(part, first + half * stride, stride, count - half);
  }
  Pair sum = part.load_from(first);
  for (int64_t k = 1; k < count; ++k) sum = sum + part.load_from(first + k * stride);
  return sum;
}

template <class Scale>
void reduce(const RmsNormBackward& args, bool, int64_t begin, int64_t end) {
  const int64_t dim = args.shape.dim;
  const int64_t chunks = backward_plan(args.shape).chunks_per_group;
  const int64_t blocks_per_group = (dim + kReduceColumns - 1) / kReduceColumns;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t group = block / blocks_per_group;
    const int64_t first = block % blocks_per_group * kReduceColumns;
    const int64_t last = first + kReduceColumns < dim ? first + kReduceColumns : dim;
    const Real* partial = (const Real*)args.workspace + group * chunks * dim;
    Scale* grad_scale = (Scale*)args.grad_scale + group * dim;
    for_each_pair(first, last, [&](auto part, int64_t i) {
      part.store_to(grad_scale + i, sum_chunks(part, partial + i, dim, chunks));
    });
  }
}

}  // namespace
}  // namespace coreai_torch
