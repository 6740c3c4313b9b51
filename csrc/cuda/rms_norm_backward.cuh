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
#include "cache.cuh"
#include "mean.cuh"
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
  int stages;     // rows under way to a block
  Mean mean;
  bool evict_last;                  // see rows_are_evicted_last()
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
    const Number (&sums)[2], const Mean& mean) {
  const Number rstd = mean.rstd(sums[0]);
  return {rstd, mean.of(sums[1]) * rstd};
}

// One access of a row and of the gradient of its output.
template <class Input, class Scale, int N>
struct BackwardAccess {
  using Number = Accumulate<Input>;
  Pack<Input, N> input;
  Pack<Output<Input, Scale>, N> grad_output;

  __device__ __forceinline__ void load(
      const Input* x, const Output<Input, Scale>* dy, L2Policy policy) {
    input.load_row(x, true, policy);
    grad_output.load_row(dy, true, policy);
  }
  __device__ __forceinline__ void load_ahead(
      const Input* x, const Output<Input, Scale>* dy, bool wanted, L2Policy policy) {
    input.load_row_ahead(x, wanted, policy);
    grad_output.load_row_ahead(dy, wanted, policy);
  }

  __device__ __forceinline__ void stay_packed() {
    input.stay_packed();
    grad_output.stay_packed();
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

  // Adds to the sums of grad_scale, and writes the gradient of the input, unless that is nullptr;
  // with kAdds it is the gradient plus what is `added`.
  template <bool kAdds>
  __device__ __forceinline__ void write_gradients(
      const RowStatistics<Number>& row, const Pack<Scale, N>& scale, const Pack<Input, N>& added,
      Number (&grad_scale)[N], Input* grad_input) const {
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
        const Number n = x[e] * row.rstd;
        grad_scale[e] = fma(dy[e], n, grad_scale[e]);
        x[e] = fma(fma(-row.mean_product, n, dy[e] * w[e]), row.rstd, more[e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const Number n = x[e] * row.rstd;
        grad_scale[e] = fma(dy[e], n, grad_scale[e]);
        x[e] = fma(-row.mean_product, n, dy[e] * w[e]) * row.rstd;
      }
    }
    if (!grad_input) return;
    Pack<Input, N> result;
    result.pack(x);
    result.store(grad_input);
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
    result.store(static_cast<Scale*>(args.grad_scale) + group * args.dim + column);
  } else {
    Pack<Number, N> result;
    result.pack(sums);
    result.store(
        static_cast<Number*>(args.partial) + (group * args.parts + part) * args.dim + column);
  }
}

// How the kernels that read rows once use a multiprocessor.
template <class Input, class Scale, int N, class W, bool kAdds>
struct BackwardResources {
  // What a thread holds in 32-bit registers: its part of a row (of two, where they wait there), of
  // the scale, sums of grad_scale.
  static constexpr int kRow =
      N == 1 ? 4 * W::kAccesses : W::kAccesses * int(sizeof(BackwardAccess<Input, Scale, N>)) / 4;
  static constexpr int kScale = W::kAccesses * int(sizeof(Pack<Scale, N>)) / 4;
  static constexpr int kSums = W::kAccesses * N;

  // Where it does not fit, the scale is read anew for each row, from the L1 cache. Clusters do not
  // hold the row; their rows in shared memory leave little of that cache.
  static constexpr bool kKeepsScale = W::kCluster > 1 || kRow + kScale + kSums <= 48;

  // Threads that the registers of a multiprocessor have room for.
  static constexpr int kHeld = kRow + kSums + (kKeepsScale ? kScale : 0);
  static constexpr int kThreads = kHeld <= 16 ? 1024 : kHeld <= 32 ? 768 : 512;
  static constexpr int kBlocks = kThreads / W::kBlock;

  // The accesses of the rows under way lie in shared memory, in units of 16 bytes of which each
  // thread has one. Rows that are read element by element wait in registers, one ahead.
  static constexpr bool kInSharedMemory = N > 1;
  static constexpr int kInputUnits = Pack<Input, N>::kUnits;
  static constexpr int kGradUnits = Pack<Output<Input, Scale>, N>::kUnits;
  static constexpr bool kAddedInSharedMemory = kAdds && W::kCluster == 1;
  static constexpr int kAccessUnits =
      kInputUnits + kGradUnits + (kAddedInSharedMemory ? kInputUnits : 0);
  static constexpr int kStageBytes =
      W::kBlock * (int(sizeof(int64_t)) + (kInSharedMemory ? W::kAccesses * kAccessUnits * 16 : 0));

  // In the end, the sums of the rows that lie side by side in the block take their place, those of
  // a warp as one.
  static constexpr int kSlots = W::kBlock / (W::kRowThreads < kWarp ? kWarp : W::kRowThreads);
  static constexpr int kRowElements = int(W::kRowAccesses) * N;
  static constexpr int kSlotBytes =
      W::kBlockRows > 1 ? kSlots * kRowElements * int(sizeof(float)) : 0;

  static constexpr int kSumBuffer = kRowSumBuffer<W::kBlock, W::kRowThreads, W::kCluster, 2>;
  static constexpr int kSumBytes = int(round_up_16(2 * kSumBuffer * sizeof(float)));

  static constexpr int shared_bytes(int stages) {
    const int bytes = stages * kStageBytes;
    return kSumBytes + (bytes > kSlotBytes ? bytes : kSlotBytes);
  }
};

// What a thread of those kernels has to do with the rows of its group.
template <class Input, class Scale, int N, class W, bool kAdds>
class BackwardThread {
 public:
  using Resources = BackwardResources<Input, Scale, N, W, kAdds>;
  using Access = BackwardAccess<Input, Scale, N>;
  static constexpr int kAccesses = W::kAccesses;
  static constexpr int kStep = W::kCluster * W::kRowThreads * N;  // from one access to the next

  // `shared` is where the rows under way lie.
  __device__ __forceinline__
  BackwardThread(const BackwardArgs<kAdds>& args, unsigned char* shared, int rank)
      : args_(args),
        group_(blockIdx.x / W::kCluster / unsigned(args.parts)),
        places_(
            reinterpret_cast<Word16*>(shared + args.stages * W::kBlock * sizeof(int64_t)) +
            threadIdx.x),
        offsets_(reinterpret_cast<int64_t*>(shared) + threadIdx.x),
        rank_(rank) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if constexpr (Resources::kKeepsScale) scale_[i] = load_scale(i);
#pragma unroll
      for (int e = 0; e < N; ++e) grad_scale_[i][e] = 0;
    }
  }

  __device__ __forceinline__ int column(int i) const { return i * kStep + first_column(); }
  __device__ __forceinline__ bool has(int i) const { return column(i) < int(args_.dim); }

  // Takes row k of the group under way, for the first time in this stage. Zeros, which add nothing,
  // stand for what there is not.
  __device__ __forceinline__ void start(int stage, int64_t k) {
    if constexpr (Resources::kInSharedMemory) {
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
        if (k < args_.rows_of_group && has(i)) continue;
#pragma unroll
        for (int unit = 0; unit < Resources::kAccessUnits; ++unit) {
          place(stage, i)[unit * W::kBlock] = Word16{{0, 0, 0, 0}};
        }
      }
    }
    fetch(stage, k);
    fetch_added(stage, k);
    commit();
  }
  __device__ __forceinline__ static void commit() {
    if constexpr (Resources::kInSharedMemory) copy_async_commit();
  }
  // Until all stages but the last `pending` have arrived.
  template <int pending>
  __device__ __forceinline__ static void wait() {
    if constexpr (Resources::kInSharedMemory) copy_async_wait<pending>();
  }

  __device__ __forceinline__ void fetch(int stage, int64_t k) {
    if (k >= args_.rows_of_group) return;
    int64_t offset[3];
    args_.layout.find_in_group(group_, k, offset);
    offsets_[stage * W::kBlock] = offset[2];
    const auto* dy =
        static_cast<const Output<Input, Scale>*>(args_.grad_output) + offset[0] + first_column();
    const Input* x = static_cast<const Input*>(args_.input) + offset[1] + first_column();
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if constexpr (!Resources::kInSharedMemory) {
        next_[i].load_ahead(x + i * kStep, dy + i * kStep, has(i), policy());
      } else if (has(i)) {
        Pack<Input, N>::template copy_async<W::kBlock>(place(stage, i), x + i * kStep, policy());
        Pack<Output<Input, Scale>, N>::template copy_async<W::kBlock>(
            place(stage, i) + kGradPlace, dy + i * kStep, policy());
      }
    }
  }

  // What is added to the gradient is needed after the rest of its row.
  __device__ __forceinline__ void fetch_added(int stage, int64_t k) {
    if constexpr (Resources::kAddedInSharedMemory) {
      if (k >= args_.rows_of_group) return;
      const Input* more = added_to(k);
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
        if (!has(i)) continue;
        Pack<Input, N>::template copy_async<W::kBlock>(
            place(stage, i) + kAddedPlace, more + i * kStep, policy());
      }
    }
  }
  __device__ __forceinline__ Pack<Input, N> added(int stage, int i) const {
    Pack<Input, N> added;
    if constexpr (Resources::kAddedInSharedMemory) {
      added.template load_shared<W::kBlock>(place(stage, i) + kAddedPlace);
    }
    return added;
  }
  // The same where there is no room for it in shared memory.
  __device__ __forceinline__ void load_added(int64_t k, Pack<Input, N> (&added)[kAccesses]) const {
    if constexpr (kAdds) {
      const Input* more = added_to(k);
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) added[i].load_row(more + i * kStep, has(i), policy());
    }
  }

  // An access of the row that has arrived in a stage.
  __device__ __forceinline__ Access access(int stage, int i) const {
    if constexpr (Resources::kInSharedMemory) {
      Access access;
      access.input.template load_shared<W::kBlock>(place(stage, i));
      access.grad_output.template load_shared<W::kBlock>(place(stage, i) + kGradPlace);
      return access;
    } else {
      return next_[i];
    }
  }

  __device__ __forceinline__ Pack<Scale, N> scale(int i) const {
    if constexpr (Resources::kKeepsScale) {
      return scale_[i];
    } else {
      return load_scale(i);
    }
  }

  // Where the gradient of the row goes that is in a stage, from this thread's first column on.
  __device__ __forceinline__ Input* grad_input(int stage) const {
    return static_cast<Input*>(args_.grad_input) + offsets_[stage * W::kBlock] + first_column();
  }

  __device__ __forceinline__ void write_gradients(
      const Access& access, int i, const RowStatistics<float>& row, const Pack<Input, N>& added,
      Input* grad_input) {
    access.template write_gradients<kAdds>(
        row, scale(i), added, grad_scale_[i],
        args_.grad_input && has(i) ? grad_input + i * kStep : nullptr);
  }

  // Writes the thread's sums of grad_scale where no other thread of the block has the same columns.
  __device__ __forceinline__ void write_grad_scale(int64_t part) const {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (has(i)) {
        coreai_torch::write_grad_scale<Scale>(args_, group_, part, column(i), grad_scale_[i]);
      }
    }
  }

  // Adds up the rows that lie side by side in the block, those of a warp first; then writes.
  __device__ __forceinline__ void write_grad_scale_of_rows(int64_t part, float* slots) {
    constexpr int threads = W::kRowThreads;
#pragma unroll
    for (int offset = threads; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          grad_scale_[i][e] += __shfl_xor_sync(0xffffffffu, grad_scale_[i][e], offset);
        }
      }
    }
    const int slot = threadIdx.x / (threads < kWarp ? kWarp : threads);
    __syncthreads();  // the last rows have been read
    if (threads >= kWarp || threadIdx.x % kWarp < threads) {
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          slots[slot * Resources::kRowElements + column(i) + e] = grad_scale_[i][e];
        }
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < int(args_.dim); c += W::kBlock) {
      float sum[1] = {0};
#pragma unroll
      for (int i = 0; i < Resources::kSlots; ++i) {
        sum[0] += slots[i * Resources::kRowElements + c];
      }
      coreai_torch::write_grad_scale<Scale>(args_, group_, part, c, sum);
    }
  }

 private:
  // Of the row's threads in this block.
  static __device__ __forceinline__ int lane() {
    return W::kBlockRows == 1 ? threadIdx.x : threadIdx.x % W::kRowThreads;
  }
  // Of this thread. Made anew where it is needed: it would take a register.
  __device__ __forceinline__ int first_column() const {
    return ((W::kCluster > 1 ? rank_ * W::kRowThreads : 0) + lane()) * N;
  }

  __device__ __forceinline__ L2Policy policy() const { return l2_policy(args_.evict_last); }

  static constexpr int kGradPlace = Resources::kInputUnits * W::kBlock;
  static constexpr int kAddedPlace = kGradPlace + Resources::kGradUnits * W::kBlock;

  // From this thread's first column on.
  __device__ __forceinline__ const Input* added_to(int64_t k) const {
    int64_t offset[1];
    args_.layout.find_in_group(group_, k, offset, 3);
    return static_cast<const Input*>(args_.grad_new_residual) + offset[0] + first_column();
  }
  __device__ __forceinline__ Word16* place(int stage, int i) const {
    return places_ + (stage * kAccesses + i) * Resources::kAccessUnits * W::kBlock;
  }
  __device__ __forceinline__ Pack<Scale, N> load_scale(int i) const {
    Pack<Scale, N> pack;
    const Scale* scale =
        static_cast<const Scale*>(args_.scale) + group_ * args_.dim + first_column();
    pack.load_cached(scale + i * kStep, has(i));
    return pack;
  }

  const BackwardArgs<kAdds>& args_;
  const int64_t group_;
  Word16* const places_;
  int64_t* const offsets_;  // of the gradients of the rows under way
  const int rank_;          // of the block in its cluster
  Pack<Scale, N> scale_[Resources::kKeepsScale ? kAccesses : 1];
  Access next_[Resources::kInSharedMemory ? 1 : kAccesses];
  float grad_scale_[kAccesses][N];
};

// A block visits every `parts`-th batch of the rows of its group. A row is read once; the next ones
// are under way while it is worked on.
template <class Input, class Scale, int N, class W, bool kAdds>
__global__ void __launch_bounds__(W::kBlock, BackwardResources<Input, Scale, N, W, kAdds>::kBlocks)
    rms_norm_backward_rows(const __grid_constant__ BackwardArgs<kAdds> args) {
  using Resources = BackwardResources<Input, Scale, N, W, kAdds>;
  COREAI_TORCH_SHARED_MEMORY(shared);
  float* const buffer = reinterpret_cast<float*>(shared);
  BackwardThread<Input, Scale, N, W, kAdds> mine(args, shared + Resources::kSumBytes, 0);
  const int64_t part = blockIdx.x % unsigned(args.parts);
  const int64_t rows = args.rows_of_group;
  const int64_t step = args.parts * W::kBlockRows;
  const int sub = W::kBlockRows == 1 ? 0 : threadIdx.x / W::kRowThreads;
#pragma unroll 1
  for (int stage = 0; stage < args.stages; ++stage) {
    mine.start(stage, part * W::kBlockRows + sub + stage * step);
  }
  let_next_launch_start();

  float* row_buffer = buffer;
  int stage = 0;
#pragma unroll 1
  for (int64_t first = part * W::kBlockRows; first < rows; first += step) {
    const int64_t k = first + sub;
    if (args.stages == 2) {
      mine.template wait<1>();
    } else {
      mine.template wait<0>();
    }
    BackwardAccess<Input, Scale, N> now[W::kAccesses];
#pragma unroll
    for (int i = 0; i < W::kAccesses; ++i) now[i] = mine.access(stage, i);
    Input* const grad_input = k < rows ? mine.grad_input(stage) : nullptr;
    if constexpr (!Resources::kInSharedMemory) mine.fetch(stage, k + step);
    float sums[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < W::kAccesses; ++i) now[i].add_to(sums, mine.scale(i));
    // Into the place of this row, which has been read by now.
    if constexpr (Resources::kInSharedMemory) mine.fetch(stage, k + args.stages * step);
    row_sum<W::kRowThreads, 1>(sums, row_buffer);
    row_buffer = row_buffer == buffer ? buffer + Resources::kSumBuffer : buffer;
    if (k < rows) {
      const RowStatistics<float> statistics = statistics_of(sums, args.mean);
#pragma unroll
      for (int i = 0; i < W::kAccesses; ++i) {
        if constexpr (W::kAccesses > 2) now[i].stay_packed();
        mine.write_gradients(now[i], i, statistics, mine.added(stage, i), grad_input);
      }
    }
    mine.fetch_added(stage, k + args.stages * step);
    mine.commit();
    stage = stage + 1 == args.stages ? 0 : stage + 1;
  }
  if (!args.grad_scale) return;
  if constexpr (W::kBlockRows == 1) {
    mine.write_grad_scale(part);
  } else {
    mine.write_grad_scale_of_rows(part, reinterpret_cast<float*>(shared + Resources::kSumBytes));
  }
}

// The same for rows that a cluster of blocks shares. A row's sums go around the cluster while the
// gradients of the row before it are written, so that nobody waits for the barrier.
constexpr int kClusterStages = 3;  // the row before, this one, the next

template <class Input, class Scale, int N, class W, bool kAdds>
__global__ void __launch_bounds__(W::kBlock, 1)
    rms_norm_backward_clusters(const __grid_constant__ BackwardArgs<kAdds> args) {
  if constexpr (kHasClusters) {
    using Resources = BackwardResources<Input, Scale, N, W, kAdds>;
    COREAI_TORCH_SHARED_MEMORY(shared);
    float* const buffer = reinterpret_cast<float*>(shared);
    BackwardThread<Input, Scale, N, W, kAdds> mine(
        args, shared + Resources::kSumBytes, int(cluster_rank()));
    const int64_t part = blockIdx.x / W::kCluster % unsigned(args.parts);
#pragma unroll 1
    for (int stage = 0; stage < kClusterStages; ++stage) {
      mine.start(stage, part + stage * args.parts);
    }
    let_next_launch_start();
    cluster_sync();  // the other blocks have started

    RowStatistics<float> statistics = {};
    int turn = 0;
    int stage = 0;
    int stage_before = kClusterStages - 1;
#pragma unroll 1
    for (int64_t k = part;; k += args.parts) {
      const bool live = k < args.rows_of_group;
      float sums[2] = {0, 0};
      float* const row_buffer = buffer + turn * Resources::kSumBuffer;
      Pack<Input, N> added[W::kAccesses];
      if (k > part) mine.load_added(k - args.parts, added);
      if (live) {
        mine.template wait<1>();
#pragma unroll
        for (int i = 0; i < W::kAccesses; ++i) {
          mine.access(stage, i).add_to(sums, mine.scale(i));
        }
        send_sums<W::kRowThreads, W::kCluster>(sums, row_buffer);
        cluster_arrive();
      }
      if (k > part) {
        Input* const grad_input = mine.grad_input(stage_before);
#pragma unroll
        for (int i = 0; i < W::kAccesses; ++i) {
          mine.write_gradients(mine.access(stage_before, i), i, statistics, added[i], grad_input);
        }
        mine.fetch(stage_before, k + (kClusterStages - 1) * args.parts);
        mine.commit();
      }
      if (!live) break;
      cluster_wait();
      add_received<W::kRowThreads, W::kCluster>(sums, row_buffer);
      statistics = statistics_of(sums, args.mean);
      turn ^= 1;
      stage_before = stage;
      stage = stage + 1 == kClusterStages ? 0 : stage + 1;
    }
    if (args.grad_scale) mine.write_grad_scale(part);
  }
}

// Any width, first half: the statistics of every row, one block a row.
constexpr int kStatisticsBlock = 512;

template <class Input, class Scale, int N>
__global__ void __launch_bounds__(kStatisticsBlock, 2)
    rms_norm_backward_statistics(const __grid_constant__ BackwardArgs<false> args) {
  using Number = Accumulate<Input>;
  COREAI_TORCH_SHARED_MEMORY(shared);
  Number* buffer = reinterpret_cast<Number*>(shared);
  const L2Policy policy = l2_policy(args.evict_last);
  int turn = 0;
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < args.layout.rows; row += gridDim.x) {
    int64_t offset[3], group;
    args.layout.find(row, offset, group);
    const auto* dy = static_cast<const Output<Input, Scale>*>(args.grad_output) + offset[0];
    const Input* x = static_cast<const Input*>(args.input) + offset[1];
    const Scale* scale = static_cast<const Scale*>(args.scale) + group * args.dim;
    Number sums[2] = {0, 0};
#pragma unroll 2
    for (int64_t c = threadIdx.x * N; c < args.dim; c += int64_t(kStatisticsBlock) * N) {
      BackwardAccess<Input, Scale, N> access;
      Pack<Scale, N> w;
      access.load(x + c, dy + c, policy);
      w.load_cached(scale + c, true);
      access.add_to(sums, w);
    }
    row_sum<kStatisticsBlock, 1>(
        sums, buffer + turn * kRowSumBuffer<kStatisticsBlock, kStatisticsBlock, 1, 2>);
    turn ^= 1;
    if (threadIdx.x == 0) {
      static_cast<RowStatistics<Number>*>(args.statistics)[row] = statistics_of(sums, args.mean);
    }
  }
}

// Any width, second half: a block visits every `parts`-th row of its group, in a slab of columns of
// which each thread has one access.
constexpr int kColumnsBlock = 256;
template <bool kAdds>
constexpr int kColumnsBatch = kAdds ? 3 : 4;  // rows under way at once

template <class Input, class Scale, int N, bool kAdds>
__global__ void __launch_bounds__(kColumnsBlock, 2)
    rms_norm_backward_columns(const __grid_constant__ BackwardArgs<kAdds> args) {
  using Number = Accumulate<Input>;
  constexpr int64_t slab = int64_t(kColumnsBlock) * N;
  const int64_t slabs = (args.dim + slab - 1) / slab;
  const int64_t group = blockIdx.x / slabs / args.parts;
  const int64_t part = blockIdx.x / slabs % args.parts;
  const int64_t column = blockIdx.x % slabs * slab + threadIdx.x * N;
  if (column >= args.dim) return;

  const L2Policy policy = l2_policy(args.evict_last);
  Pack<Scale, N> w;
  w.load_cached(static_cast<const Scale*>(args.scale) + group * args.dim + column, true);
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
      int64_t offset[kAdds ? 4 : 3];
      const int64_t row = args.layout.find_in_group(group, k, offset);
      access[i].load(
          static_cast<const Input*>(args.input) + offset[1] + column,
          static_cast<const Output<Input, Scale>*>(args.grad_output) + offset[0] + column, policy);
      if constexpr (kAdds) {
        added[i].load_row(
            static_cast<const Input*>(args.grad_new_residual) + offset[3] + column, true, policy);
      }
      grad_input[i] = offset[2] + column;
      of_row[i] = statistics[row];
    }
    Number batch[N] = {};
#pragma unroll
    for (int i = 0; i < kColumnsBatch<kAdds>; ++i) {
      if (first + i * args.parts >= rows) break;
      access[i].template write_gradients<kAdds>(
          of_row[i], w, added[i], batch,
          args.grad_input ? static_cast<Input*>(args.grad_input) + grad_input[i] : nullptr);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) grad_scale[e] += batch[e];
  }
  if (args.grad_scale) write_grad_scale<Scale>(args, group, part, column, grad_scale);
}

// Second stage: grad_scale[group][column] = sum over the parts. `lanes` threads of a block take N
// adjacent columns each; the others walk down the parts, of which narrow rows have many.
template <int block, int lanes, int N>
struct SumShape {
  static constexpr int kColumns = lanes * N;
  static constexpr int kWalkers = block / lanes;
  static constexpr int kWarps = block / kWarp;
};

template <class Scale, class Number, int block, int lanes, int N>
__global__ void __launch_bounds__(block)
    rms_norm_backward_sum(const __grid_constant__ BackwardArgs<false> args) {
  using Shape = SumShape<block, lanes, N>;
  COREAI_TORCH_SHARED_MEMORY(shared);
  const int64_t slabs = (args.dim + Shape::kColumns - 1) / Shape::kColumns;
  const int64_t group = blockIdx.x / slabs;
  const int64_t first_column = blockIdx.x % slabs * Shape::kColumns;
  const int64_t column = first_column + threadIdx.x % lanes * N;
  const Number* partial =
      static_cast<const Number*>(args.partial) + group * args.parts * args.dim + column;
  wait_for_last_launch();
  Number sums[N] = {};
  if (column < args.dim) {
#pragma unroll 4
    for (int64_t part = threadIdx.x / lanes; part < args.parts; part += Shape::kWalkers) {
      Pack<Number, N> pack;
      pack.load_stored(partial + part * args.dim);
#pragma unroll
      for (int e = 0; e < N; ++e) sums[e] += pack.elements[e];
    }
  }
  // The walkers that a warp has of each column, then the warps.
#pragma unroll
  for (int offset = lanes; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int e = 0; e < N; ++e) sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], offset);
  }
  Number* buffer = reinterpret_cast<Number*>(shared);
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (lane < lanes) {
#pragma unroll
    for (int e = 0; e < N; ++e) buffer[warp * (Shape::kColumns + 1) + lane * N + e] = sums[e];
  }
  __syncthreads();
#pragma unroll
  for (int c = warp; c < Shape::kColumns; c += Shape::kWarps) {
    Number sum[1] = {lane < Shape::kWarps ? buffer[lane * (Shape::kColumns + 1) + c] : 0};
    add_across_lanes<kWarp>(sum);
    if (lane == 0 && first_column + c < args.dim) {
      Pack<Scale, 1> result;
      result.pack(sum);
      result.store(static_cast<Scale*>(args.grad_scale) + group * args.dim + first_column + c);
    }
  }
}

// ---- host --------------------------------------------------------------------------------------

// How a call is carried out. Call is RmsNormBackward or AddRmsNormBackward.
template <class Call>
struct BackwardPlan {
  int64_t parts;
  int stages;
  bool evict_last;
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
      plan.stages,
      Mean(shape.dim, shape.eps),
      plan.evict_last,
      layout_of(call),
      nullptr};
  if constexpr (kBackwardAdds<Call>) args.grad_new_residual = call.grad_new_residual;
  return args;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many parts as there are to be blocks of a group, but none without rows. A few
// batches of rows take one block less time than a second launch takes.
constexpr int64_t kFewBatches = 2;
inline int64_t parts_of_group(int64_t batches, int64_t wanted) {
  if (batches <= kFewBatches || wanted < 1) return 1;
  return wanted < batches ? wanted : batches;
}

template <class Scale, class Number, int block, int lanes, int N>
cudaError_t sum_partials(const BackwardArgs<false>& args, int device, cudaStream_t stream) {
  using Shape = SumShape<block, lanes, N>;
  const int64_t blocks = args.layout.groups * ceil_divide(args.dim, Shape::kColumns);
  constexpr size_t shared = sizeof(Number) * Shape::kWarps * (Shape::kColumns + 1);
  constexpr auto kernel = rms_norm_backward_sum<Scale, Number, block, lanes, N>;
  const bool early = can_start_early(device, kernel);
  return launch({blocks, block, shared, stream, 1, early}, kernel, args);
}

template <class Resources, class W>
Launch rows_launch(int64_t units, int stages, cudaStream_t stream) {
  const size_t shared = Resources::shared_bytes(stages);
  return {units * W::kCluster, W::kBlock, shared, stream, W::kCluster};
}

template <class Input, class Scale, int N, class W, bool kAdds>
constexpr auto rows_kernel() {
  if constexpr (W::kCluster > 1) {
    return rms_norm_backward_clusters<Input, Scale, N, W, kAdds>;
  } else {
    return rms_norm_backward_rows<Input, Scale, N, W, kAdds>;
  }
}

template <class Input, class Scale, int N, class W, class Call>
cudaError_t run_rows(const Call& call, const BackwardPlan<Call>& plan, int, cudaStream_t stream) {
  constexpr bool kAdds = kBackwardAdds<Call>;
  using Resources = BackwardResources<Input, Scale, N, W, kAdds>;
  return launch(
      rows_launch<Resources, W>(call.shape.groups * plan.parts, plan.stages, stream),
      rows_kernel<Input, Scale, N, W, kAdds>(), backward_args(call, plan));
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
  plan.evict_last = rows_are_evicted_last<Input>(shape, device);
  const bool done = with_width(Candidates{}, ceil_divide(shape.dim, N), [&](auto width) {
    using W = decltype(width);
    using Resources = BackwardResources<Input, Scale, N, W, kAdds>;
    const int shared = shared_memory_of_block(device);
    int64_t resident = processors * Resources::kBlocks;
    if constexpr (W::kCluster > 1) {
      plan.stages = kClusterStages;
      if (Resources::shared_bytes(plan.stages) > shared) return false;
      resident = resident_clusters(
          device, rows_kernel<Input, Scale, N, W, kAdds>(),
          rows_launch<Resources, W>(0, plan.stages, nullptr));
      if (resident == 0) return false;
    } else {
      // Two rows under way, or one where a block of this card has no room for two.
      plan.stages = N > 1 && Resources::shared_bytes(2) <= shared ? 2 : 1;
      if (Resources::shared_bytes(plan.stages) > shared) return false;
    }
    const int64_t batches = ceil_divide(shape.rows / shape.groups, W::kBlockRows);
    plan.parts = parts_of_group(batches, resident / shape.groups);
    // No stages for which a block has no rows.
    const int64_t visits = ceil_divide(batches, plan.parts);
    if (W::kCluster == 1 && visits < plan.stages) plan.stages = int(visits);
    plan.run = run_rows<Input, Scale, N, W, Call>;
    return true;
  });
  if (!done) {
    const int64_t slabs = ceil_divide(shape.dim, int64_t(kColumnsBlock) * N);
    plan.parts = parts_of_group(
        ceil_divide(shape.rows / shape.groups, kColumnsBatch<kAdds>),
        ceil_divide(4 * processors, slabs) / shape.groups);
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
  using Number = Accumulate<Input>;
  const BackwardArgs<false> args = backward_args(static_cast<const RmsNormBackward&>(call), plan);
  if (args.dim <= 512) return sum_partials<Scale, Number, 512, 8, 1>(args, device, stream);
  if (args.dim <= 1024) return sum_partials<Scale, Number, 1024, 8, 1>(args, device, stream);
  if constexpr (kHasRowKernels<Input>) {
    if (args.dim >= 8192 && args.dim % 4 == 0) {
      return sum_partials<Scale, Number, 1024, 32, 4>(args, device, stream);
    }
  }
  if (args.parts <= 64) return sum_partials<Scale, Number, 512, 32, 1>(args, device, stream);
  return sum_partials<Scale, Number, 1024, 32, 1>(args, device, stream);
}

}  // namespace coreai_torch
