// Which instance of a kernel takes rows of which width. The choice depends on the width, the dtypes
// and the alignment only, never on the number of rows, so that a row's result does not either.
#pragma once

#include "row_sum.cuh"

namespace coreai_torch {

// `row_threads` threads of each of `cluster` blocks share a row; each holds `accesses` accesses of
// it. A block has at least `least_block` threads, so narrow rows lie side by side in
// it.
template <int row_threads, int accesses, int cluster_ = 1, int least_block = 128>
struct Width {
  static constexpr int kRowThreads = row_threads;
  static constexpr int kAccesses = accesses;
  static constexpr int kCluster = cluster_;
  static constexpr int kBlock = row_threads < least_block ? least_block : row_threads;
  static constexpr int kBlockRows = kBlock / row_threads;
  static constexpr int64_t kRowAccesses = int64_t(row_threads) * accesses * cluster_;
};

template <class...>
struct Widths {};

// Calls f(Width) with the first width that a row of `accesses` accesses fits into and that f does
// not refuse by returning false. Returns false where none is left.
template <class F>
bool with_width(Widths<>, int64_t, F&&) {
  return false;
}
template <class First, class... Rest, class F>
bool with_width(Widths<First, Rest...>, int64_t accesses, F&& f) {
  if (accesses <= First::kRowAccesses && f(First{})) return true;
  return with_width(Widths<Rest...>{}, accesses, f);
}

// Rows whose accesses are 16 bytes of input.
template <bool kAdds>
struct ForwardWidthsOf {
  using Type = Widths<
      Width<8, 1>, Width<8, 2>, Width<16, 2>, Width<32, 2>, Width<64, 2>, Width<128, 2>,
      Width<64, 6>, Width<256, 2>, Width<128, 6>, Width<256, 4>, Width<256, 6>, Width<512, 4>,
      Width<1024, 4>, Width<1024, 8>, Width<1024, 8, 2>, Width<1024, 8, 4>, Width<1024, 8, 8>>;
};
// With the residual add, threads hold two rows at first.
template <>
struct ForwardWidthsOf<true> {
  using Type = Widths<
      Width<8, 1>, Width<16, 1>, Width<32, 1>, Width<32, 2>, Width<32, 4>, Width<64, 4>,
      Width<128, 4>, Width<256, 4>, Width<1024, 2>, Width<512, 4, 2>, Width<512, 4, 4>,
      Width<512, 4, 8>>;
};
template <bool kAdds>
using ForwardWidths = typename ForwardWidthsOf<kAdds>::Type;

// Rows that are read element by element, because of an odd width or an unaligned base.
using ForwardElementWidths = Widths<Width<32, 4>, Width<32, 8>, Width<128, 8>, Width<512, 8>>;

// Backward also holds for each column of the row a sum of grad_scale: 32 columns a thread are what
// the registers have room for. Blocks are larger where their rows need no barrier, so that there
// are fewer partial sums.
template <int row_threads, int accesses, int cluster = 1>
using BackwardWidth = Width<row_threads, accesses, cluster, row_threads <= 64 ? 256 : 128>;
template <int access_elements>
struct BackwardWidthsOf {
  using Type = Widths<
      BackwardWidth<8, 1>, BackwardWidth<8, 2>, BackwardWidth<16, 2>, BackwardWidth<32, 2>,
      BackwardWidth<64, 2>, BackwardWidth<128, 2>, BackwardWidth<256, 2>, BackwardWidth<320, 2>,
      BackwardWidth<512, 2>, BackwardWidth<512, 4>, BackwardWidth<512, 4, 2>,
      BackwardWidth<512, 4, 4>, BackwardWidth<512, 4, 8>>;
};
template <>
struct BackwardWidthsOf<1> {
  using Type = Widths<
      BackwardWidth<32, 1>, BackwardWidth<32, 8>, BackwardWidth<128, 8>, BackwardWidth<512, 8>>;
};
template <int access_elements>
using BackwardWidths = typename BackwardWidthsOf<access_elements>::Type;

}  // namespace coreai_torch
