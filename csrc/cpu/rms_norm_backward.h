// Backward of RMSNorm, and of the residual add and RMSNorm. `backward` is the kernel, after which
// `reduce` adds up the sums for grad_scale that it has left in the workspace.
#pragma once

#include "cpu/rms_norm_rows.h"
#include "cpu/streamed.h"

namespace coreai_torch {
namespace {

inline RowCursor<3> cursor_of(const RmsNormBackward& args) {
  return {args.shape, {args.grad_output_strides, args.input_strides, args.grad_input_strides}};
}
inline RowCursor<4> cursor_of(const AddRmsNormBackward& args) {
  return {
      args.shape,
      {args.grad_output_strides, args.input_strides, args.grad_input_strides,
       args.grad_new_residual_strides}};
}

// Up to kBlockRows rows of backward that share a scale row.
template <class Input, class Scale, class Output>
struct BackwardBlock {
  int rows;
  const Scale* scale;
  Real* grad_scale;  // of the chunk, in the workspace
  bool is_first;     // of the chunk
  const Output* grad_output[kBlockRows];
  const Input* input[kBlockRows];
  Input* grad_input[kBlockRows];
  const Input* grad_new_residual[kBlockRows];  // of the residual add
  // From a row to the one that is asked for, as many rows on as are taken at once.
  int64_t grad_output_ahead, input_ahead, grad_input_ahead, grad_new_residual_ahead;
  Quad rstd;
  Quad mean_dot;  // mean(grad_output * scale * normalized)
};

// The rows of a block, but for the last one of a chunk.
template <class Input>
constexpr int kFullBlockRows = sizeof(Input) == 2 ? kBlockRows : kFewBlockRows;

// Rows that are summed two by two share what they read of the scale. It pays for rows of so few
// steps, and again for long ones, of so many elements, where that is not 0; those between are
// summed one by one, which prefetchers follow. 16-bit rows need registers for it, and conversions
// or memory that are waited for.
constexpr int64_t kFewSteps = 4;
template <bool kStream, class Input>
constexpr bool kNarrowInPairs = kHasManyRegisters && (kStream || kSame<Input, Float16>);
template <bool kStream, class Input>
constexpr int64_t kLongInPairs =
    sizeof(Input) > 2 ? 2048 : (kNarrowInPairs<kStream, Input> ? 512 : 0);

// Fills rstd and mean_dot of a block's rows.
template <bool kGradInput, bool kStream, bool kAskAhead, class Input, class Scale, class Output>
COREAI_TORCH_INLINE void backward_statistics(
    const RowLength& length, double eps, BackwardBlock<Input, Scale, Output>& block) {
  const Scale* const scale = block.scale;
  const int rows = block.rows;
  Vector squares[kQuad], products[kQuad];
  const auto sum = [&](auto group, int first, auto rounds) COREAI_TORCH_INLINE_LAMBDA {
    constexpr int kRows = decltype(group)::value;
    constexpr Rounds kRounds = Rounds(decltype(rounds)::value);
    constexpr int kSums = kGradInput ? 2 * kRows : kRows;
    const Input* input[kRows];
    const Output* grad_output[kRows];
    for (int r = 0; r < kRows; ++r) {
      input[r] = block.input[first + r];
      grad_output[r] = block.grad_output[first + r];
    }
    const int64_t ahead = block.grad_output_ahead;
    Vector lanes[kSums];
    Nothing nothing;
    row_sums<ByHalves, kSums, kRounds>(
        length,
        [=](auto part, int64_t i, Pair* terms, Nothing&) COREAI_TORCH_INLINE_LAMBDA {
          Pair w;
          if constexpr (kGradInput) w = part.load_from(scale + i);
          unrolled<kRows>([&](auto r) COREAI_TORCH_INLINE_LAMBDA {
            const Pair x = part.load_from(input[r] + i);
            terms[r] = x * x;
            if constexpr (kAskAhead) prefetch<kSecondCache>(grad_output[r] + ahead + i);
            if constexpr (kGradInput) {
              terms[kRows + r] = part.load_from(grad_output[r] + i) * w * x;
            }
          });
        },
        lanes, nullptr, nothing);
    for (int r = 0; r < kRows; ++r) {
      squares[first + r] = lanes[r];
      if constexpr (kGradInput) products[first + r] = lanes[kRows + r];
    }
  };
  constexpr Constant<int(Rounds::kAny)> kAny;
  // Rows without whole rounds have a loop of their own, which is free of what rounds take. Levels
  // of few registers have a function for rounds instead.
  constexpr Constant<int(kHasManyRegisters ? Rounds::kNone : Rounds::kAny)> kShort;
  if (rows == kBlockRows && length.steps < kFewSteps) {
    sum(Constant<2>(), 0, kShort);
    sum(Constant<2>(), 2, kShort);
  } else {
    constexpr int64_t kLong = kLongInPairs<kStream, Input>;
    if (kLong != 0 && length.dim >= kLong && rows == kFullBlockRows<Input>) {
      unrolled<kFullBlockRows<Input> / 2>(
          [&](auto r) COREAI_TORCH_INLINE_LAMBDA { sum(Constant<2>(), 2 * r, kAny); });
    } else if (kHasManyRegisters && length.has_rounds()) {
      for (int r = 0; r < rows; ++r) sum(Constant<1>(), r, kAny);
    } else {
      for (int r = 0; r < rows; ++r) sum(Constant<1>(), r, kShort);
    }
    for (int r = rows; r < kQuad; ++r) {
      squares[r] = squares[0];
      products[r] = products[0];
    }
  }
  block.rstd = rstd_of(ByHalves::finish(squares), length, eps);
  if constexpr (kGradInput) {
    block.mean_dot = length.mean(ByHalves::finish(products) * block.rstd);
  }
}

// Writes the gradients of a block of kRows rows, or of any number of them where that is 0. With
// kAdds, grad_new_residual is added to grad_input.
template <
    int kRows, bool kAdds, bool kGradInput, bool kGradScale, Stores kStores, bool kAskAhead,
    bool kAskForPlace, class Input, class Scale, class Output>
inline void backward_rows(int64_t dim, const BackwardBlock<Input, Scale, Output>& block) {
  const Scale* const scale = block.scale;
  Real* const grad_scale = block.grad_scale;
  const int rows = kRows != 0 ? kRows : block.rows;
  const Input* input[kBlockRows];
  const Output* grad_output[kBlockRows];
  RowWriter<kStores, Input> writer[kBlockRows];
  Pair rstd[kBlockRows], mean_dot[kBlockRows];
  for (int r = 0; r < rows; ++r) {
    input[r] = block.input[r];
    grad_output[r] = block.grad_output[r];
    if constexpr (kGradInput) writer[r] = {block.grad_input[r]};
    rstd[r] = splat(block.rstd[r]);
    if constexpr (kGradInput) mean_dot[r] = splat(block.mean_dot[r]);
  }
  for_each_pair(0, dim, [&](auto part, int64_t i) {
    Pair w, sum, grad_input[kBlockRows];
    if constexpr (kGradInput) w = part.load_from(scale + i);
    for (int r = 0; r < rows; ++r) {
      const Pair normalized = part.load_from(input[r] + i) * rstd[r];
      const Pair grad = part.load_from(grad_output[r] + i);
      if constexpr (kGradInput) {
        grad_input[r] = (grad * w - normalized * mean_dot[r]) * rstd[r];
        if constexpr (kAdds) {
          grad_input[r] = grad_input[r] + part.load_from(block.grad_new_residual[r] + i);
        }
      }
      if constexpr (kGradScale) {
        const Pair term = grad * normalized;
        sum = r == 0 ? term : sum + term;
      }
      if constexpr (kAskAhead) prefetch<kSecondCache>(input[r] + block.input_ahead + i);
      if constexpr (kAskForPlace) {
        prefetch_to_write(block.grad_input[r] + block.grad_input_ahead + i);
      }
      if constexpr (kAdds) {
        prefetch<kSecondCache>(block.grad_new_residual[r] + block.grad_new_residual_ahead + i);
      }
    }
    if constexpr (kGradScale) {
      if (!block.is_first) sum = part.load_from(grad_scale + i) + sum;
      part.store_to(grad_scale + i, sum);
    }
    // Only now: rows are often a multiple of 4096 bytes apart, and a processor takes a load for
    // dependent on an earlier store whose address has the same last 12 bits.
    if constexpr (kGradInput) {
      for (int r = 0; r < rows; ++r) {
        writer[r].write(part, i, PairOf<Input, Scale>{grad_input[r]});
      }
    }
  });
}

// The same for a whole block of float32 rows of known length that follow each other. These go one
// after the other, which prefetchers foresee, with sums of grad_scale that are short enough to stay
// in the first cache.
template <int kDim, class Input, class Scale, class Output>
inline void backward_short_rows(const BackwardBlock<Input, Scale, Output>& block) {
  static_assert(kDim % Pair::kLanes == 0, "no part of a Pair is left");
  Real sums[kDim];
  unrolled<kBlockRows>([&](auto row) COREAI_TORCH_INLINE_LAMBDA {
    constexpr int r = decltype(row)::value;
    const Input* const input = block.input[r];
    const Output* const grad_output = block.grad_output[r];
    Input* const grad_input = block.grad_input[r];
    const Pair rstd = splat(block.rstd[r]), mean_dot = splat(block.mean_dot[r]);
    for (int i = 0; i < kDim; i += Pair::kLanes) {
      const Pair normalized = load(input + i) * rstd;
      const Pair grad = load(grad_output + i);
      Pair sum = grad * normalized;
      if constexpr (r > 0) sum = load(sums + i) + sum;
      if constexpr (r + 1 < kBlockRows) {
        store(sums + i, sum);
      } else {
        if (!block.is_first) sum = load(block.grad_scale + i) + sum;
        store(block.grad_scale + i, sum);
      }
      store(grad_input + i, (grad * load(block.scale + i) - normalized * mean_dot) * rstd);
    }
  });
}

// What of the next block is asked for: the gradients while one is summed and the rest while it is
// written, so that memory is at work while conversions are.
struct AskedFor {
  bool rows;   // of the gradients and the input
  bool place;  // of the input's gradients
};

// Rows are asked for in 16 bits where they have 1 KiB, in float32 where they have more than 2 KiB,
// or 2 KiB and are streamed; prefetchers do as well with shorter ones, as long as these do not wait
// for their place, too. Other rows need that only where they are scattered, and ask for what is
// there, which costs little, but for short float32 rows: those of known length are not asked for
// unless they are scattered. Those of grad_new_residual, which are not read while a block is
// summed, always are in float32.
template <bool kStream, bool kMayAskForPlace, class Input>
inline AskedFor asked_for(const RmsNormShape& shape) {
  constexpr bool kNarrow = sizeof(Input) == 2;
  constexpr int64_t kLongRow = kNarrow ? 129 : kFewFromElements;  // elements
  constexpr int64_t kLongerRow = kNarrow || kStream ? 512 : 513;
  const int64_t row_bytes = shape.dim * int64_t(sizeof(Input));
  if (2 * kFullBlockRows<Input> * row_bytes > kMostAhead<kStream>) return {false, false};
  const bool place =
      kMayAskForPlace && shape.dim >= kLongRow && shape.rows * row_bytes >= kColdPlace<Input>;
  return {place || shape.dim >= kLongerRow, place};
}

// Short rows wait for their sums and 1/rms longer than they take to sum, so that two blocks of them
// are summed before either is written: the same rows of two groups where these take turns, else two
// blocks of contiguous rows. The first cache would not have lines for twice as many rows far apart.
// Beyond the caches, where memory is waited for, nothing is gained; float32, without conversions,
// waits for it earlier. Nor is anything gained in float32 but for rows of known length, nor where
// vectors are short but for the shortest.
constexpr int64_t kShortRow = sizeof(Pair) == 128 ? 256 : 64;  // elements
template <bool kStream, int kDim, class Input>
constexpr bool kMayTakeTwo = !kStream && (sizeof(Input) == 2 || kDim != 0);
template <class Input>
constexpr int64_t kMostBytesOfTwo = sizeof(Input) == 2 ? kBeyondCaches : kBeyondCaches / 2;

// Adds the sum of a group's `chunk` to those of the chunks [from, chunk) before it, as far as the
// tree of all sums has them together, see BackwardPlan.
inline void add_to_tree(Real* sums, int64_t dim, int64_t from, int64_t chunk) {
  const int64_t stride = workspace_stride(dim);
  int64_t count = 1;  // of chunks, in the sum that is complete with this one
  while ((chunk & count) != 0 && chunk + 1 - 2 * count >= from) count *= 2;
  const int64_t first = chunk + 1 - count;
  if (count > 1) {
    for_each_pair(0, dim, [&](auto part, int64_t i) {
      Pair sum = part.load_from(sums + chunk * stride + i);
      for (int64_t half = 1; half < count; half *= 2) {
        sum = part.load_from(sums + (chunk + 1 - 2 * half) * stride + i) + sum;
      }
      part.store_to(sums + first * stride + i, sum);
    });
  }
  sums[first * stride + dim] = Real(count);
}

// Rows of up to so many elements can be taken in turn.
constexpr int64_t kMostInTurn = 384;

// Should the rows of all operands be taken in turn, each summed and written before the next one is
// touched? Prefetchers foresee that where rows follow each other, and it takes few instructions. It
// pays for float32 rows that come from memory; for all but the shortest in the caches, too, but not
// where these would ask for their place.
template <bool kStream, class Input, class Args>
bool goes_in_turn(const Args& args) {
  const RmsNormShape& shape = args.shape;
  bool are_adjacent = has_adjacent_rows(shape, args.grad_output_strides) &&
                      has_adjacent_rows(shape, args.input_strides) &&
                      has_adjacent_rows(shape, args.grad_input_strides);
  if constexpr (kSame<Args, AddRmsNormBackward>) {
    are_adjacent = are_adjacent && has_adjacent_rows(shape, args.grad_new_residual_strides);
  }
  const int64_t bytes = shape.rows * shape.dim * int64_t(sizeof(Input));
  const bool pays = kStream || (shape.dim < kFewFromElements ? bytes >= kMostBytesOfTwo<Input>
                                                             : bytes < kColdPlace<Input>);
  return are_adjacent && shape.groups == 1 && shape.dim <= kMostInTurn && pays;
}

// Rows [begin, end) of that kind, which are a chunk. The sums of grad_scale over a block of them
// stay in the first cache.
template <Stores kStores, class Input, class Scale, class Args>
inline void backward_chunk_in_turn(
    const Args& args, const RowLength& length, int64_t begin, int64_t end, int block_rows,
    Real* grad_scale) {
  constexpr bool kAdds = kSame<Args, AddRmsNormBackward>;
  constexpr Rounds kShort = kHasManyRegisters ? Rounds::kNone : Rounds::kAny;
  using Output = typename DTypeRule<Input, Scale>::Output;
  const int64_t dim = length.dim;
  const Scale* const scale = (const Scale*)args.scale;
  Real sums[kMostInTurn];
  int in_block = 0;
  bool is_first_block = true;
  for (int64_t row = begin; row < end; ++row) {
    const Output* const grad_output = (const Output*)args.grad_output + row * dim;
    const Input* const input = (const Input*)args.input + row * dim;
    Vector lanes[2];
    Nothing nothing;
    row_sums<ByHalves, 2, kShort>(
        length,
        [=](auto part, int64_t i, Pair* terms, Nothing&) COREAI_TORCH_INLINE_LAMBDA {
          const Pair x = part.load_from(input + i);
          terms[0] = x * x;
          terms[1] = part.load_from(grad_output + i) * part.load_from(scale + i) * x;
        },
        lanes, nullptr, nothing);
    const Real row_rstd = rstd_of(ByHalves::finish(lanes[0]), length, args.shape.eps);
    const Pair rstd = splat(row_rstd);
    const Pair mean_dot = splat(length.mean(ByHalves::finish(lanes[1]) * row_rstd));
    const Input* grad_new_residual = nullptr;
    if constexpr (kAdds) grad_new_residual = (const Input*)args.grad_new_residual + row * dim;
    RowWriter<kStores, Input> writer{(Input*)args.grad_input + row * dim};
    const auto write = [&](auto is_first, auto is_last) COREAI_TORCH_INLINE_LAMBDA {
      for_each_pair(0, dim, [&](auto part, int64_t i) COREAI_TORCH_INLINE_LAMBDA {
        const Pair normalized = part.load_from(input + i) * rstd;
        const Pair grad = part.load_from(grad_output + i);
        const Pair w = part.load_from(scale + i);
        Pair grad_input = (grad * w - normalized * mean_dot) * rstd;
        if constexpr (kAdds) grad_input = grad_input + part.load_from(grad_new_residual + i);
        Pair sum = grad * normalized;
        if constexpr (!decltype(is_first)::value) sum = load(sums + i) + sum;
        if constexpr (!decltype(is_last)::value) {
          store(sums + i, sum);
        } else {
          if (!is_first_block) sum = part.load_from(grad_scale + i) + sum;
          part.store_to(grad_scale + i, sum);
        }
        writer.write(part, i, PairOf<Input, Scale>{grad_input});
      });
    };
    constexpr Constant<true> kYes;
    constexpr Constant<false> kNo;
    const bool is_last = in_block + 1 == block_rows || row + 1 == end;  // of the block
    if (in_block == 0) {
      is_last ? write(kYes, kYes) : write(kYes, kNo);
    } else {
      is_last ? write(kNo, kYes) : write(kNo, kNo);
    }
    ++in_block;
    if (is_last) {
      in_block = 0;
      is_first_block = false;
    }
  }
}

template <Stores kStores, class Input, class Scale, class Args>
void backward_in_turn(const Args& args, int64_t begin, int64_t end) {
  const RmsNormShape& shape = args.shape;
  const BackwardPlan plan = backward_plan(shape);
  const RowLength length(shape.dim);
  Real* const sums = (Real*)args.workspace;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * plan.chunk_rows;
    const int64_t last =
        first + plan.chunk_rows < shape.rows ? first + plan.chunk_rows : shape.rows;
    backward_chunk_in_turn<kStores, Input, Scale>(
        args, length, first, last, plan.block_rows, sums + chunk * workspace_stride(shape.dim));
    add_to_tree(sums, shape.dim, begin, chunk);
  }
}

inline bool are_scattered(const RmsNormShape& shape, const int64_t* input_strides) {
  return shape.row_ndim > 0 && input_strides[shape.row_ndim - 1] != shape.dim;
}

// kAskAhead: where that is worth it. kDim: of with_known_dim().
template <
    bool kGradInput, bool kGradScale, Stores kStores, bool kAskAhead, int kDim, class Input,
    class Scale, class Args>
void backward_tasks(const Args& args, int64_t begin, int64_t end) {
  constexpr bool kAdds = kSame<Args, AddRmsNormBackward>;
  constexpr bool kStream = kStores != Stores::kCached;
  using Output = typename DTypeRule<Input, Scale>::Output;
  const RmsNormShape& shape = args.shape;
  const int64_t dim = kDim != 0 ? kDim : shape.dim;
  const BackwardPlan plan = backward_plan(shape);
  auto cursor = cursor_of(args);
  Real* const sums = (Real*)args.workspace;
  const int64_t sums_stride = workspace_stride(dim);
  const RowLength length(dim);
  const int64_t row_bytes = dim * int64_t(sizeof(Input));
  constexpr bool kMayAskForPlace = kAskAhead && !kStream && !kAdds && kGradInput && kDim == 0;
  // Those of backward_short_rows().
  constexpr bool kOneByOne = kDim != 0 && !kAskAhead && !kAdds && kGradInput && kGradScale;
  const AskedFor asked = asked_for<kStream, kMayAskForPlace, Input>(shape);
  const int turns_dim = dim_of_turns(shape, args.input_strides);
  using Block = BackwardBlock<Input, Scale, Output>;
  constexpr bool kTwo = kMayTakeTwo<kStream, kDim, Input>;
  const bool takes_two = kTwo && dim <= kShortRow && !asked.place &&
                         shape.rows * row_bytes < kMostBytesOfTwo<Input> &&
                         (turns_dim >= 0 || !are_scattered(shape, args.input_strides));
  const int rows_ahead = (takes_two && turns_dim < 0 ? 2 : 1) * plan.block_rows;
  const int64_t times_ahead = kStream ? times_of_least_ahead(rows_ahead * row_bytes) : 1;
  const int64_t adjacent_ahead = asked.rows ? times_ahead * rows_ahead : 0;
  Block block[kTwo ? 2 : 1];
  // The sums of a chunk of groups [first, last) join the tree when those of the next one are there:
  // what has just been stored with a mask cannot be loaded until it has left for memory.
  struct {
    int64_t chunk, first, last;
  } unfinished = {0, 0, 0};
  const auto finish_sums = [&] {
    if constexpr (kGradScale) {
      const int64_t chunks = plan.chunks_per_group;
      for (int64_t group = unfinished.first; group < unfinished.last; ++group) {
        // The first chunk of the group that is among the tasks, if it is not negative.
        const int64_t from = turns_dim < 0 ? begin - group * chunks
                                           : (begin - group + shape.groups - 1) / shape.groups;
        add_to_tree(
            sums + group * chunks * sums_stride, dim, from > 0 ? from : 0, unfinished.chunk);
      }
    }
  };
  for (int64_t task = begin; task < end;) {
    // The same chunk of groups [first, last).
    int64_t chunk, first, last;
    if (turns_dim < 0) {
      first = task / plan.chunks_per_group;
      last = first + 1;
      chunk = task % plan.chunks_per_group;
    } else {
      first = task % shape.groups;
      last = first + (end - task) < shape.groups ? first + (end - task) : shape.groups;
      chunk = task / shape.groups;
    }
    task += last - first;
    const int64_t chunk_begin = chunk * plan.chunk_rows;
    const int64_t left = plan.rows_per_group - chunk_begin;
    const int64_t chunk_rows = left < plan.chunk_rows ? left : plan.chunk_rows;

    int64_t run_left = 0;  // rows before the group goes on elsewhere
    int64_t done = 0;
    const auto take_rows = [&](Block& block) {
      const int64_t rest = chunk_rows - done;
      block.rows = int(rest < plan.block_rows ? rest : plan.block_rows);
      block.is_first = done == 0;
      block.scale = (const Scale*)args.scale + first * dim;
      if constexpr (kGradScale) {
        block.grad_scale = sums + (first * plan.chunks_per_group + chunk) * sums_stride;
      }
      for (int r = 0; r < block.rows; ++r, ++done) {
        if (run_left > 0) {
          cursor.next();
        } else {
          const int64_t run = (chunk_begin + done) / shape.inner;
          const int64_t in_run = (chunk_begin + done) % shape.inner;
          cursor.seek((run * shape.groups + first) * shape.inner + in_run);
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
      const int64_t ahead = cursor.step(1) == dim ? adjacent_ahead : rows_ahead;
      block.grad_output_ahead = ahead * cursor.step(0);
      block.input_ahead = ahead * cursor.step(1);
      block.grad_input_ahead = ahead * cursor.step(2);
      if constexpr (kAdds) {
        block.grad_new_residual_ahead = (sizeof(Input) > 2 ? rows_ahead : ahead) * cursor.step(3);
      }
    };
    // The same rows of the next group, or the next rows of the first one.
    int64_t group = last;
    const auto take_next = [&](const Block& before, Block& block) {
      if (group == last) {
        if (done == chunk_rows) return false;
        group = first;
        take_rows(block);
      } else {
        block.rows = before.rows;
        block.is_first = before.is_first;
        block.scale = before.scale + dim;
        if constexpr (kGradScale) {
          block.grad_scale = before.grad_scale + plan.chunks_per_group * sums_stride;
        }
        for (int r = 0; r < before.rows; ++r) {
          block.grad_output[r] = before.grad_output[r] + cursor.stride(0, turns_dim);
          block.input[r] = before.input[r] + cursor.stride(1, turns_dim);
          block.grad_input[r] = before.grad_input[r] + cursor.stride(2, turns_dim);
          if constexpr (kAdds) {
            block.grad_new_residual[r] = before.grad_new_residual[r] + cursor.stride(3, turns_dim);
          }
        }
        block.grad_output_ahead = before.grad_output_ahead;
        block.input_ahead = before.input_ahead;
        block.grad_input_ahead = before.grad_input_ahead;
        if constexpr (kAdds) block.grad_new_residual_ahead = before.grad_new_residual_ahead;
      }
      ++group;
      return true;
    };
    for (int blocks = 1; take_next(block[blocks - 1], block[0]);) {
      blocks = takes_two && take_next(block[0], block[1]) ? 2 : 1;
      for (int b = 0; b < blocks; ++b) {
        backward_statistics<kGradInput, kStream, kAskAhead>(length, shape.eps, block[b]);
      }
      for (int b = 0; b < blocks; ++b) {
        const auto write = [&](auto count, auto place) COREAI_TORCH_INLINE_LAMBDA {
          constexpr int kRows = decltype(count)::value;
          constexpr bool kAskForPlace = decltype(place)::value != 0;
          backward_rows<kRows, kAdds, kGradInput, kGradScale, kStores, kAskAhead, kAskForPlace>(
              dim, block[b]);
        };
        if constexpr (kOneByOne) {
          if (block[b].rows == kBlockRows) {
            backward_short_rows<kDim>(block[b]);
            continue;
          }
        }
        constexpr int kFull = kFullBlockRows<Input>;
        if (kMayAskForPlace && asked.place && block[b].rows == kFull) {
          write(Constant<kFull>(), Constant<kMayAskForPlace>());
        } else if (block[b].rows == kBlockRows) {
          write(Constant<kBlockRows>(), Constant<false>());
        } else if (sizeof(Input) > 2 && block[b].rows == kFewBlockRows) {
          write(Constant<kFewBlockRows>(), Constant<false>());
        } else {
          write(Constant<0>(), Constant<false>());
        }
      }
    }
    finish_sums();
    unfinished = {chunk, first, last};
  }
  finish_sums();
}

template <class Input, class Scale, class Args>
void backward(const Args& args, Streamed streamed, int64_t begin, int64_t end) {
  if constexpr (kSame<Args, RmsNormBackward>) {
    if (args.grad_input == nullptr) {
      backward_tasks<false, true, Stores::kCached, true, 0, Input, Scale>(args, begin, end);
      return;
    }
  }
  if (args.grad_scale == nullptr) {
    backward_tasks<true, false, Stores::kCached, true, 0, Input, Scale>(args, begin, end);
    return;
  }
  if constexpr (kStreams) {
    const bool done =
        streamed == Streamed::kAll &&
        with_streams<Input, kStreamsRowsOf<Input, Scale>>(args.shape.dim, [&](auto stores) {
          constexpr Stores kStores = decltype(stores)::value;
          bool in_turn = false;
          if constexpr (kStores == Stores::kStreamed && sizeof(Input) > 2) {
            in_turn = goes_in_turn<true, Input>(args);
            if (in_turn) backward_in_turn<kStores, Input, Scale>(args, begin, end);
          }
          if (!in_turn) {
            backward_tasks<true, true, kStores, true, 0, Input, Scale>(args, begin, end);
          }
          stream_end((const Input*)args.grad_input);
        });
    if (done) return;
  }
  if constexpr (sizeof(Input) > 2) {
    if (goes_in_turn<false, Input>(args)) {
      backward_in_turn<Stores::kCached, Input, Scale>(args, begin, end);
      return;
    }
  }
  with_known_dim<Input, Scale>(args.shape.dim, [&](auto known_dim) {
    constexpr int kDim = decltype(known_dim)::value;
    if constexpr (kDim != 0 && sizeof(Input) > 2) {
      if (!are_scattered(args.shape, args.input_strides)) {
        backward_tasks<true, true, Stores::kCached, false, kDim, Input, Scale>(args, begin, end);
        return;
      }
    }
    backward_tasks<true, true, Stores::kCached, true, kDim, Input, Scale>(args, begin, end);
  });
}

// The Pair of columns from i on of the sum of a group's chunks [first, first + count), or as many
// of them as are before `end`. count is a power of two.
template <class Part>
Pair sum_of_tree(
    Part part, const Real* sums, int64_t dim, int64_t i, int64_t first, int64_t count,
    int64_t end) {
  const Real* const sum = sums + first * workspace_stride(dim);
  if (sum[dim] == Real(count)) return part.load_from(sum + i);
  const int64_t half = count / 2;
  const Pair left = sum_of_tree(part, sums, dim, i, first, half, end);
  if (first + half >= end) return left;
  return left + sum_of_tree(part, sums, dim, i, first + half, half, end);
}

template <class Scale>
void reduce(const RmsNormBackward& args, Streamed, int64_t begin, int64_t end) {
  const int64_t dim = args.shape.dim;
  const int64_t chunks = backward_plan(args.shape).chunks_per_group;
  int64_t root = 1;  // chunks of the whole tree
  while (root < chunks) root *= 2;
  const int64_t blocks_per_group = (dim + kReduceColumns - 1) / kReduceColumns;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t group = block / blocks_per_group;
    const int64_t first = block % blocks_per_group * kReduceColumns;
    const int64_t last = first + kReduceColumns < dim ? first + kReduceColumns : dim;
    const Real* sums = (const Real*)args.workspace + group * chunks * workspace_stride(dim);
    Scale* grad_scale = (Scale*)args.grad_scale + group * dim;
    for_each_pair(first, last, [&](auto part, int64_t i) {
      part.store_to(grad_scale + i, sum_of_tree(part, sums, dim, i, 0, root, chunks));
    });
  }
}

}  // namespace
}  // namespace coreai_torch
