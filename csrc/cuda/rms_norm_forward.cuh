// RMSNorm forward, with and without the residual add: kernels, and which of them runs.
#pragma once

#include "coreai_torch/add_rms_norm.h"

#include "alignment.cuh"
#include "cache.cuh"
#include "mean.cuh"
#include "rms_norm_dtypes.cuh"
#include "row_layout.cuh"
#include "widths.cuh"

namespace coreai_torch {

template <bool kAdds>
struct ForwardArgs {
  const void* input;
  const void* scale;
  void* output;
  int64_t dim;
  int64_t first_row;  // of this launch
  Mean mean;
  bool evict_last;                  // see rows_are_evicted_last()
  RowLayout<kAdds ? 4 : 2> layout;  // input, output[, residual, new_residual]
  const void* residual;
  void* new_residual;
};

// Writes one access of the output.
template <class Input, class Scale, int N>
__device__ __forceinline__ void write_normalized(
    const Pack<Input, N>& input, const Pack<Scale, N>& scale, Accumulate<Input> rstd,
    Output<Input, Scale>* output) {
  Accumulate<Input> x[N];
  input.unpack(x);
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] *= rstd;
  if constexpr (kRoundsNormalized<Input, Scale>) {
    Pack<Input, N> rounded;
    rounded.pack(x);
    rounded.unpack(x);
  }
  Accumulate<Scale> w[N];
  scale.unpack(w);
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] *= w[e];
  Pack<Output<Input, Scale>, N> result;
  result.pack(x);
  result.store(output);
}

template <class T, int N>
__device__ __forceinline__ Accumulate<T> sum_of_squares(const Pack<T, N>& pack) {
  Accumulate<T> x[N];
  pack.unpack(x);
  Accumulate<T> sum = x[0] * x[0];
#pragma unroll
  for (int e = 1; e < N; ++e) sum = fma(x[e], x[e], sum);
  return sum;
}

// Blocks of a multiprocessor that the registers have room for.
template <int N, class W>
constexpr int kForwardBlocks = (N == 1              ? (W::kRowThreads > kWarp ? kMostThreads : 1536)
                                : W::kBlock >= 512  ? 1024
                                : W::kAccesses >= 4 ? 640
                                                    : 896) /
                               W::kBlock;

// Where a thread has more of a row than this, it keeps it in shared memory.
constexpr int kMostAccessesInRegisters = 6;
template <int N, class W>
constexpr bool kRowInSharedMemory = N > 1 && W::kAccesses > kMostAccessesInRegisters;

template <class W>
constexpr int kForwardSumBytes =
    int(round_up_16(kRowSumBuffer<W::kBlock, W::kRowThreads, W::kCluster, 1> * sizeof(float)));
template <int N, class W>
constexpr int kForwardSharedBytes =
    kForwardSumBytes<W> + (kRowInSharedMemory<N, W> ? W::kAccesses * 16 * W::kBlock : 0);

// A row is read once and stays packed in registers, or in shared memory, between its reduction and
// its output. With kAdds it is the sum of two rows, rounded, which is written as well.
template <class Input, class Scale, int N, class W, bool kAdds>
__global__ void __launch_bounds__(W::kBlock, (kForwardBlocks<N, W>))
    rms_norm_forward_rows(const __grid_constant__ ForwardArgs<kAdds> args) {
  constexpr int threads = W::kRowThreads;
  constexpr int accesses = W::kAccesses;
  constexpr int cluster = W::kCluster;
  if constexpr (cluster > 1 && !kHasClusters) {
    return;
  } else {
    COREAI_TORCH_SHARED_MEMORY(shared);
    const int lane = threadIdx.x % threads;
    const int rank = cluster > 1 ? int(cluster_rank()) : 0;
    if constexpr (cluster > 1) cluster_arrive();
    const int64_t row =
        args.first_row + int64_t(blockIdx.x / cluster) * W::kBlockRows + threadIdx.x / threads;
    const bool live = W::kBlockRows == 1 || row < args.layout.rows;
    int64_t offset[kAdds ? 4 : 2], group;
    args.layout.find(row, offset, group);
    const int dim = int(args.dim);
    const auto column = [=](int i) { return ((i * cluster + rank) * threads + lane) * N; };
    const auto has = [=](int i) { return live && column(i) < dim; };

    const Input* input = static_cast<const Input*>(args.input) + offset[0] + column(0);
    const Scale* scale = static_cast<const Scale*>(args.scale) + group * dim + column(0);
    constexpr int step = cluster * threads * N;
    const L2Policy policy = l2_policy(args.evict_last);

    // The scale is asked for before the threads meet, where registers allow.
    constexpr bool scale_first =
        N > 1 && W::kBlock < 512 && accesses * Pack<Scale, N>::kBytes <= 64;
    Pack<Scale, N> w[accesses];
    if constexpr (scale_first) {
#pragma unroll
      for (int i = 0; i < accesses; ++i) w[i].load_cached(scale + i * step, has(i));
    }
    constexpr bool in_shared_memory = kRowInSharedMemory<N, W>;
    static_assert(!(in_shared_memory && kAdds));
    Word16* const places = reinterpret_cast<Word16*>(shared + kForwardSumBytes<W>) + threadIdx.x;
    Pack<Input, N> x[in_shared_memory ? 1 : accesses];
#pragma unroll
    for (int i = 0; i < accesses; ++i) {
      if constexpr (!in_shared_memory) {
        x[i].load_row(input + i * step, has(i), policy);
      } else if (has(i)) {
        Pack<Input, N>::template copy_async<W::kBlock>(
            places + i * W::kBlock, input + i * step, policy);
      }
    }
    if constexpr (in_shared_memory) copy_async_commit();
    Pack<Input, N> added[kAdds ? accesses : 1];
    if constexpr (kAdds) {
      const Input* residual = static_cast<const Input*>(args.residual) + offset[2] + column(0);
#pragma unroll
      for (int i = 0; i < accesses; ++i) added[i].load_row(residual + i * step, has(i), policy);
    }
    if constexpr (kAdds) {
      Input* new_residual = static_cast<Input*>(args.new_residual) + offset[3] + column(0);
#pragma unroll
      for (int i = 0; i < accesses; ++i) {
        x[i].add(added[i]);
        if (has(i)) x[i].store(new_residual + i * step);
      }
    }

    const auto access = [&](int i) {
      if constexpr (in_shared_memory) {
        Pack<Input, N> pack;
        pack.template load_shared<W::kBlock>(places + i * W::kBlock);
        return pack;
      } else {
        return x[i];
      }
    };
    if constexpr (in_shared_memory) copy_async_wait<0>();
    float sum[1] = {0};
#pragma unroll
    for (int i = 0; i < accesses; ++i) {
      if (in_shared_memory && !has(i)) continue;
      sum[0] += sum_of_squares(access(i));
    }
    if constexpr (cluster > 1) cluster_wait();  // the other blocks have started
    row_sum<threads, cluster>(sum, reinterpret_cast<float*>(shared));
    if (!live) return;

    if constexpr (!in_shared_memory && accesses > 4) {
#pragma unroll
      for (int i = 0; i < accesses; ++i) x[i].stay_packed();
    }
    const float rstd = args.mean.rstd(sum[0]);
    auto* output = static_cast<Output<Input, Scale>*>(args.output) + offset[1] + column(0);
#pragma unroll
    for (int i = 0; i < accesses; ++i) {
      // In branches, one access after the other, where the registers do not hold all of the scale.
      if ((kAdds || accesses > 4) && !has(i)) continue;
      if constexpr (!scale_first) w[i].load_cached(scale + i * step, has(i));
      if (has(i)) write_normalized(access(i), w[i], rstd, output + i * step);
    }
  }
}

// Any width: a block walks along its row twice, the second time mostly in the L2 cache.
constexpr int kWideBlock = 1024;
constexpr int kWideBatch = 4;  // accesses of a thread under way at once

template <class Input, class Scale, int N, bool kAdds>
__global__ void __launch_bounds__(kWideBlock)
    rms_norm_forward_wide(const __grid_constant__ ForwardArgs<kAdds> args) {
  using Number = Accumulate<Input>;
  COREAI_TORCH_SHARED_MEMORY(shared);
  const int64_t row = args.first_row + blockIdx.x;
  int64_t offset[kAdds ? 4 : 2], group;
  args.layout.find(row, offset, group);
  const Input* input = static_cast<const Input*>(args.input) + offset[0];
  constexpr int64_t step = int64_t(kWideBlock) * N;
  const L2Policy policy = l2_policy(args.evict_last);

  Number sum[1] = {0};
  Input* new_residual = nullptr;
  if constexpr (kAdds) {
    const Input* residual = static_cast<const Input*>(args.residual) + offset[2];
    new_residual = static_cast<Input*>(args.new_residual) + offset[3];
#pragma unroll 1
    for (int64_t first = threadIdx.x * N; first < args.dim; first += kWideBatch * step) {
      Pack<Input, N> x[kWideBatch], added[kWideBatch];
#pragma unroll
      for (int i = 0; i < kWideBatch; ++i) {
        if (first + i * step >= args.dim) break;
        x[i].load_row(input + first + i * step, true, policy);
        added[i].load_row(residual + first + i * step, true, policy);
      }
#pragma unroll
      for (int i = 0; i < kWideBatch; ++i) {
        if (first + i * step >= args.dim) break;
        x[i].add(added[i]);
        x[i].store(new_residual + first + i * step);
        sum[0] += sum_of_squares(x[i]);
      }
    }
  } else {
#pragma unroll kWideBatch
    for (int64_t c = threadIdx.x * N; c < args.dim; c += step) {
      Pack<Input, N> x;
      x.load_cached(input + c, true);
      sum[0] += sum_of_squares(x);
    }
  }
  row_sum<kWideBlock, 1>(sum, reinterpret_cast<Number*>(shared));

  const Number rstd = args.mean.rstd(sum[0]);
  const Scale* scale = static_cast<const Scale*>(args.scale) + group * args.dim;
  auto* output = static_cast<Output<Input, Scale>*>(args.output) + offset[1];
#pragma unroll 1
  for (int64_t first = threadIdx.x * N; first < args.dim; first += kWideBatch * step) {
    Pack<Input, N> x[kWideBatch];
#pragma unroll
    for (int i = 0; i < kWideBatch; ++i) {
      if (first + i * step < args.dim) {
        if constexpr (kAdds) {
          x[i].load_stored(new_residual + first + i * step);
        } else {
          x[i].load_row(input + first + i * step, true, policy);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kWideBatch; ++i) {
      const int64_t column = first + i * step;
      if (column >= args.dim) break;
      Pack<Scale, N> w;
      w.load_cached(scale + column, true);
      write_normalized(x[i], w, rstd, output + column);
    }
  }
}

// ---- host --------------------------------------------------------------------------------------

constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a launch

// Launches over all rows, `rows_at_once` of them with `how.cluster` blocks.
template <class Args>
cudaError_t launch_over_rows(
    Launch how, void (*kernel)(Args), Args args, int64_t rows, int64_t rows_at_once) {
  const int64_t most = kMaxBlocks / how.cluster * rows_at_once;
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t left = rows - first < most ? rows - first : most;
    how.blocks = (left + rows_at_once - 1) / rows_at_once * how.cluster;
    args.first_row = first;
    if (const cudaError_t error = launch(how, kernel, args); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class Input, class Scale, int N, class Candidates, bool kAdds>
cudaError_t forward_with_access(const ForwardArgs<kAdds>& args, int device, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const int64_t accesses = (args.dim + N - 1) / N;
  const bool done = with_width(Candidates{}, accesses, [&](auto width) {
    using W = decltype(width);
    constexpr auto kernel = rms_norm_forward_rows<Input, Scale, N, W, kAdds>;
    constexpr int shared = kForwardSharedBytes<N, W>;
    if (shared > shared_memory_of_block(device)) return false;
    const Launch how = {0, W::kBlock, size_t(shared), stream, W::kCluster};
    if (W::kCluster > 1 && resident_clusters(device, kernel, how) == 0) return false;
    error = launch_over_rows(how, kernel, args, args.layout.rows, W::kBlockRows);
    return true;
  });
  if (done) return error;
  constexpr size_t shared = sizeof(Accumulate<Input>) * kRowSumBuffer<kWideBlock, kWideBlock, 1, 1>;
  return launch_over_rows(
      {0, kWideBlock, shared, stream}, rms_norm_forward_wide<Input, Scale, N, kAdds>, args,
      args.layout.rows, 1);
}

inline RowLayout<2> layout_of(const RmsNormForward& call) {
  return {call.shape, {call.input_strides, call.output_strides}};
}
inline RowLayout<4> layout_of(const AddRmsNormForward& call) {
  return {
      call.shape,
      {call.input_strides, call.output_strides, call.residual_strides, call.new_residual_strides}};
}

// Call is RmsNormForward or AddRmsNormForward.
template <class Input, class Scale, class Call>
cudaError_t rms_norm_forward(const Call& call, int device, cudaStream_t stream) {
  constexpr bool kAdds = kIsSame<Call, AddRmsNormForward>;
  const RmsNormShape& shape = call.shape;
  ForwardArgs<kAdds> args = {
      call.input,
      call.scale,
      call.output,
      shape.dim,
      0,
      Mean(shape.dim, shape.eps),
      rows_are_evicted_last<Input>(shape, device),
      layout_of(call),
      nullptr,
      nullptr};
  if constexpr (kAdds) {
    args.residual = call.residual;
    args.new_residual = call.new_residual;
  }
  if constexpr (kHasRowKernels<Input>) {
    constexpr int N = kAccessElements<Input>;
    bool aligned = shape.dim % N == 0 &&
                   is_aligned<Input, N>(shape, call.input, call.input_strides) &&
                   is_aligned<Scale, N>(call.scale) &&
                   is_aligned<Output<Input, Scale>, N>(shape, call.output, call.output_strides);
    if constexpr (kAdds) {
      aligned = aligned && is_aligned<Input, N>(shape, call.residual, call.residual_strides) &&
                is_aligned<Input, N>(shape, call.new_residual, call.new_residual_strides);
    }
    if (aligned) {
      return forward_with_access<Input, Scale, N, ForwardWidths<kAdds>>(args, device, stream);
    }
  }
  return forward_with_access<Input, Scale, 1, ElementWidths<Input, kAdds, ForwardElementWidths>>(
      args, device, stream);
}

}  // namespace coreai_torch
