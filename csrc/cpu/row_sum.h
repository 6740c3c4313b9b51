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
#pragma once

namespace coreai_torch {
namespace {

constexpr int kVectorLanes = 32 / sizeof(Real);
constexpr int kAccumulators = 4;
constexpr int kStepLanes = kAccumulators * kVectorLanes;
constexpr int kStepPairs = kStepLanes / Pair::kLanes;
constexpr int kCascadeLevels = 4;

// How much of a Pair there is at the end of a row.
struct Whole {
  template <class T>
  Pair load_from(const T* p) const {
    return load(p);
  }
  template <class T>
  void store_to(T* p, Pair v) const {
    store(p, v);
  }
};
struct Streamed : Whole {
  template <class T>
  void store_to(T* p, Pair v) const {
    stream(p, v);
  }
};
struct First {
  int64_t count;  // < Pair::kLanes; the lanes behind are zero

  template <class T>
  Pair load_from(const T* p) const {
    return load_first(p, count);
  }
  template <class T>
  void store_to(T* p, Pair v) const {
    store_first(p, v, count);
  }
};

// Calls body(part, i) for every Pair of elements from `begin` on, the last of which may be partial.
template <class Part = Whole, class Body>
inline void for_each_pair(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + Pair::kLanes <= end; i += Pair::kLanes) body(Part(), i);
  if (i < end) body(First{end - i}, i);
}

inline int cascade_power(int64_t steps) {
  int power = 4;
  while (steps > int64_t(1) << (kCascadeLevels * (power + 1) - 1)) ++power;
  return power;
}

// The end of the recipe above. `accumulators` holds the sum of all whole steps; `rest` the
// dim % kStepLanes elements after them.
inline Real finish_row_sum(const Real* accumulators, const Real* rest, int64_t dim) {
  const int64_t rest_count = dim % kStepLanes;
  if (dim < kVectorLanes) {  // the same recipe with single elements for vectors
    Real parts[kAccumulators] = {};
    const int64_t whole = dim / kAccumulators * kAccumulators;
    for (int64_t i = 0; i < whole; ++i) parts[i] = rest[i];
    Real sum = parts[0];
    for (int64_t i = whole; i < dim; ++i) sum += rest[i];
    for (int i = 1; i < kAccumulators; ++i) sum += parts[i];
    return sum;
  }
  typedef Real Vector
      __attribute__((vector_size(sizeof(Real) * kVectorLanes), aligned(sizeof(Real)), may_alias));
  const auto vector_at = [](const Real* p) { return (const Vector*)p; };
  Vector lanes = *vector_at(accumulators);
  int64_t done = 0;
  for (; done + kVectorLanes <= rest_count; done += kVectorLanes) lanes += *vector_at(rest + done);
  for (int a = 1; a < kAccumulators; ++a) lanes += *vector_at(accumulators + a * kVectorLanes);
  Real sum = 0;
  for (int64_t i = done; i < rest_count; ++i) sum += rest[i];
  for (int i = 0; i < kVectorLanes; ++i) sum += lanes[i];
  return sum;
}

// Sums N quantities over a row at once. terms(part, i, out) sets out[0..N) to the terms of the
// elements from i on.
template <int N, class Terms>
inline void row_sums(int64_t dim, const Terms& terms, Real* sums) {
  Pair sum[N][kStepPairs];
  Pair carried[kCascadeLevels - 1][N][kStepPairs];
  for (int q = 0; q < N; ++q) {
    for (int p = 0; p < kStepPairs; ++p) sum[q][p] = splat(0);
  }
  const auto add_step = [&](int64_t step) {
    for (int p = 0; p < kStepPairs; ++p) {
      Pair term[N];
      terms(Whole(), step * kStepLanes + p * Pair::kLanes, term);
      for (int q = 0; q < N; ++q) sum[q][p] = sum[q][p] + term[q];
    }
  };

  const int64_t steps = dim / kStepLanes;
  const int power = cascade_power(steps);
  const int64_t round = int64_t(1) << power;
  const bool cascades = steps >= round;
  if (cascades) {
    for (auto& level : carried) {
      for (int q = 0; q < N; ++q) {
        for (int p = 0; p < kStepPairs; ++p) level[q][p] = splat(0);
      }
    }
  }
  int64_t step = 0;
  while (step + round <= steps) {
    for (const int64_t stop = step + round; step < stop; ++step) add_step(step);
    for (int q = 0; q < N; ++q) {
      for (int p = 0; p < kStepPairs; ++p) {
        carried[0][q][p] = carried[0][q][p] + sum[q][p];
        sum[q][p] = splat(0);
      }
    }
    for (int level = 1; level < kCascadeLevels - 1; ++level) {
      if (step & ((round - 1) << (level * power))) break;
      for (int q = 0; q < N; ++q) {
        for (int p = 0; p < kStepPairs; ++p) {
          carried[level][q][p] = carried[level][q][p] + carried[level - 1][q][p];
          carried[level - 1][q][p] = splat(0);
        }
      }
    }
  }
  for (; step < steps; ++step) add_step(step);
  if (cascades) {
    for (auto& level : carried) {
      for (int q = 0; q < N; ++q) {
        for (int p = 0; p < kStepPairs; ++p) sum[q][p] = sum[q][p] + level[q][p];
      }
    }
  }

  alignas(64) Real rest[N][kStepLanes];  // finish_row_sum() may be compiled for aligned ones
  for_each_pair(steps * kStepLanes, dim, [&](auto part, int64_t i) {
    Pair term[N];
    terms(part, i, term);
    for (int q = 0; q < N; ++q) store(&rest[q][i - steps * kStepLanes], term[q]);
  });
  for (int q = 0; q < N; ++q) {
    alignas(64) Real accumulators[kStepLanes];
    for (int p = 0; p < kStepPairs; ++p) store(&accumulators[p * Pair::kLanes], sum[q][p]);
    sums[q] = finish_row_sum(accumulators, rest[q], dim);
  }
}

}  // namespace
}  // namespace coreai_torch
