// Forward of RMSNorm, and of the residual add and RMSNorm. `forward` is the kernel.
#pragma once

#include "cpu/caches.h"
#include "cpu/rms_norm_rows.h"
#include "cpu/streamed.h"

namespace coreai_torch {
namespace {

template <class T>
inline Pair rounded_to(PairOf<T, T> v) {
  if constexpr (sizeof(T) < sizeof(Real)) {
    return round_to<T>(v);
  } else {
    return v;
  }
}

template <class T>
inline Pair rounded_to(Native v) {
  return v.widened();
}

inline RowCursor<2> cursor_of(const RmsNormForward& args) {
  return {args.shape, {args.input_strides, args.output_strides}};
}
inline RowCursor<4> cursor_of(const AddRmsNormForward& args) {
  return {
      args.shape,
      {args.input_strides, args.output_strides, args.residual_strides, args.new_residual_strides}};
}

// Some levels round fast what is not denormal, so forward looks for the smallest numbers of a block
// while it is summed, and of a scale row.
template <class Scale>
float smallest_of(const Scale* scale, int64_t dim) {
  Smallest smallest;
  for_each_pair(0, dim, [&](auto part, int64_t i) {
    if constexpr (kPrefersNormal<Scale>) {
      part.add_to(smallest, scale + i);
    } else {
      smallest.add(part.load_from(scale + i));
    }
  });
  return smallest.value();
}

// Are the products with 1/rms, and those with the scale after them, no denormal numbers? The bound
// has room for what rounding does in between.
inline bool are_normal(float smallest_input, Quad rstd, int rows, float smallest_scale) {
  constexpr float kBound = 2 * __FLT_MIN__;
  float smallest_rstd = float(rstd[0]);
  for (int r = 1; r < rows; ++r) {
    if (rstd[r] < smallest_rstd) smallest_rstd = float(rstd[r]);
  }
  const float smallest = smallest_input * smallest_rstd;
  return smallest >= kBound && smallest * smallest_scale >= kBound;
}

// For which cache forward asks: for the first, rows of 16 bits that come from the caches or are of
// known length, which is short. Processors keep account of few lines that are under way to the
// first cache, so that those from memory would keep others waiting; and four rows of float32 may
// fill it.
template <bool kInCaches, int kDim, class Input>
constexpr Cache kForwardCache =
    sizeof(Input) == 2 && (kInCaches || kDim != 0) ? kFirstCache : kSecondCache;

// What is normalized: the input or, after the residual add, the sum. A sum is written when it is
// taken, for row_sums(), and read again from the cache. Written past the caches it would not be
// there, so where it is streamed it is taken a second time, and written then.
template <Cache kCache, class Input>
struct InputRows {
  const Input* input[kBlockRows];
  int64_t input_step;  // from a row to the next

  template <class Part>
  Pair first(Part part, int r, int64_t i) const {
    return part.load_from(input[r] + i);
  }
  template <class Part>
  Pair again(Part part, int r, int64_t i) const {
    return part.load_from(input[r] + i);
  }
  template <class Part>
  void add_to(Smallest& smallest, Part part, int r, int64_t i, Pair) const {
    part.add_to(smallest, input[r] + i);
  }
  void prefetch_ahead(int rows, int r, int64_t i) const {
    prefetch<kCache>(input[r] + rows * input_step + i);
  }
};

template <bool kStream, Cache kCache, class Input>
struct SummedRows {
  const Input* input[kBlockRows];
  const Input* residual[kBlockRows];
  Input* new_residual[kBlockRows];
  int64_t input_step, residual_step;

  template <class Part>
  auto sum(Part part, int r, int64_t i) const {
    if constexpr (kIsNative<Input>) {
      return part.load_native_from(input[r] + i) + part.load_native_from(residual[r] + i);
    } else {
      return PairOf<Input, Input>{part.load_from(input[r] + i) + part.load_from(residual[r] + i)};
    }
  }
  template <class Part>
  Pair first(Part part, int r, int64_t i) const {
    if constexpr (kStream) {
      return rounded_to<Input>(sum(part, r, i));
    } else {
      const auto total = sum(part, r, i);
      part.store_to(new_residual[r] + i, total);
      // Of a part, which is stored with a mask or element by element, the load would have to wait.
      if constexpr (kSame<Part, First>) return rounded_to<Input>(total);
      return again(part, r, i);
    }
  }
  template <class Part>
  Pair again(Part part, int r, int64_t i) const {
    if constexpr (kStream) {
      const Pair rounded = rounded_to<Input>(sum(part, r, i));
      RowWriter<Stores::kStreamed, Input> writer{new_residual[r]};
      writer.write(part, i, PairOf<Input, Input>{rounded});
      return rounded;
    } else {
      return part.load_from(new_residual[r] + i);
    }
  }
  template <class Part>
  void add_to(Smallest& smallest, Part part, int r, int64_t i, Pair rounded) const {
    if constexpr (kStream) {
      smallest.add(rounded);
    } else {
      part.add_to(smallest, new_residual[r] + i);
    }
  }
  // But for float32 rows that go one by one: processors foresee both addends better by themselves.
  void prefetch_ahead(int rows, int r, int64_t i) const {
    if constexpr (kStream || sizeof(Input) == 2) {
      prefetch<kCache>(input[r] + rows * input_step + i);
      prefetch<kCache>(residual[r] + rows * residual_step + i);
    }
  }
};

// Are the rows of a forward block side by side in a sweep? Conversions take so long that several
// rows, which share those of the scale, are worth it. Rows of float32 go one by one: processors
// foresee a single row, but not several short ones close to each other. With AVX2, whose stores
// past the caches are half a line each, side by side is faster up to 8 KiB where they are streamed.
constexpr bool kStreamsOneByOne = sizeof(Pair) == 128;  // two lines
template <bool kStream, class Input>
constexpr bool kSideBySide = sizeof(Input) == 2 || (kStream && !kStreamsOneByOne);

// How many of kRows rows that is.
template <int kRows, bool kStream, class Input>
constexpr int kAtOnce = !kSideBySide<kStream, Input> ? 1
                        : kRows < kForwardRows       ? kRows
                                                     : kForwardRows;

template <class Input>
using KeptInForward = typename Conditional<kPrefersNormal<Input>, Smallest, Nothing>::type;

// What is asked for of 16-bit blocks is spread over both sweeps, so that memory is at work in both:
// while a block is summed, a row of the block after it and the place where it will be written,
// while one is written, the other rows of the block that is summed after next. Rows of float32 ask
// while they are written.
template <int kRows, class Input>
constexpr bool kSpreads = sizeof(Input) == 2 && kRows == kBlockRows;
constexpr int kAskedForEarly = 1;

// 1/rms of rows [first, first + kRows), in the first kRows places. kAskAhead: asks for the place of
// the rows, too.
template <int kRows, bool kStream, bool kAskAhead, class Input, class Rows, class Output>
COREAI_TORCH_INLINE Quad forward_rstd(
    const RowLength& length, double eps, const Rows& rows, int first, Output* const* output,
    KeptInForward<Input>& kept) {
  constexpr int kGroup = kAtOnce<kRows, kStream, Input>;
  Vector lanes[kQuad];
  Real left[kQuad][kVectorLanes];
  unrolled<kRows / kGroup>([&](auto group) COREAI_TORCH_INLINE_LAMBDA {
    constexpr int kBegin = decltype(group)::value * kGroup;
    row_sums<InOrder, kGroup>(
        length,
        [=, &rows](auto part, int64_t i, Pair* terms, auto& kept) COREAI_TORCH_INLINE_LAMBDA {
          unrolled<kGroup>([&](auto r) COREAI_TORCH_INLINE_LAMBDA {
            const int row = first + kBegin + r;
            const Pair x = rows.first(part, row, i);
            terms[r] = x * x;
            if constexpr (kPrefersNormal<Input>) rows.add_to(kept, part, row, i, x);
            if constexpr (kSpreads<kRows, Input>) {
              if constexpr (kBegin + r < kAskedForEarly) rows.prefetch_ahead(kBlockRows, row, i);
              if constexpr (kAskAhead) prefetch_to_write(output[row] + i);
            }
          });
        },
        lanes + kBegin, left + kBegin, kept);
  });
  InOrder::repeat_first<kRows>(lanes, left, length.left);
  return rstd_of(InOrder::finish(lanes, left, length.left), length, eps);
}

// Is what is rounded to the input's dtype multiplied by the scale in that dtype?
template <class Input, class Scale>
constexpr bool kNativeProduct = kIsNative<Input> && kSame<Input, Scale>;

// Elements of the scale, as what the normalized input, rounded or not, is multiplied by.
template <class Input, class Scale, class Part>
COREAI_TORCH_INLINE auto factors(Part part, const Scale* scale) {
  if constexpr (kNativeProduct<Input, Scale>) {
    return part.load_native_from(scale);
  } else {
    return part.load_from(scale);
  }
}

// What forward writes of normalized elements, given factors(). Values is PairOf<Input, Scale>, or
// Normal where that is known of what is rounded.
template <class Input, class Scale, class Values, class Factors>
COREAI_TORCH_INLINE auto scaled(Pair normalized, Factors w) {
  if constexpr (kNativeProduct<Input, Scale>) {
    return Native::rounded(normalized) * w;
  } else if constexpr (DTypeRule<Input, Scale>::kRoundsNormalized) {
    return Values{round_to<Input>(Values{normalized}) * w};
  } else {
    return Values{normalized * w};
  }
}

// Writes rows [first, first + kRows). The next ones are asked for where rows are side by side or
// streamed, and with kAskAhead; then so is the place of those that are written next.
template <
    int kRows, Stores kStores, bool kAskAhead, class Input, class Values, class Scale, class Rows,
    class Output>
COREAI_TORCH_INLINE void forward_rows(
    int64_t dim, const Rows& rows, int first, const Scale* scale, int64_t scale_step, Quad rstds,
    Output* const* output, int64_t output_step) {
  constexpr bool kStream = kStores != Stores::kCached;
  constexpr int kGroup = kAtOnce<kRows, kStream, Input>;
  using Product = typename Conditional<kNativeProduct<Input, Scale>, Native, Values>::type;
  const int64_t output_ahead = kGroup * output_step;
  unrolled<kRows / kGroup>([&](auto group) COREAI_TORCH_INLINE_LAMBDA {
    constexpr int kBegin = decltype(group)::value * kGroup;
    const Scale* const group_scale = scale + kBegin * scale_step;
    Pair rstd[kGroup];
    RowWriter<kStores, Output> writer[kGroup];
    unrolled<kGroup>([&](auto r) COREAI_TORCH_INLINE_LAMBDA {
      rstd[r] = splat(rstds[kBegin + r]);
      writer[r] = {output[first + kBegin + r]};
    });
    for_each_pair(0, dim, [&](auto part, int64_t i) COREAI_TORCH_INLINE_LAMBDA {
      const auto w = factors<Input>(part, group_scale + i);
      Product result[kGroup];
      unrolled<kGroup>([&](auto r) COREAI_TORCH_INLINE_LAMBDA {
        const int row = first + kBegin + r;
        if constexpr (kSpreads<kRows, Input>) {
          if constexpr (kBegin + r >= kAskedForEarly) rows.prefetch_ahead(2 * kBlockRows, row, i);
        } else {
          if constexpr (kAskAhead || kStream || kSideBySide<kStream, Input>) {
            rows.prefetch_ahead(kRows, row, i);
          }
          if constexpr (kAskAhead) prefetch_to_write(output[row] + output_ahead + i);
        }
        result[r] = scaled<Input, Scale, Values>(rows.again(part, row, i) * rstd[r], w);
      });
      unrolled<kGroup>([&](auto r)
                           COREAI_TORCH_INLINE_LAMBDA { writer[r].write(part, i, result[r]); });
    });
  });
}

// Rows of a forward block. Long ones of float32 are summed and written one after the other: four
// would not stay in the caches until they are written. kInCaches: do the operands stay there?
template <bool kStream, bool kInCaches, class Input>
inline int forward_block_rows(int64_t row_bytes) {
  constexpr int64_t kLongRow = kInCaches || kSideBySide<kStream, Input> ? 8192 : 4096;
  return sizeof(Input) > 2 && row_bytes >= kLongRow ? 1 : kBlockRows;
}

// How many rows ahead forward asks for: those of a block, in 16 bits of two.
template <bool kStream, bool kInCaches, class Input>
inline int forward_rows_ahead(int64_t row_bytes) {
  return forward_block_rows<kStream, kInCaches, Input>(row_bytes) * (sizeof(Input) == 2 ? 2 : 1);
}

// Of what may be asked for, half is for the place of the output in float32.
template <bool kStream, bool kInCaches, class Input, class Args>
inline bool asks_ahead(const Args& args) {
  constexpr int kReads = kSame<Args, AddRmsNormForward> ? 2 : 1;
  constexpr int kOperands = kReads * (sizeof(Input) == 2 ? 1 : 2);
  const int64_t row_bytes = args.shape.dim * int64_t(sizeof(Input));
  const int rows = forward_rows_ahead<kStream, kInCaches, Input>(row_bytes);
  return kOperands * rows * row_bytes <= kMostAhead<kStream>;
}

// Does forward ask for the rows, if they are not streamed, and for the place of the output? Rows
// of fewer elements gain by that only where they come from memory.
template <class Input>
constexpr int64_t kAsksForPlaceFrom = sizeof(Input) == 2 ? 129 : 1024;
template <bool kAdds, class Input>
inline bool is_worth_asking(const RmsNormShape& shape) {
  const int64_t bytes = shape.rows * shape.dim * int64_t(sizeof(Input));
  if (!kAdds && shape.dim >= kAsksForPlaceFrom<Input> && bytes >= kColdPlace<Input>) return true;
  return (kAdds ? 2 : 1) * bytes >= kBeyondCaches;
}

// In which order rows are taken. Where groups take turns they do so block by block, or, where a
// block need not share a scale row, since its rows go one by one, row by row: a block goes across
// groups.
enum class Order { kAsTheyCome, kInTurns, kAcross };

// kStreamsSum: are the sums of the residual add stored past the caches? kDim: of with_known_dim().
template <
    Stores kStores, bool kStreamsSum, bool kAskAhead, Order kOrder, int kDim, class Input,
    class Scale, class Args>
void forward_range(const Args& args, int64_t begin, int64_t end) {
  constexpr bool kAdds = kSame<Args, AddRmsNormForward>;
  constexpr bool kStream = kStores != Stores::kCached;
  constexpr bool kTurns = kOrder != Order::kAsTheyCome;
  constexpr bool kAcross = kOrder == Order::kAcross;
  using Output = typename DTypeRule<Input, Scale>::Output;
  const RmsNormShape& shape = args.shape;
  const int64_t dim = kDim != 0 ? kDim : shape.dim;
  const int64_t row_bytes = dim * int64_t(sizeof(Input));
  const RowLength unknown_length(dim);
  auto cursor = cursor_of(args);

  constexpr bool kInCaches = !kStream && !kAskAhead;
  constexpr Cache kCache = kForwardCache<kInCaches, kDim, Input>;
  const int block_rows = forward_block_rows<kStream, kInCaches, Input>(row_bytes);
  const bool asks = asks_ahead<kStream, kInCaches, Input>(args);
  const int64_t bytes_ahead = forward_rows_ahead<kStream, kInCaches, Input>(row_bytes) * row_bytes;
  const int64_t times_ahead = times_of_least_ahead(bytes_ahead);
  const auto step_ahead = [&](int operand) {
    const int64_t step = asks ? cursor.step(operand) : 0;
    if constexpr (!kInCaches && !kTurns) {
      if (step == dim) return times_ahead * step;
    }
    return step;
  };

  struct Block {
    int count;
    bool normal;  // is it known that nothing denormal is rounded?
    const Scale* scale;
    float smallest_scale;
    typename Conditional<
        kAdds, SummedRows<kStreamsSum, kCache, Input>, InputRows<kCache, Input>>::type rows;
    Output* output[kBlockRows];
    int64_t output_step;
    Quad rstd;
  };
  // What begin and end count: rows or, where groups take turns, rows of a group. Units
  // [run * inner, (run + 1) * inner) share a scale row or, with turns, the scale rows in turn.
  const int turns_dim = kTurns ? dim_of_turns(shape, args.input_strides) : -1;
  if constexpr (!kTurns) cursor.seek(begin);
  int64_t unit = begin, run_end = begin;
  int64_t turn = kAcross ? shape.groups : 0;
  const Scale* scale = nullptr;
  float smallest_scale = 0;  // of the scale row or, with turns, of the scale
  if constexpr (kPrefersNormal<Input> && kTurns) {
    smallest_scale = smallest_of((const Scale*)args.scale, shape.groups * dim);
  }
  const auto set_scale = [&](Block& block, const Scale* row) {
    if constexpr (kPrefersNormal<Input> && !kTurns) {
      if (row != scale) smallest_scale = smallest_of(row, dim);
    }
    block.scale = scale = row;
    block.smallest_scale = smallest_scale;
  };
  const Scale* run_scale = nullptr;
  const auto start_run = [&] {
    const int64_t run = unit / shape.inner;
    run_end = (run + 1) * shape.inner < end ? (run + 1) * shape.inner : end;
    run_scale = (const Scale*)args.scale;
    if constexpr (kTurns) {
      cursor.seek(run * shape.groups * shape.inner + unit % shape.inner);
    } else {
      run_scale += run % shape.groups * dim;
    }
  };
  // Where row r of a block is in operand n: offset(n) elements after its beginning.
  const auto set_row = [&](Block& block, int r, const auto& offset) COREAI_TORCH_INLINE_LAMBDA {
    block.rows.input[r] = alone((const Input*)args.input + offset(0));
    block.output[r] = alone((Output*)args.output + offset(1));
    if constexpr (kAdds) {
      block.rows.residual[r] = alone((const Input*)args.residual + offset(2));
      block.rows.new_residual[r] = alone((Input*)args.new_residual + offset(3));
    }
  };
  // A block whose group has the first turn. False: there are no rows left.
  const auto take_rows = [&](Block& block) {
    if (unit == end) return false;
    if (unit == run_end) start_run();
    block.count = int(run_end - unit < block_rows ? run_end - unit : block_rows);
    unit += block.count;
    set_scale(block, run_scale);
    block.rows.input_step = step_ahead(0);
    block.output_step = cursor.step(1);
    if constexpr (kAdds) block.rows.residual_step = step_ahead(2);
    if (block.count == kBlockRows && cursor.has_in_step(kBlockRows)) {
      unrolled<kBlockRows>([&](auto r) COREAI_TORCH_INLINE_LAMBDA {
        set_row(block, r, [&](int n) { return cursor.offset(n) + r * cursor.step(n); });
      });
      cursor.skip_in_step(kBlockRows);
    } else {
      for (int r = 0; r < block.count; ++r, cursor.next()) {
        set_row(block, r, [&](int n) { return cursor.offset(n); });
      }
    }
    return true;
  };
  // A block of the next groups, whose number is a multiple of a block's rows.
  const auto take_across = [&](Block& block) {
    if (turn == shape.groups) {
      if (unit == end) return false;
      if (unit == run_end) {
        start_run();
      } else {
        cursor.next();
      }
      ++unit;
      turn = 0;
    }
    block.count = kBlockRows;
    block.scale = run_scale + turn * dim;
    block.rows.input_step = cursor.stride(0, turns_dim);
    block.output_step = cursor.stride(1, turns_dim);
    if constexpr (kAdds) block.rows.residual_step = cursor.stride(2, turns_dim);
    for (int r = 0; r < kBlockRows; ++r, ++turn) {
      set_row(
          block, r, [&](int n) { return cursor.offset(n) + turn * cursor.stride(n, turns_dim); });
    }
    return true;
  };
  // The block after `block`, of the group whose turn is next.
  const auto take_next = [&](Block& block) {
    if constexpr (kAcross) return take_across(block);
    if (!kTurns || ++turn == shape.groups) {
      turn = 0;
      return take_rows(block);
    }
    set_scale(block, block.scale + dim);
    for (int r = 0; r < block.count; ++r) {
      block.rows.input[r] += cursor.stride(0, turns_dim);
      block.output[r] += cursor.stride(1, turns_dim);
      if constexpr (kAdds) {
        block.rows.residual[r] += cursor.stride(2, turns_dim);
        block.rows.new_residual[r] += cursor.stride(3, turns_dim);
      }
    }
    return true;
  };
  const auto sum_block = [&](Block& block) {
    // As a constant it leaves out what sums of other lengths take; backward did not gain by that.
    const RowLength& length = kDim != 0 ? kKnownLength<kDim> : unknown_length;
    KeptInForward<Input> kept;
    if (block.count == kBlockRows) {
      block.rstd = forward_rstd<kBlockRows, kStream, kAskAhead, Input>(
          length, shape.eps, block.rows, 0, block.output, kept);
    } else {
      for (int r = 0; r < block.count; ++r) {
        block.rstd[r] = forward_rstd<1, kStream, false, Input>(
            length, shape.eps, block.rows, r, block.output, kept)[0];
      }
    }
    if constexpr (kPrefersNormal<Input>) {
      block.normal = are_normal(kept.value(), block.rstd, block.count, block.smallest_scale);
    }
  };
  const auto write_rows = [&](auto values, const Block& block) {
    using Values = decltype(values);
    if (block.count == kBlockRows) {
      forward_rows<kBlockRows, kStores, kAskAhead, Input, Values>(
          dim, block.rows, 0, block.scale, kAcross ? dim : 0, block.rstd, block.output,
          block.output_step);
    } else {
      // Rows of known length are alone at the end only, where asking would not be worth its code.
      for (int r = 0; r < block.count; ++r) {
        forward_rows<1, kStores, kAskAhead && kDim == 0, Input, Values>(
            dim, block.rows, r, block.scale, 0, Quad{block.rstd[r]}, block.output,
            block.output_step);
      }
    }
  };
  const auto write_block = [&](const Block& block) {
    if constexpr (kPrefersNormal<Input>) {
      if (block.normal) return write_rows(Normal(), block);
    }
    write_rows(PairOf<Input, Scale>(), block);
  };

  Block next;
  bool more = kAcross ? take_across(next) : take_rows(next);
  if constexpr (sizeof(Input) == 2) {
    // Conversions keep the processor busy, and would wait for a block's 1/rms, which take long one
    // after the other. So the next block is summed before one is written.
    if (more) sum_block(next);
    while (more) {
      const Block block = next;
      more = take_next(next);
      if (more) sum_block(next);
      write_block(block);
    }
  } else {
    for (; more; more = take_next(next)) {
      sum_block(next);
      write_block(next);
    }
  }
}

// What stays in registers along the rows of write_rows_and_sum_next().
template <int kRows, Stores kStores, class Input, class Output>
struct KeptInOneLoop {
  KeptInForward<Input> input;  // of the rows that are summed
  RowWriter<kStores, Output> output[kRows];
};

// Writes rows that are streamed, and takes 1/rms of as many next ones, which follow in memory.
template <int kRows, class Values, Stores kStores, class Input, class Scale, class Output>
COREAI_TORCH_INLINE Quad write_rows_and_sum_next(
    const RowLength& length, double eps, const Input* input, const Scale* scale, Quad rstds,
    Output* output, KeptInForward<Input>& kept_of_input) {
  // Two rows side by side were slower where they were asked for farther ahead.
  constexpr int64_t kAhead = (kRows == 1 ? kLeastAhead : 4096) / int64_t(sizeof(Input));
  // Conversions of float16 take so long that memory is not waited for.
  constexpr Cache kCache = kSame<Input, Float16> ? kFirstCache : kSecondCache;
  const int64_t dim = length.dim;
  const Input* const next = input + kRows * dim;
  Vector lanes[kQuad];
  Real left[kQuad][kVectorLanes];
  KeptInOneLoop<kRows, kStores, Input, Output> kept;
  Pair rstd[kRows];
  for (int r = 0; r < kRows; ++r) {
    rstd[r] = splat(rstds[r]);
    kept.output[r] = {output + r * dim};
  }
  row_sums<InOrder, kRows>(
      length,
      [=](auto part, int64_t i, Pair* terms, auto& kept) COREAI_TORCH_INLINE_LAMBDA {
        const auto w = factors<Input>(part, scale + i);
        unrolled<kRows>([&](auto r) COREAI_TORCH_INLINE_LAMBDA {
          const int64_t at = r * dim + i;
          prefetch<kCache>(next + at + kAhead);
          const Pair x = part.load_from(next + at);
          terms[r] = x * x;
          if constexpr (kPrefersNormal<Input>) part.add_to(kept.input, next + at);
          const auto result = scaled<Input, Scale, Values>(part.load_from(input + at) * rstd[r], w);
          kept.output[r].write(part, i, result);
        });
      },
      lanes, left, kept);
  kept_of_input = kept.input;
  InOrder::repeat_first<kRows>(lanes, left, length.left);
  return rstd_of(InOrder::finish(lanes, left, length.left), length, eps);
}

// Do streamed rows go in one loop? Short ones would have to wait for each other's 1/rms, and 16-bit
// ones convert the scale for each row, which AVX2 is too slow for. Rows of float32, which otherwise
// go one after the other, find themselves in the first cache then, where it has room for a row and
// the scale, but not for the next row, too.
template <class Input>
inline bool is_for_one_loop(int64_t row_bytes) {
  constexpr int64_t kRoomForThree = 8192;
  if (sizeof(Input) == 2) return kStreamsOneByOne && row_bytes >= 8192;
  constexpr int64_t kShortest = kStreamsOneByOne ? 2048 : 8192;
  return row_bytes >= kShortest &&
         (row_bytes <= kRoomForThree || 2 * row_bytes >= first_cache_bytes());
}

// Do they go in pairs then? Where rows and the scale come from the second cache, as they all do for
// a small first one, that saves reading the scale for every second row. The larger first cache that
// was measured loses by it, and so do 16-bit rows.
inline bool is_for_pairs(int64_t row_bytes) {
  constexpr int64_t kShortest = 16384, kSmallCache = 32768;
  return row_bytes >= kShortest && first_cache_bytes() <= kSmallCache;
}

// Forward of such rows, which are contiguous. While kRows are written the next ones are summed, so
// that memory is written and read at the same time. What an iteration leaves to the next one stays
// in registers: read from memory, it would wait for all that is being streamed, wherever it is read
// in other pieces than it was written. Rows share one scale, if they are not taken one by one.
template <int kRows, Stores kStores, class Input, class Scale>
void forward_in_one_loop(const RmsNormForward& args, int64_t begin, int64_t end) {
  using Output = typename DTypeRule<Input, Scale>::Output;
  const RmsNormShape& shape = args.shape;
  const int64_t dim = shape.dim;
  const RowLength length(dim);
  const Input* input = (const Input*)args.input + begin * dim;
  Output* output = (Output*)args.output + begin * dim;
  const Scale* scale = nullptr;
  float smallest_scale = 0;
  const auto set_scale_of = [&](int64_t row) {
    const int64_t group = shape.groups == 1 ? 0 : row / shape.inner % shape.groups;
    const Scale* const row_scale = (const Scale*)args.scale + group * dim;
    if (row_scale == scale) return;
    scale = row_scale;
    if constexpr (kPrefersNormal<Input>) smallest_scale = smallest_of(scale, dim);
  };
  KeptInForward<Input> kept;
  const auto rstd_of_row = [&](int64_t r) {
    const InputRows<kSecondCache, Input> row{{input + r * dim}, 0};
    return forward_rstd<1, true, false, Input>(length, shape.eps, row, 0, &output, kept)[0];
  };
  const auto write_row = [&](Real rstd) {
    const InputRows<kSecondCache, Input> row{{input}, 0};
    forward_rows<1, kStores, false, Input, PairOf<Input, Scale>>(
        dim, row, 0, scale, 0, Quad{rstd}, &output, 0);
    input += dim;
    output += dim;
  };

  int64_t row = begin;
  if (end - row >= kRows) {
    Quad rstd = {};
    for (int r = 0; r < kRows; ++r) rstd[r] = rstd_of_row(r);
    for (; row + 2 * kRows <= end; row += kRows) {
      set_scale_of(row);
      bool normal = false;
      if constexpr (kPrefersNormal<Input>) {
        normal = are_normal(kept.value(), rstd, kRows, smallest_scale);
        if (normal) {
          rstd = write_rows_and_sum_next<kRows, Normal, kStores>(
              length, shape.eps, input, scale, rstd, output, kept);
        }
      }
      if (!normal) {
        rstd = write_rows_and_sum_next<kRows, PairOf<Input, Scale>, kStores>(
            length, shape.eps, input, scale, rstd, output, kept);
      }
      input += kRows * dim;
      output += kRows * dim;
    }
    set_scale_of(row);
    for (int r = 0; r < kRows; ++r) write_row(rstd[r]);
    row += kRows;
  }
  if constexpr (kRows > 1) {
    for (; row < end; ++row) {
      set_scale_of(row);
      write_row(rstd_of_row(0));
    }
  }
}

// Rows of float32 that follow each other, and share one scale. Where they come from memory, but are
// not streamed, each is written as soon as it is summed, and none is asked for: processors foresee
// what is read then, and long rows alone gain by asking. The shortest are taken in blocks, whose
// lanes are added up together. Heads of 128 gain as soon as their output comes from memory. kDim:
// of with_known_dim().
template <int kDim>
bool is_for_single_rows(const RmsNormForward& args) {
  // In elements. Ends of rows that are not whole Pairs take AVX2 long.
  constexpr int64_t kShortest = kDim != 0 || kHasManyRegisters ? 32 : 128;
  constexpr int64_t kBytes = kDim == 128 ? kColdPlace<float> : kBeyondCaches;
  const RmsNormShape& shape = args.shape;
  return shape.dim >= kShortest && shape.dim < kAsksForPlaceFrom<float> &&
         shape.rows * shape.dim * int64_t(sizeof(float)) >= kBytes && shape.groups == 1 &&
         has_adjacent_rows(shape, args.input_strides) &&
         has_adjacent_rows(shape, args.output_strides);
}

template <int kDim, class T>
void forward_single_rows(const RmsNormForward& args, int64_t begin, int64_t end) {
  const T* const scale = (const T*)args.scale;
  const int64_t dim = kDim != 0 ? kDim : args.shape.dim;
  const RowLength unknown_length(dim);
  const RowLength& length = kDim != 0 ? kKnownLength<kDim> : unknown_length;
  Nothing nothing;
  for (int64_t row = begin; row < end; ++row) {
    const InputRows<kSecondCache, T> input{{(const T*)args.input + row * dim}, 0};
    T* const output = (T*)args.output + row * dim;
    const Quad rstd =
        forward_rstd<1, false, false, T>(length, args.shape.eps, input, 0, &output, nothing);
    forward_rows<1, Stores::kCached, false, T, Pair>(dim, input, 0, scale, 0, rstd, &output, 0);
  }
}

template <Stores kStores, class Input, class Scale, class Args>
void forward_streamed(const Args& args, int64_t begin, int64_t end) {
  if constexpr (kSame<Args, RmsNormForward>) {
    const int64_t row_bytes = args.shape.dim * int64_t(sizeof(Input));
    if constexpr (sizeof(Input) > 2 && kSame<Input, Scale>) {
      if (is_for_pairs(row_bytes) && args.shape.groups == 1) {
        return forward_in_one_loop<2, kStores, Input, Scale>(args, begin, end);
      }
    }
    if (is_for_one_loop<Input>(row_bytes)) {
      return forward_in_one_loop<1, kStores, Input, Scale>(args, begin, end);
    }
  }
  forward_range<kStores, true, false, Order::kAsTheyCome, 0, Input, Scale>(args, begin, end);
}

template <bool kAskAhead, class Input, class Scale, class Args>
void forward_in_order(const Args& args, int64_t begin, int64_t end) {
  const bool in_turns = dim_of_turns(args.shape, args.input_strides) >= 0;
  with_known_dim<Input, Scale>(args.shape.dim, [&](auto known_dim) {
    constexpr int kDim = decltype(known_dim)::value;
    if (!in_turns) {
      forward_range<Stores::kCached, false, kAskAhead, Order::kAsTheyCome, kDim, Input, Scale>(
          args, begin, end);
      return;
    }
    if constexpr (!kSideBySide<false, Input>) {
      if (args.shape.groups % kBlockRows == 0) {
        forward_range<Stores::kCached, false, kAskAhead, Order::kAcross, kDim, Input, Scale>(
            args, begin, end);
        return;
      }
    }
    forward_range<Stores::kCached, false, kAskAhead, Order::kInTurns, kDim, Input, Scale>(
        args, begin, end);
  });
}

template <class Input, class Scale, class Args>
void forward(const Args& args, Streamed streamed, int64_t begin, int64_t end) {
  if constexpr (kStreams) {
    using Output = typename DTypeRule<Input, Scale>::Output;
    constexpr bool kAdds = kSame<Args, AddRmsNormForward>;
    constexpr bool kAnyRow = !kAdds && kStreamsRowsOf<Input, Scale>;
    const int64_t dim = args.shape.dim;
    bool done = false;
    if (streamed == Streamed::kAll) {
      done = with_streams<Output, kAnyRow>(dim, [&](auto stores) {
        forward_streamed<decltype(stores)::value, Input, Scale>(args, begin, end);
        stream_end((const Output*)args.output);
      });
    } else if constexpr (kAdds && sizeof(Input) > 2) {
      // The norm is read next, the sum only by the next addition. What the second addition takes is
      // more than is gained in 16 bits, and of short rows with AVX2.
      if (streamed == Streamed::kReadLate && (kStreamsOneByOne || dim >= 1024)) {
        done = with_streams<Input, false>(dim, [&](auto) {
          forward_range<Stores::kCached, true, true, Order::kAsTheyCome, 0, Input, Scale>(
              args, begin, end);
          stream_end((const Input*)args.new_residual);
        });
      }
    }
    if (done) return;
    if constexpr (!kAdds && sizeof(Input) > 2 && kSame<Input, Scale>) {
      with_known_dim<Input, Scale>(dim, [&](auto known_dim) {
        constexpr int kDim = decltype(known_dim)::value;
        done = is_for_single_rows<kDim>(args);
        if (done) forward_single_rows<kDim, Input>(args, begin, end);
      });
      if (done) return;
    }
    if (is_worth_asking<kAdds, Input>(args.shape) && asks_ahead<false, false, Input>(args)) {
      return forward_in_order<true, Input, Scale>(args, begin, end);
    }
  }
  forward_in_order<false, Input, Scale>(args, begin, end);
}

}  // namespace
}  // namespace coreai_torch
