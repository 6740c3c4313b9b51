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

// Adds up `count` numbers over the `row_threads` threads that each block of the cluster has on a
// row. Every thread gets the sums, and in the same order of additions. One barrier, of the block or
// of the cluster, before which the buffer must not be in use: callers in a loop take two in turn.
template <int row_threads, int cluster, int count, class Number>
__device__ __forceinline__ void row_sum(Number (&sums)[count], Number* buffer) {
  add_across_lanes<(row_threads < kWarp ? row_threads : kWarp)>(sums);
  if constexpr (row_threads * cluster > kWarp) {
    constexpr int row_warps = row_threads / kWarp;
    constexpr int parts = row_warps * cluster;
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    Number* row_buffer = buffer + warp / row_warps * (parts * count);
    if constexpr (cluster == 1) {
      if (lane == 0) {
#pragma unroll
        for (int k = 0; k < count; ++k) row_buffer[warp % row_warps * count + k] = sums[k];
      }
      __syncthreads();
    } else {
      if (lane < cluster) {
        const int part = int(cluster_rank()) * row_warps + warp;
#pragma unroll
        for (int k = 0; k < count; ++k) cluster_store(&row_buffer[part * count + k], lane, sums[k]);
      }
      cluster_sync();
    }
    // Each warp adds the parts up for itself, which spares a second barrier.
#pragma unroll
    for (int k = 0; k < count; ++k) sums[k] = row_buffer[lane % parts * count + k];
#pragma unroll
    for (int part = kWarp; part < parts; part += kWarp) {
#pragma unroll
      for (int k = 0; k < count; ++k) sums[k] += row_buffer[(part + lane) * count + k];
    }
    add_across_lanes<(parts < kWarp ? parts : kWarp)>(sums);
  }
}

}  // namespace coreai_torch
