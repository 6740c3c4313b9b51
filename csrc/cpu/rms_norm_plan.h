// How the rows are gone through, and how backward divides them.
#pragma once

#include "coreai_torch/rms_norm.h"

namespace coreai_torch {
namespace {

// Are the rows of an operand one behind the other?
inline bool has_adjacent_rows(const RmsNormShape& shape, const int64_t* strides) {
  return shape.row_ndim == 1 && strides[0] == shape.dim;
}

// Do groups take turns, block by block? So they do where the rows of the next group are nearer than
// the next row of a group: heads of attention, say, where (batch, heads, length, dim) is a
// transposed view. Otherwise all rows of a group come before those of the next. Gives the row
// dimension that counts the groups, or -1.
inline int dim_of_turns(const RmsNormShape& shape, const int64_t* input_strides) {
  const int d = shape.row_ndim - 2;
  const bool is_groups = d >= 0 && shape.groups > 1 && shape.row_sizes[d] == shape.groups &&
                         shape.row_sizes[d + 1] == shape.inner;
  return is_groups && input_strides[d] < input_strides[d + 1] ? d : -1;
}

// How many rows are a unit of work in forward, as it is given to a thread.
inline int64_t rows_in_unit(const RmsNormShape& shape, const int64_t* input_strides) {
  return dim_of_turns(shape, input_strides) < 0 ? 1 : shape.groups;
}

// Division into chunks and tasks follows from the shape alone, never from the number of threads, so
// that grad_scale has the same bits however the work is spread, and whoever's turn it is.
// grad_scale is summed over a block of rows in registers, over the blocks of a chunk in the chunk's
// row of the workspace, and over the chunks of a scale row as a binary tree: chunks 0 and 1, 2 and
// 3, then 0 to 3, and so on. Whoever has both halves of such a sum adds them up, in the row of the
// first chunk, while they are in the thread's own cache; what is left in the end, `reduce` does.
// After its numbers a row of the workspace has the number of chunks that it is the sum of.
struct BackwardPlan {
  int64_t rows_per_group;  // rows that share a scale row
  int block_rows;          // taken at once
  int64_t chunk_rows;      // a multiple of kBlockRows
  int64_t chunks_per_group;
  int64_t tasks;  // one for each chunk of each group; where groups take turns, chunk by chunk
};

constexpr int kBlockRows = 4;
// Four rows of two operands that are so long fill the first cache before they are written, if they
// are not of 16 bits.
constexpr int kFewBlockRows = 2;
constexpr int64_t kFewFromElements = 256;
constexpr int64_t kMaxChunkBlocks = 16;         // keeps sums short
constexpr int64_t kMinChunkElements = 32768;    // worth a task of its own
constexpr int64_t kGoodChunkElements = 262144;  // some 50 us, all that smaller ones could save
constexpr int64_t kGoodChunks = 16;             // enough for the threads of most machines
constexpr int64_t kManyChunks = 64;             // enough for those of nearly all

// Elements from a row of the workspace to the next one: there is room for the number of chunks, and
// threads share no cache lines.
inline int64_t workspace_stride(int64_t dim) { return (dim / 16 + 1) * 16; }

inline BackwardPlan backward_plan(const RmsNormShape& shape) {
  BackwardPlan plan;
  plan.rows_per_group = shape.rows / shape.groups;
  const bool is_16_bit =
      shape.input_dtype == DType::kFloat16 || shape.input_dtype == DType::kBFloat16;
  plan.block_rows = !is_16_bit && shape.dim >= kFewFromElements ? kFewBlockRows : kBlockRows;
  // A row of the workspace is written for every chunk and added to another one, so chunks have many
  // rows where that leaves enough of them.
  int64_t rows = kGoodChunkElements / shape.dim;
  if (rows > plan.rows_per_group / kGoodChunks) rows = plan.rows_per_group / kGoodChunks;
  if (rows < plan.rows_per_group / kManyChunks) rows = plan.rows_per_group / kManyChunks;
  if (rows < kMinChunkElements / shape.dim) rows = kMinChunkElements / shape.dim;
  const int64_t most_rows = kMaxChunkBlocks * plan.block_rows;
  if (rows > most_rows) rows = most_rows;
  plan.chunk_rows = (rows / kBlockRows + (rows % kBlockRows != 0)) * kBlockRows;
  if (plan.chunk_rows == 0) plan.chunk_rows = kBlockRows;
  plan.chunks_per_group = (plan.rows_per_group + plan.chunk_rows - 1) / plan.chunk_rows;
  plan.tasks = plan.chunks_per_group * shape.groups;
  return plan;
}

}  // namespace
}  // namespace coreai_torch
