// RMSNorm backward: kernels, and which of them runs.
//
//   n = input * rstd
//   g = grad_output * scale
//   grad_input = (g - n * mean(g * n)) * rstd
//   grad_scale = sum over rows of grad_output * n
//
// and where the norm comes after a residual add, grad_new_residual is added to grad_input.
//
// The statistics are taken anew from the row that is read anyway. The sum over rows is taken in two
// stages: each block (or cluster) sums the rows that it visits and writes one partial sum; a second
// kernel adds the partial sums, always in the same order, and rounds to the scale's dtype.
#pragma once

#include "coreai_torch/add_rms_norm.h"

#include "alignment.cuh"
#include "rms_norm_dtypes.cuh"
#include "row_layout.cuh"
#include "widths.cuh"

namespace coreai_torch {

template <bool kAdds>
struct BackwardArgs {
  const void* grad_output;
  const void* input;
  const void* scale;
  void* grad_input;  // nullptr if not wanted
  void* grad_scale;  // nullptr if not wanted
  void* partial;     // (groups, parts, dim); not in use where parts == 1
  void* statistics;  // (rows, 2): see RowStatistics; of the wide kernels
  int64_t dim;
  int64_t rows_of_group;
  int64_t parts;  // blocks (or clusters) that share the rows of a group
  double eps;
  RowLayout<kAdds ? 4 : 3> layout;  // grad_output, input, grad_input[, grad_new_residual]
  const void* grad_new_residual;
};

// What the gradient of a row's elements needs to know of the whole row.
template <class Number>
struct RowStatistics {
  Number rstd;
  Number mean_product;  // mean(g * n)
};

// From the sums of x * x and of g * x.
template <class Number>
__device__ __forceinline__ RowStatistics<Number> statistics_of(
    const Number (&sums)[2], int64_t dim, double eps) {
  const Number rstd = reciprocal_sqrt(sums[0] / Number(dim) + Number(eps));
  return {rstd, sums[1] / Number(dim) * rstd};
}

// One access of a row and of the gradient of its output.
template <class Input, class Scale, int N>
struct BackwardAccess {
  using Number = Accumulate<Input>;
  Pack<Input, N> input;
  Pack<Output<Input, Scale>, N> grad_output;

  __device__ __forceinline__ void load(const Input* x, const Output<Input, Scale>* dy) {
    input.load_streaming(x);
    grad_output.load_streaming(dy);
  }

  // Adds to the sums of x * x and of g * x.
  __device__ __forceinline__ void add_to(Number (&sums)[2], const Pack<Scale, N>& scale) const {
    Number x[N], dy[N];
    Accumulate<Scale> w[N];
    input.unpack(x);
    grad_output.unpack(dy);
    scale.unpack(w);
    Number squares = 0, products = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      squares = fma(x[e], x[e], squares);
      products = fma(dy[e] * w[e], x[e], products);
    }
    sums[0] += squares;
    sums[1] += products;
  }

  // With kAdds, plus what is `added`.
  template <bool kAdds>
  __device__ __forceinline__ void write_grad_input(
      const RowStatistics<Number>& row, const Pack<Scale, N>& scale, const Pack<Input, N>& added,
      Input* grad_input) const {
    Number x[N], dy[N];
    Accumulate<Scale> w[N];
    input.unpack(x);
    grad_output.unpack(dy);
    scale.unpack(w);
    if constexpr (kAdds) {
      Number more[N];
      added.unpack(more);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        x[e] = fma(fma(-row.mean_product, x[e] * row.rstd, dy[e] * w[e]), row.rstd, more[e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        x[e] = fma(-row.mean_product, x[e] * row.rstd, dy[e] * w[e]) * row.rstd;
      }
    }
    Pack<Input, N> result;
    result.pack(x);
    result.store_streaming(grad_input);
  }

  __device__ __forceinline__ void add_to_grad_scale(Number (&sums)[N], Number rstd) const {
    Number x[N], dy[N];
    input.unpack(x);
    grad_output.unpack(dy);
#pragma unroll
    for (int e = 0; e < N; ++e) sums[e] = fma(dy[e], x[e] * rstd, sums[e]);
  }
};

// Where a block's sums of grad_scale go: to the partial sums, or, where it is the only block of its
// group, to grad_scale itself.
template <class Scale, int N, class Number, bool kAdds>
__device__ __forceinline__ void write_grad_scale(
    const BackwardArgs<kAdds>& args, int64_t group, int64_t part, int64_t column,
    const Number (&sums)[N]) {
  if (args.parts == 1) {
    Pack<Scale, N> result;
    result.pack(sums);
    result.store_streaming(static_cast<Scale*>(args.grad_scale) + group * args.dim + column);
  } else {
    Pack<Number, N> result;
    result.pack(sums);
    result.store_streaming(
        static_cast<Number*>(args.partial) + (group * args.parts + part) * args.dim + column);
  }
}

// What a thread holds in 32-bit registers: two rows' accesses and with kAdds those of what is added
// to one, the scale, sums of grad_scale.
template <class Input, class Scale, int N, class W, bool kAdds>
struct BackwardRegisters {
  static constexpr int kRows = W::kAccesses *
                               (2 * int(sizeof(BackwardAccess<Input, Scale, N>)) +
                                (kAdds ? int(sizeof(Pack<Input, N>)) : 0)) /
                               4;
  static constexpr int kScale = W::kAccesses * int(sizeof(Pack<Scale, N>)) / 4;
  static constexpr int kSums = W::kAccesses * N;

  // Where it does not fit, the scale is read anew for each row, from the L1 cache.
  static constexpr bool kKeepsScale = kRows + kScale + kSums <= 48;

  // Threads that the registers of a multiprocessor have room for.
  static constexpr int kThreads = N > 1 && kRows + kSums <= 40 ? 640 : 512;
  static constexpr int kBlocks = kThreads / W::kBlock;
};

// A block (or cluster) visits every `parts`-th batch of the rows of its group. A row is read once;
// the next is under way while it is worked on.
template <class Input, class Scale, int N, class W, bool kAdds>
__global__ void __launch_bounds__(W::kBlock, BackwardRegisters<Input, Scale, N, W, kAdds>::kBlocks)
    rms_norm_backward_rows(const __grid_constant__ BackwardArgs<kAdds> args) {
  constexpr int threads = W::kRowThreads;
  constexpr int accesses = W::kAccesses;
  constexpr int cluster = W::kCluster;
  constexpr int block_rows = W::kBlockRows;
  if constexpr (cluster > 1 && !kHasClusters) {
    return;
  } else {
    COREAI_TORCH_SHARED_MEMORY(shared);
    float* buffer = reinterpret_cast<float*>(shared);
    const int lane = threadIdx.x % threads;
    const int sub = threadIdx.x / threads;
    const int rank = cluster > 1 ? int(cluster_rank()) : 0;
    const int dim = int(args.dim);
    const unsigned parts = unsigned(args.parts);
    const int64_t group = blockIdx.x / cluster / parts;
    const int64_t part = blockIdx.x / cluster % parts;
    const int64_t rows = args.rows_of_group;
    const auto column = [=](int i) { return ((i * cluster + rank) * threads + lane) * N; };

    BackwardAccess<Input, Scale, N> next[accesses];
    int64_t next_grad_input = 0;
    const auto fetch = [&](int64_t k) {
      if (k >= rows) {  // zeros add nothing
#pragma unroll
        for (int i = 0; i < accesses; ++i) next[i] = {};
        return;
      }
      int64_t offset[kAdds ? 4 : 3];
      args.layout.offsets(args.layout.row_of_group(group, k), offset);
      const auto* dy = static_cast<const Output<Input, Scale>*>(args.grad_output) + offset[0];
      const Input* x = static_cast<const Input*>(args.input) + offset[1];
      next_grad_input = offset[2];
#pragma unroll
      for (int i = 0; i < accesses; ++i) {
        if (column(i) < dim) next[i].load(x + column(i), dy + column(i));
      }
    };
    fetch(part * block_rows + sub);

    const Scale* scale = static_cast<const Scale*>(args.scale) + group * args.dim;
    const auto load_scale = [&](int i) {
      Pack<Scale, N> pack;
      if (column(i) < dim) pack.load_cached(scale + column(i));
      return pack;
    };
    constexpr bool keeps_scale = BackwardRegisters<Input, Scale, N, W, kAdds>::kKeepsScale;
    Pack<Scale, N> kept_scale[keeps_scale ? accesses : 1];
    const auto scale_of = [&](int i) {
      if constexpr (keeps_scale) {
        return kept_scale[i];
      } else {
        return load_scale(i);
      }
    };
    float grad_scale[accesses][N];
#pragma unroll
    for (int i = 0; i < accesses; ++i) {
      if constexpr (keeps_scale) kept_scale[i] = load_scale(i);
#pragma unroll
      for (int e = 0; e < N; ++e) grad_scale[i][e] = 0;
    }
    if constexpr (cluster > 1) cluster_sync();  // the other blocks have started

    int turn = 0;
    const int64_t step = args.parts * block_rows;
#pragma unroll 1
    for (int64_t first = part * block_rows; first < rows; first += step) {
      BackwardAccess<Input, Scale, N> now[accesses];
#pragma unroll
      for (int i = 0; i < accesses; ++i) now[i] = next[i];
      Input* grad_input = static_cast<Input*>(args.grad_input) + next_grad_input;
      const bool live = first + sub < rows;
      fetch(first + step + sub);
      // Needed after the reduction only. There are no registers to carry its place from row to row.
      Pack<Input, N> added[kAdds ? accesses : 1];
      if constexpr (kAdds) {
        int64_t offset[4];
        args.layout.offsets(args.layout.row_of_group(group, first + sub), offset);
        const Input* more = static_cast<const Input*>(args.grad_new_residual) + offset[3];
#pragma unroll
        for (int i = 0; i < accesses; ++i) {
          if (live && column(i) < dim) added[i].load_streaming(more + column(i));
        }
      }

      float sums[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < accesses; ++i) now[i].add_to(sums, scale_of(i));
      row_sum<threads, cluster>(
          sums, buffer + turn * kRowSumBuffer<W::kBlock, threads, cluster, 2>);
      turn ^= 1;
      if (!live) continue;
      const RowStatistics<float> statistics = statistics_of(sums, args.dim, args.eps);
#pragma unroll
      for (int i = 0; i < accesses; ++i) {
        if (args.grad_input && column(i) < dim) {
          now[i].template write_grad_input<kAdds>(
              statistics, scale_of(i), added[kAdds ? i : 0], grad_input + column(i));
        }
        if (args.grad_scale) now[i].add_to_grad_scale(grad_scale[i], statistics.rstd);
      }
    }
    if (!args.grad_scale) return;

    // Add up the rows that lie side by side in the block.
    if constexpr (block_rows > 1) {
      buffer += 2 * kRowSumBuffer<W::kBlock, threads, cluster, 2>;
#pragma unroll
      for (int half = block_rows / 2; half > 0; half /= 2) {
        const auto place = [&](int row, int i, int e) -> float& {
          return buffer[((row * accesses + i) * N + e) * threads + lane];
        };
        __syncthreads();
        if (sub >= half && sub < 2 * half) {
#pragma unroll
          for (int i = 0; i < accesses; ++i)
#pragma unroll
            for (int e = 0; e < N; ++e) place(sub - half, i, e) = grad_scale[i][e];
        }
        __syncthreads();
        if (sub < half) {
#pragma unroll
          for (int i = 0; i < accesses; ++i)
#pragma unroll
            for (int e = 0; e < N; ++e) grad_scale[i][e] += place(sub, i, e);
        }
      }
    }
    if (sub == 0) {
#pragma unroll
      for (int i = 0; i < accesses; ++i) {
        if (column(i) < dim) {
          write_grad_scale<Scale>(args, group, part, column(i), grad_scale[i]);
        }
      }
    }
  }
}

// Numbers of shared memory that rms_norm_backward_rows() takes.
template <int N, class W>
constexpr int kBackwardBuffer = 2 * kRowSumBuffer<W::kBlock, W::kRowThreads, W::kCluster, 2> +
                                W::kBlockRows / 2 * W::kAccesses * N * W::kRowThreads;

// Any width, first half: the statistics of every row, one block a row.
constexpr int kStatisticsBlock = 512;

template <class Input, class Scale, int N>
__global__ void __launch_bounds__(kStatisticsBlock)
    rms_norm_backward_statistics(const __grid_constant__ BackwardArgs<false> args) {
  using Number = Accumulate<Input>;
  COREAI_TORCH_SHARED_MEMORY(shared);
  Number* buffer = reinterpret_cast<Number*>(shared);
  int turn = 0;
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < args.layout.rows; row += gridDim.x) {
    int64_t offset[3];
    args.layout.offsets(row, offset);
    const auto* dy = static_cast<const Output<Input, Scale>*>(args.grad_output) + offset[0];
    const Input* x = static_cast<const Input*>(args.input) + offset[1];
    const Scale* scale =
        static_cast<const Scale*>(args.scale) + args.layout.group_of(row) * args.dim;
    Number sums[2] = {0, 0};
#pragma unroll 2
    for (int64_t c = threadIdx.x * N; c < args.dim; c += int64_t(kStatisticsBlock) * N) {
      BackwardAccess<Input, Scale, N> access;
      Pack<Scale, N> w;
      access.load(x + c, dy + c);
      w.load_cached(scale + c);
      access.add_to(sums, w);
    }
    row_sum<kStatisticsBlock, 1>(
        sums, buffer + turn * kRowSumBuffer<kStatisticsBlock, kStatisticsBlock, 1, 2>);
    turn ^= 1;
    if (threadIdx.x == 0) {
      static_cast<RowStatistics<Number>*>(args.statistics)[row] =
          statistics_of(sums, args.dim, args.eps);
    }
  }
}

// Any width, second half: a block visits every `parts`-th row of its group, in a slab of columns of
// which each thread has one access.
constexpr int kColumnsBlock = 256;
template <bool kAdds>
constexpr int kColumnsBatch = kAdds ? 3 : 4;  // rows under way at once

template <class Input, class Scale, int N, bool kAdds>
__global__ void __launch_bounds__(kColumnsBlock)
    rms_norm_backward_columns(const __grid_constant__ BackwardArgs<kAdds> args) {
  using Number = Accumulate<Input>;
  constexpr int64_t slab = int64_t(kColumnsBlock) * N;
  const int64_t slabs = (args.dim + slab - 1) / slab;
  const int64_t group = blockIdx.x / slabs / args.parts;
  const int64_t part = blockIdx.x / slabs % args.parts;
  const int64_t column = blockIdx.x % slabs * slab + threadIdx.x * N;
  if (column >= args.dim) return;

  Pack<Scale, N> w;
  w.load_cached(static_cast<const Scale*>(args.scale) + group * args.dim + column);
  const auto* statistics = static_cast<const RowStatistics<Number>*>(args.statistics);
  Number grad_scale[N] = {};
  const int64_t rows = args.rows_of_group;
#pragma unroll 1
  for (int64_t first = part; first < rows; first += kColumnsBatch<kAdds> * args.parts) {
    BackwardAccess<Input, Scale, N> access[kColumnsBatch<kAdds>];
    Pack<Input, N> added[kColumnsBatch<kAdds>];
    RowStatistics<Number> of_row[kColumnsBatch<kAdds>];
    int64_t grad_input[kColumnsBatch<kAdds>];
#pragma unroll
    for (int i = 0; i < kColumnsBatch<kAdds>; ++i) {
      const int64_t k = first + i * args.parts;
      if (k >= rows) break;
      const int64_t row = args.layout.row_of_group(group, k);
      int64_t offset[kAdds ? 4 : 3];
      args.layout.offsets(row, offset);
      access[i].load(
          static_cast<const Input*>(args.input) + offset[1] + column,
          static_cast<const Output<Input, Scale>*>(args.grad_output) + offset[0] + column);
      if constexpr (kAdds) {
        added[i].load_streaming(
            static_cast<const Input*>(args.grad_new_residual) + offset[3] + column);
      }
      grad_input[i] = offset[2] + column;
      of_row[i] = statistics[row];
    }
#pragma unroll
    for (int i = 0; i < kColumnsBatch<kAdds>; ++i) {
      if (first + i * args.parts >= rows) break;
      if (args.grad_input) {
        access[i].template write_grad_input<kAdds>(
            of_row[i], w, added[i], static_cast<Input*>(args.grad_input) + grad_input[i]);
      }
      if (args.grad_scale) access[i].add_to_grad_scale(grad_scale, of_row[i].rstd);
    }
  }
  if (args.grad_scale) write_grad_scale<Scale>(args, group, part, column, grad_scale);
}

// Second stage: grad_scale[group][column] = sum over the parts.
constexpr int kSumColumns = 32;
constexpr int kSumWalkers = 32;  // threads that walk down a column's parts

template <class Scale, class Number>
__global__ void __launch_bounds__(kSumColumns* kSumWalkers)
    rms_norm_backward_sum(const __grid_constant__ BackwardArgs<false> args) {
  COREAI_TORCH_SHARED_MEMORY(shared);
  const int x = threadIdx.x % kSumColumns;
  const int y = threadIdx.x / kSumColumns;
  const int64_t slabs = (args.dim + kSumColumns - 1) / kSumColumns;
  const int64_t group = blockIdx.x / slabs;
  const int64_t column = blockIdx.x % slabs * kSumColumns + x;
  const Number* partial =
      static_cast<const Number*>(args.partial) + group * args.parts * args.dim + column;
  Number sum[1] = {0};
  if (column < args.dim) {
#pragma unroll 8
    for (int64_t part = y; part < args.parts; part += kSumWalkers) {
      sum[0] += partial[part * args.dim];
    }
  }
  // Turned, so that each warp holds the walkers of one column.
  Number* buffer = reinterpret_cast<Number*>(shared);
  buffer[y * (kSumColumns + 1) + x] = sum[0];
  __syncthreads();
  sum[0] = buffer[x * (kSumColumns + 1) + y];
  add_across_lanes<kSumWalkers>(sum);
  const int64_t written = blockIdx.x % slabs * kSumColumns + y;
  if (x == 0 && written < args.dim) {
    Pack<Scale, 1> result;
    result.pack(sum);
    result.store_streaming(static_cast<Scale*>(args.grad_scale) + group * args.dim + written);
  }
}

// ---- host --------------------------------------------------------------------------------------

// How a call is carried out. Call is RmsNormBackward or AddRmsNormBackward.
template <class Call>
struct BackwardPlan {
  int64_t parts;
  int64_t partial_bytes;  // in the workspace, followed by
  int64_t statistics_bytes;
  cudaError_t (*run)(const Call& call, const BackwardPlan& plan, int device, cudaStream_t stream);
};

template <class Call>
constexpr bool kBackwardAdds = kIsSame<Call, AddRmsNormBackward>;

inline RowLayout<3> layout_of(const RmsNormBackward& call) {
  return {call.shape, {call.grad_output_strides, call.input_strides, call.grad_input_strides}};
}
inline RowLayout<4> layout_of(const AddRmsNormBackward& call) {
  return {
      call.shape,
      {call.grad_output_strides, call.input_strides, call.grad_input_strides,
       call.grad_new_residual_strides}};
}

// The plan may be that of an AddRmsNormBackward whose RmsNormBackward part is `call`.
template <class Call, class Planned>
BackwardArgs<kBackwardAdds<Call>> backward_args(
    const Call& call, const BackwardPlan<Planned>& plan) {
  const RmsNormShape& shape = call.shape;
  BackwardArgs<kBackwardAdds<Call>> args = {
      call.grad_output,
      call.input,
      call.scale,
      call.grad_input,
      call.grad_scale,
      call.workspace,
      static_cast<char*>(call.workspace) + plan.partial_bytes,
      shape.dim,
      shape.rows / shape.groups,
      plan.parts,
      shape.eps,
      layout_of(call),
      nullptr};
  if constexpr (kBackwardAdds<Call>) args.grad_new_residual = call.grad_new_residual;
  return args;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up_16(int64_t bytes) { return ceil_divide(bytes, 16) * 16; }

// As many parts as give every multiprocessor `resident` blocks, but none without rows.
inline int64_t parts_of_group(const RmsNormShape& shape, int64_t resident, int64_t rows_at_once) {
  const int64_t most = ceil_divide(shape.rows / shape.groups, rows_at_once);
  const int64_t wanted = resident / shape.groups;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

template <class Scale, class Number>
cudaError_t sum_partials(const BackwardArgs<false>& args, cudaStream_t stream) {
  const int64_t blocks = args.layout.groups * ceil_divide(args.dim, kSumColumns);
  constexpr size_t shared = sizeof(Number) * kSumWalkers * (kSumColumns + 1);
  return launch(
      {blocks, kSumColumns * kSumWalkers, shared, stream}, rms_norm_backward_sum<Scale, Number>,
      args);
}

template <int N, class W>
Launch rows_launch(int64_t units, cudaStream_t stream) {
  return {
      units * W::kCluster, W::kBlock, sizeof(float) * kBackwardBuffer<N, W>, stream, W::kCluster};
}

template <class Input, class Scale, int N, class W, class Call>
cudaError_t run_rows(const Call& call, const BackwardPlan<Call>& plan, int, cudaStream_t stream) {
  return launch(
      rows_launch<N, W>(call.shape.groups * plan.parts, stream),
      rms_norm_backward_rows<Input, Scale, N, W, kBackwardAdds<Call>>, backward_args(call, plan));
}

template <class Input, class Scale, int N, class Call>
cudaError_t run_wide(
    const Call& call, const BackwardPlan<Call>& plan, int device, cudaStream_t stream) {
  using Number = Accumulate<Input>;
  const RmsNormShape& shape = call.shape;
  const int64_t most = 4 * int64_t(multiprocessors(device));
  constexpr size_t shared =
      2 * sizeof(Number) * kRowSumBuffer<kStatisticsBlock, kStatisticsBlock, 1, 2>;
  const cudaError_t error = launch(
      {shape.rows < most ? shape.rows : most, kStatisticsBlock, shared, stream},
      rms_norm_backward_statistics<Input, Scale, N>,
      backward_args(static_cast<const RmsNormBackward&>(call), plan));
  if (error != cudaSuccess) return error;
  const int64_t slabs = ceil_divide(shape.dim, int64_t(kColumnsBlock) * N);
  return launch(
      {shape.groups * plan.parts * slabs, kColumnsBlock, 0, stream},
      rms_norm_backward_columns<Input, Scale, N, kBackwardAdds<Call>>, backward_args(call, plan));
}

template <class Input, class Scale, int N, class Candidates, class Call>
BackwardPlan<Call> plan_with_access(const Call& call, int device) {
  constexpr bool kAdds = kBackwardAdds<Call>;
  using Number = Accumulate<Input>;
  const RmsNormShape& shape = call.shape;
  const int64_t processors = multiprocessors(device);
  BackwardPlan<Call> plan = {};
  const bool done = with_width(Candidates{}, ceil_divide(shape.dim, N), [&](auto width) {
    using W = decltype(width);
    int64_t resident = processors * BackwardRegisters<Input, Scale, N, W, kAdds>::kBlocks;
    if (W::kCluster > 1) {
      resident = resident_clusters(
          device, rms_norm_backward_rows<Input, Scale, N, W, kAdds>, rows_launch<N, W>(0, nullptr));
      if (resident == 0) return false;
    }
    plan.parts = parts_of_group(shape, resident, W::kBlockRows);
    plan.run = run_rows<Input, Scale, N, W, Call>;
    return true;
  });
  if (!done) {
    const int64_t slabs = ceil_divide(shape.dim, int64_t(kColumnsBlock) * N);
    plan.parts = parts_of_group(shape, ceil_divide(4 * processors, slabs), kColumnsBatch<kAdds>);
    plan.run = run_wide<Input, Scale, N, Call>;
    plan.statistics_bytes = shape.rows * 2 * int64_t(sizeof(Number));
  }
  if (call.grad_scale && plan.parts > 1) {
    plan.partial_bytes =
        round_up_16(shape.groups * plan.parts * shape.dim * int64_t(sizeof(Number)));
  }
  return plan;
}

template <class Input, class Scale, class Call>
BackwardPlan<Call> plan_backward(const Call& call, int device) {
  constexpr bool kAdds = kBackwardAdds<Call>;
  if constexpr (kHasRowKernels<Input>) {
    constexpr int N = kAccessElements<Input>;
    const RmsNormShape& shape = call.shape;
    bool aligned =
        shape.dim % N == 0 && is_aligned<Input, N>(shape, call.input, call.input_strides) &&
        is_aligned<Output<Input, Scale>, N>(shape, call.grad_output, call.grad_output_strides) &&
        is_aligned<Input, N>(shape, call.grad_input, call.grad_input_strides) &&
        is_aligned<Scale, N>(call.scale) && is_aligned<Scale, N>(call.grad_scale);
    if constexpr (kAdds) {
      aligned = aligned &&
                is_aligned<Input, N>(shape, call.grad_new_residual, call.grad_new_residual_strides);
    }
    if (aligned) return plan_with_access<Input, Scale, N, BackwardWidths<N>>(call, device);
  }
  return plan_with_access<Input, Scale, 1, ElementWidths<Input, kAdds, BackwardWidths<1>>>(
      call, device);
}

template <class Input, class Scale, class Call>
int64_t rms_norm_backward_workspace(const Call& call, int device) {
  const BackwardPlan<Call> plan = plan_backward<Input, Scale>(call, device);
  return plan.partial_bytes + plan.statistics_bytes;
}

template <class Input, class Scale, class Call>
cudaError_t rms_norm_backward(const Call& call, int device, cudaStream_t stream) {
  const BackwardPlan<Call> plan = plan_backward<Input, Scale>(call, device);
  const cudaError_t error = plan.run(call, plan, device, stream);
  if (error != cudaSuccess || !call.grad_scale || plan.parts == 1) return error;
  return sum_partials<Scale, Accumulate<Input>>(
      backward_args(static_cast<const RmsNormBackward&>(call), plan), stream);
}

}  // namespace coreai_torch
