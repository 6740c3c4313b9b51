// Sums over the threads that share a row.
#pragma once

#include "device.cuh"

namespace coreai_torch {

constexpr int kWarp = 32;

template <int width, int count, class Number>
__device__ __forceinline__ void add_across_lanes(Number (&sums)[count]) {
#pragma unroll
  for (int offset = width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < count; ++k) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], offset);
  }
}

// Numbers of shared memory that one use of row_sum() takes.
template <int block, int row_threads, int cluster, int count>
constexpr int kRowSumBuffer = row_threads * cluster <= kWarp ? 0 : block / kWarp * cluster * count;

// Adds up `count` numbers over the threads of each warp, and lets every block of the cluster know.
// The buffer must not be in use by then: callers in a loop take two in turn.
template <int row_threads, int cluster, int count, class Number>
__device__ __forceinline__ void send_sums(Number (&sums)[count], Number* buffer) {
  constexpr int row_warps = row_threads / kWarp;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  add_across_lanes<(row_threads < kWarp ? row_threads : kWarp)>(sums);
  if constexpr (cluster > 1) {
    if (lane >= cluster) return;
    const int part = int(cluster_rank()) * row_warps + warp;
#pragma unroll
    for (int k = 0; k < count; ++k) cluster_store(&buffer[part * count + k], lane, sums[k]);
  } else if constexpr (row_warps > 1) {
    if (lane != 0) return;
#pragma unroll
    for (int k = 0; k < count; ++k) buffer[warp * count + k] = sums[k];
  }
}

// After a barrier, of the block or of the cluster: the sums over the whole row. Each warp adds the
// parts up for itself, which spares a second barrier.
template <int row_threads, int cluster, int count, class Number>
__device__ __forceinline__ void add_received(Number (&sums)[count], const Number* buffer) {
  constexpr int row_warps = row_threads / kWarp;
  constexpr int parts = row_warps * cluster;
  const int lane = threadIdx.x % kWarp;
  const Number* const row_buffer =
      cluster > 1 ? buffer : buffer + threadIdx.x / row_threads * (parts * count);
  if constexpr ((parts & (parts - 1)) == 0) {
#pragma unroll
    for (int k = 0; k < count; ++k) sums[k] = row_buffer[lane % parts * count + k];
#pragma unroll
    for (int part = kWarp; part < parts; part += kWarp) {
#pragma unroll
      for (int k = 0; k < count; ++k) sums[k] += row_buffer[(part + lane) * count + k];
    }
    add_across_lanes<(parts < kWarp ? parts : kWarp)>(sums);
  } else {
    static_assert(parts < kWarp, "a lane for each part");
#pragma unroll
    for (int k = 0; k < count; ++k) sums[k] = lane < parts ? row_buffer[lane * count + k] : 0;
    add_across_lanes<kWarp>(sums);
  }
}

// Adds up `count` numbers over the `row_threads` threads that each block of the cluster has on a
// row. Every thread gets the sums, and in the same order of additions. One barrier, of the block or
// of the cluster, before which the buffer must not be in use.
template <int row_threads, int cluster, int count, class Number>
__device__ __forceinline__ void row_sum(Number (&sums)[count], Number* buffer) {
  send_sums<row_threads, cluster>(sums, buffer);
  if constexpr (row_threads * cluster > kWarp) {
    if constexpr (cluster > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
    add_received<row_threads, cluster>(sums, buffer);
  }
}

}  // namespace coreai_torch
