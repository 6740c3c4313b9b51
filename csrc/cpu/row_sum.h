// Sums over a row in the order of ATen's sum over the last dimension on the CPU, so that the mean
// of squares has the same bits as the eager reference's. The order is defined on virtual lanes and
// is therefore the same at every SIMD level:
//
//   * A vector is 32 bytes of Real (8 floats). Vector v of the row belongs to accumulator v % 4, as
//     long as four vectors (a step) are left; every lane of an accumulator is summed on its own.
//   * Steps are summed in a cascade of four levels: after every 2^p steps the lowest level is added
//     to the next and cleared, after every 2^2p that one to its next, and so on, which keeps the
//     rounding error small for long rows. p = max(4, ceil(log2(steps)) / 4).
//   * Whole vectors after the last step are added to accumulator 0, then accumulators 1, 2, 3.
//   * The total is the sum, one by one, of the elements after the last whole vector and then of the
//     lanes.
//
// Adding up the lanes takes as long as summing a short row, so it is done for four rows at once,
// with the lanes of each in a column.
#pragma once

namespace coreai_torch {
namespace {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)  // would take minutes to compile
#define COREAI_TORCH_INLINE inline
#define COREAI_TORCH_INLINE_LAMBDA
#else
#define COREAI_TORCH_INLINE __attribute__((always_inline)) inline
#define COREAI_TORCH_INLINE_LAMBDA __attribute__((always_inline))
#endif

// A number as a type.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
  constexpr operator int() const { return value; }
};

// Calls body(i) for i from 0 to N - 1, inlined. Compilers decide what stays in registers before
// they unroll loops, and would keep an array that a loop goes through in memory.
template <int N, int i = 0, class Body>
COREAI_TORCH_INLINE void unrolled(const Body& body) {
  if constexpr (i < N) {
    body(Constant<i>());
    unrolled<N, i + 1>(body);
  }
}

constexpr int kVectorLanes = sizeof(Vector) / sizeof(Real);
constexpr int kAccumulators = 4;
constexpr int kStepLanes = kAccumulators * kVectorLanes;
constexpr int kStepPairs = kStepLanes / Pair::kLanes;
constexpr int kCascadeLevels = 4;
// AVX-512 has room for a second level of the cascade beside what a loop over a row needs.
constexpr bool kHasManyRegisters = kStepPairs == 1;

// How much of a Pair there is at the end of a row.
struct Whole {
  template <class T>
  Pair load_from(const T* p) const {
    return load(p);
  }
  template <class T>
  auto load_native_from(const T* p) const {
    return load_native(p);
  }
  template <class T, class Values>
  void store_to(T* p, Values v) const {
    store(p, v);
  }
  template <class T>
  void add_to(Smallest& smallest, const T* p) const {
    smallest.add(p);
  }
};
struct First {
  int64_t count;  // < Pair::kLanes; the lanes behind are zero

  template <class T>
  Pair load_from(const T* p) const {
    return load_first(p, count);
  }
  template <class T>
  auto load_native_from(const T* p) const {
    return load_native_first(p, count);
  }
  template <class T, class Values>
  void store_to(T* p, Values v) const {
    store_first(p, v, count);
  }
  template <class T>
  void add_to(Smallest& smallest, const T* p) const {
    smallest.add_first(p, count);
  }
};

// Calls body(part, i) for every Pair of elements from `begin` on, the last of which may be partial.
template <class Body>
COREAI_TORCH_INLINE void for_each_pair(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + Pair::kLanes <= end; i += Pair::kLanes) body(Whole(), i);
  if (i < end) body(First{end - i}, i);
}

constexpr int cascade_power(int64_t steps) {
  int power = 4;
  while (steps > int64_t(1) << (kCascadeLevels * (power + 1) - 1)) ++power;
  return power;
}

// One number for each of four rows.
typedef Real Quad __attribute__((vector_size(sizeof(Real) * 4)));
constexpr int kQuad = 4;

// {a[0], b[0], a[1], b[1]} and {a[2], b[2], a[3], b[3]}.
inline Quad interleave_low(Quad a, Quad b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Quad interleave_high(Quad a, Quad b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }

COREAI_TORCH_INLINE void transpose(const Quad* rows, Quad* columns) {
  const Quad a = interleave_low(rows[0], rows[2]), b = interleave_low(rows[1], rows[3]);
  const Quad c = interleave_high(rows[0], rows[2]), d = interleave_high(rows[1], rows[3]);
  columns[0] = interleave_low(a, b);
  columns[1] = interleave_high(a, b);
  columns[2] = interleave_low(c, d);
  columns[3] = interleave_high(c, d);
}

// Elements 4 * part to 4 * part + 3.
template <int part>
inline Quad quarter(Vector v) {
  constexpr int i = kQuad * part;
  return __builtin_shufflevector(v, v, i, i + 1, i + 2, i + 3);
}

// The order of the recipe above.
struct InOrder {
  // Sums the accumulators.
  static Vector fold(const Vector* accumulators) {
    return ((accumulators[0] + accumulators[1]) + accumulators[2]) + accumulators[3];
  }

  // The same where so many whole vectors are left after the steps.
  COREAI_TORCH_INLINE static Vector fold(
      const Vector* accumulators, const Vector* rest, int64_t count) {
    Vector sum = accumulators[0];
    unrolled<kAccumulators - 1>([&](auto v) COREAI_TORCH_INLINE_LAMBDA {
      if (v < count) sum += rest[v];
    });
    unrolled<kAccumulators - 1>([&](auto a)
                                    COREAI_TORCH_INLINE_LAMBDA { sum += accumulators[a + 1]; });
    return sum;
  }

  // The same where single elements are left, too. `rest` holds the dim % kStepLanes terms
  // after the steps; the dim % kVectorLanes that are left after the last whole vector go to `left`.
  __attribute__((noinline)) static void fold_with_rest(
      const Vector* accumulators, const Vector* rest, int64_t dim, Vector* lanes, Real* left) {
    const int64_t count = dim % kStepLanes / kVectorLanes;
    const int64_t left_count = dim % kVectorLanes;
    Vector sum = fold(accumulators, rest, count);
    const Vector last = rest[count];
    for (int64_t i = 0; i < left_count; ++i) left[i] = last[i];
    if (dim >= kAccumulators && dim < kVectorLanes) {  // single elements for vectors
      for (int64_t i = 1; i < dim; ++i) {
        const int64_t from = i + kAccumulators - 1;
        left[i] = from < dim ? last[from] : 0;
      }
      for (int a = 1; a < kAccumulators; ++a) sum[a - 1] = last[a];
    }
    *lanes = sum;
  }

  // Where there are fewer than four rows: the others, for `finish`.
  template <int kRows>
  COREAI_TORCH_INLINE static void repeat_first(
      Vector* lanes, Real (*left)[kVectorLanes], int64_t left_count) {
    for (int r = kRows; r < kQuad; ++r) {
      lanes[r] = lanes[0];
      for (int64_t i = 0; i < left_count; ++i) left[r][i] = left[0][i];
    }
  }

  // The totals of four rows, with left_count elements of each in `left`.
  COREAI_TORCH_INLINE static Quad finish(
      const Vector* lanes, const Real (*left)[kVectorLanes], int64_t left_count) {
    Quad total = {};
    for (int64_t i = 0; i < left_count; ++i) {
      total += Quad{left[0][i], left[1][i], left[2][i], left[3][i]};
    }
    add_columns<0>(lanes, total);
    if constexpr (kVectorLanes > kQuad) add_columns<1>(lanes, total);
    return total;
  }

 private:
  template <int part>
  COREAI_TORCH_INLINE static void add_columns(const Vector* lanes, Quad& total) {
    Quad rows[kQuad], columns[kQuad];
    for (int r = 0; r < kQuad; ++r) rows[r] = quarter<part>(lanes[r]);
    transpose(rows, columns);
    for (int c = 0; c < kQuad; ++c) total += columns[c];
  }
};

// A faster order, for sums that need not have the bits of ATen's: lanes are added up by halves, the
// upper half to the lower one, until one is left.
struct ByHalves {
  static Vector fold(const Vector* accumulators) {
    return (accumulators[0] + accumulators[2]) + (accumulators[1] + accumulators[3]);
  }

  static Quad finish(const Vector* lanes) {
    Quad rows[kQuad], columns[kQuad];
    for (int r = 0; r < kQuad; ++r) {
      rows[r] = quarter<0>(lanes[r]);
      if constexpr (kVectorLanes > kQuad) rows[r] += quarter<1>(lanes[r]);
    }
    transpose(rows, columns);
    return (columns[0] + columns[2]) + (columns[1] + columns[3]);
  }

  // The total of one row.
  static Real finish(Vector lanes) {
    Quad sum = quarter<0>(lanes);
    if constexpr (kVectorLanes > kQuad) sum += quarter<1>(lanes);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
};

// What the sums of a row depend on besides its elements.
struct RowLength {
  constexpr explicit RowLength(int64_t dim)
      : dim(dim),
        steps(dim / kStepLanes),
        left(dim % kVectorLanes),
        power(cascade_power(steps)),
        round(int64_t(1) << power),
        is_power_of_two((dim & (dim - 1)) == 0),
        inverse(1 / Real(dim)) {}

  // A multiplication has the same bits where it is exact, and takes less time.
  template <class Sums>
  Sums mean(Sums sums) const {
    return is_power_of_two ? sums * inverse : sums / Real(dim);
  }

  bool has_rounds() const { return steps >= round; }

  int64_t dim;
  int64_t steps;
  int64_t left;   // elements after the last whole Vector
  int power;      // of two: steps between two carries
  int64_t round;  // these steps
  bool is_power_of_two;
  Real inverse;
};

// N sums on the virtual lanes.
template <int N>
struct LaneSums {
  Pair of[N][kStepPairs];
};

template <int N>
COREAI_TORCH_INLINE void add_to(LaneSums<N>& sums, const LaneSums<N>& terms) {
  unrolled<N>([&](auto q) COREAI_TORCH_INLINE_LAMBDA {
    unrolled<kStepPairs>(
        [&](auto p) COREAI_TORCH_INLINE_LAMBDA { sums.of[q][p] = terms.of[q][p] + sums.of[q][p]; });
  });
}

// What terms() may keep of the elements besides their sums: nothing, or an object that is handed to
// it and that stays in registers along the way.
struct Nothing {};

// Sums over steps [begin, end).
template <int N, class Terms, class Kept>
COREAI_TORCH_INLINE LaneSums<N> sum_steps(
    const Terms& terms, int64_t begin, int64_t end, Kept& kept_outside) {
  Kept kept = kept_outside;
  LaneSums<N> sum;
  unrolled<N>([&](auto q) COREAI_TORCH_INLINE_LAMBDA {
    unrolled<kStepPairs>([&](auto p) COREAI_TORCH_INLINE_LAMBDA { sum.of[q][p] = splat(0); });
  });
  for (int64_t step = begin; step < end; ++step) {
    unrolled<kStepPairs>([&](auto p) COREAI_TORCH_INLINE_LAMBDA {
      Pair term[N];
      terms(Whole(), step * kStepLanes + p * Pair::kLanes, term, kept);
      unrolled<N>([&](auto q)
                      COREAI_TORCH_INLINE_LAMBDA { sum.of[q][p] = sum.of[q][p] + term[q]; });
    });
  }
  kept_outside = kept;
  return sum;
}

// Sums over all steps of a row that needs no more than the lowest two levels of the cascade. They
// stay in registers: a level in memory would wait for what the row before is still storing.
template <int N, class Terms, class Kept>
COREAI_TORCH_INLINE LaneSums<N> sum_two_levels(
    const RowLength& length, const Terms& terms, Kept& kept) {
  LaneSums<N> sum, carried;
  int64_t step = 0;
  while (true) {
    const bool is_round = step + length.round <= length.steps;
    sum = sum_steps<N>(terms, step, is_round ? step + length.round : length.steps, kept);
    if (step != 0) add_to(sum, carried);
    if (!is_round) return sum;
    carried = sum;
    step += length.round;
  }
}

// The same with all levels, in memory. The sums are written to `result`.
template <int N, class Terms, class Kept>
__attribute__((noinline)) void sum_rounds(
    const Terms& terms_outside, const RowLength& length, Real (*result)[kStepLanes], Kept& kept) {
  // What terms() captured, in registers: read from memory in the loop, it would be taken for what
  // is being written, wherever the last 12 bits of an address are the same.
  const Terms terms = terms_outside;
  alignas(64) Real carried[kCascadeLevels - 1][N][kStepLanes];
  bool filled[kCascadeLevels - 1] = {};
  const auto add_level = [&](int level, LaneSums<N>& sum) {
    for (int q = 0; q < N; ++q) {
      for (int p = 0; p < kStepPairs; ++p) {
        sum.of[q][p] = load(&carried[level][q][p * Pair::kLanes]) + sum.of[q][p];
      }
    }
  };
  const auto write = [](Real(*to)[kStepLanes], const LaneSums<N>& sum) {
    for (int q = 0; q < N; ++q) {
      for (int p = 0; p < kStepPairs; ++p) store(&to[q][p * Pair::kLanes], sum.of[q][p]);
    }
  };
  const auto carry_to = [&](int level, LaneSums<N>& sum) {
    if (filled[level]) add_level(level, sum);
    write(carried[level], sum);
    filled[level] = true;
  };
  int64_t step = 0;
  while (step + length.round <= length.steps) {
    LaneSums<N> sum = sum_steps<N>(terms, step, step + length.round, kept);
    step += length.round;
    carry_to(0, sum);
    for (int level = 1; level < kCascadeLevels - 1; ++level) {
      if (step & ((length.round - 1) << (level * length.power))) break;
      carry_to(level, sum);
      filled[level - 1] = false;
    }
  }
  LaneSums<N> sum = sum_steps<N>(terms, step, length.steps, kept);
  for (int level = 0; level < kCascadeLevels - 1; ++level) {
    if (filled[level]) add_level(level, sum);
  }
  write(result, sum);
}

// May a row have whole rounds of steps? That none has leaves out what they take.
enum class Rounds { kNone, kAny };

// Sums N quantities over a row at once, up to their lanes. terms(part, i, out, kept) sets out[0..N)
// to the terms of the elements from i on. `left` is for InOrder only, see there.
template <class Order, int N, Rounds kRounds = Rounds::kAny, class Terms, class Kept>
COREAI_TORCH_INLINE void row_sums(
    const RowLength& length, const Terms& terms, Vector* lanes, Real (*left)[kVectorLanes],
    Kept& kept) {
  LaneSums<N> sum;
  if (kRounds == Rounds::kNone || (!kHasManyRegisters && !length.has_rounds())) {
    sum = sum_steps<N>(terms, 0, length.steps, kept);
  } else if (kHasManyRegisters && length.steps < length.round * length.round) {
    sum = sum_two_levels<N>(length, terms, kept);
  } else {
    alignas(64) Real all_steps[N][kStepLanes];
    const Terms copy = terms;  // so that the other branches have no address to respect
    sum_rounds<N>(copy, length, all_steps, kept);
    unrolled<N>([&](auto q) COREAI_TORCH_INLINE_LAMBDA {
      unrolled<kStepPairs>([&](auto p) COREAI_TORCH_INLINE_LAMBDA {
        sum.of[q][p] = load(&all_steps[q][p * Pair::kLanes]);
      });
    });
  }

  const int64_t whole = length.steps * kStepLanes;
  if (whole < length.dim) {
    if constexpr (kSame<Order, InOrder>) {
      Vector rest[N][kAccumulators], accumulators[N][kAccumulators];
      // Levels that have no register for a Vector keep these in memory, and would split a Pair into
      // single numbers.
      constexpr bool kInMemory = kStepPairs > 2;
      const auto spill = [](Pair v, Vector* parts) COREAI_TORCH_INLINE_LAMBDA {
        if constexpr (kInMemory) {
          __builtin_memcpy(parts, &v, sizeof(v));
        } else {
          split(v, parts);
        }
      };
      const auto take = [&](auto part, int64_t i) COREAI_TORCH_INLINE_LAMBDA {
        Pair term[N];
        terms(part, i, term, kept);
        unrolled<N>([&](auto q) COREAI_TORCH_INLINE_LAMBDA {
          spill(term[q], rest[q] + (i - whole) / kVectorLanes);
        });
      };
      if constexpr (kStepPairs == 1) {
        take(First{length.dim - whole}, whole);
      } else if constexpr (kStepPairs == 2) {  // in registers, as no loop is
        const int64_t second = whole + Pair::kLanes;
        if (second <= length.dim) take(Whole(), whole);
        if (second < length.dim) take(First{length.dim - second}, second);
        if (second > length.dim) take(First{length.dim - whole}, whole);
      } else {
        for_each_pair(whole, length.dim, [&](auto part, int64_t i) { take(part, i); });
      }
      unrolled<N>([&](auto q) COREAI_TORCH_INLINE_LAMBDA {
        unrolled<kStepPairs>([&](auto p) COREAI_TORCH_INLINE_LAMBDA {
          spill(sum.of[q][p], accumulators[q] + p * (Pair::kLanes / kVectorLanes));
        });
      });
      if (length.left == 0) {
        const int64_t count = (length.dim - whole) / kVectorLanes;
        unrolled<N>([&](auto q) COREAI_TORCH_INLINE_LAMBDA {
          lanes[q] = Order::fold(accumulators[q], rest[q], count);
        });
      } else {
        for (int q = 0; q < N; ++q) {
          Vector folded;
          Order::fold_with_rest(accumulators[q], rest[q], length.dim, &folded, left[q]);
          lanes[q] = folded;
        }
      }
      return;
    } else {
      unrolled<kStepPairs>([&](auto p) COREAI_TORCH_INLINE_LAMBDA {
        const int64_t i = whole + p * Pair::kLanes;
        const auto add = [&](auto part) COREAI_TORCH_INLINE_LAMBDA {
          Pair term[N];
          terms(part, i, term, kept);
          unrolled<N>([&](auto q)
                          COREAI_TORCH_INLINE_LAMBDA { sum.of[q][p] = sum.of[q][p] + term[q]; });
        };
        if (i + Pair::kLanes <= length.dim) {
          add(Whole());
        } else if (i < length.dim) {
          add(First{length.dim - i});
        }
      });
    }
  }
  unrolled<N>([&](auto q) COREAI_TORCH_INLINE_LAMBDA {
    Vector accumulators[kAccumulators];
    unrolled<kStepPairs>([&](auto p) COREAI_TORCH_INLINE_LAMBDA {
      split(sum.of[q][p], accumulators + p * (Pair::kLanes / kVectorLanes));
    });
    lanes[q] = Order::fold(accumulators);
  });
}

}  // namespace
}  // namespace coreai_torch
