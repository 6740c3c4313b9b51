// The few vector operations that the row kernels need, at the SIMD level that this source file is
// compiled for. Each level provides, all with internal linkage:
//
//   Real                       the type of arithmetic: float (double in float64.h)
//   Pair                       a pair of native vectors, Pair::kLanes numbers of type Real in the
//                              order of the elements in memory
//   Vector                     32 bytes of Real
//   split(Pair, Vector*)       the pair as Vectors
//   splat(Real) + - *          elementwise, each rounded on its own: never a fused multiply-add,
//                              because the baseline has none and results have the same bits at
//                              every level
//   load(const T*) -> Pair     reads Pair::kLanes elements of type T, exact
//   store(T*, Pair)            rounds to T (to nearest, ties to even) and writes them
//   round_to<T>(Pair) -> Pair  rounds to T and back
//   load_first(const T*, n), store_first(T*, Pair, n)
//                              the first n < Pair::kLanes elements only; the other lanes load as
//                              zero
//   OfBFloat16                 a Pair that was computed from bfloat16 numbers only. If a NaN is
//                              among them, it is quiet and has no bits but a bfloat16's, so that
//                              store, store_first, stream and round_to<BFloat16>, which take it as
//                              well, may round it like a number
//   kStreams                   are there the next two? and is it worth having kernels of their own
//                              for operands beyond the caches?
//   stream(T*, Pair)           like store, past the caches; the address is a multiple of 64 bytes
//   stream_end(const T*)       makes what was streamed there visible to other threads
//   kStreamsAnyRow             is there the next one?
//   ShiftedStream<T>           streams a row that may begin and end within a line: all of its Pairs
//                              in order by write(i, Pair), where i is the place in the row, then
//                              what is left by write_first(i, Pair, n). It has a Pair or more, and
//                              something is left
//   kPrefersNormal<T>          is rounding to T faster if no number is denormal? A caller that
//                              knows (zeros may be there) says so by its type: store, store_first,
//                              stream and round_to<T> take a Normal, which is a Pair, as well
//   Smallest                   the means to know: of all numbers but zero that are added to it, the
//                              smallest magnitude, rounded up to a bfloat16; only with
//                              kPrefersNormal
//   kIsNative<T>               does the processor compute with T itself, rounding once? To 16 bits,
//                              that is what rounding the result in Real gives, which has more than
//                              twice as many digits (S. A. Figueroa, When is double rounding
//                              innocuous?, 1995)
//   Native                     then: Pair::kLanes numbers of type T, with + and *, store,
//                              store_first, stream, load_native(const T*),
//                              load_native_first(const T*, n) and rounded(Pair), widened() from and
//                              to a Pair
//   kForwardRows               rows normalised together, as many as the registers hold
//
// Files of a level see no header with external inline functions (no torch, no STL): the linker
// would keep one copy for the whole library, maybe one that an older processor cannot run.
#pragma once

#include <stdint.h>

#include "coreai_torch/dtype.h"

#if defined(__AVX512F__)
#include "cpu/simd/avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/avx2.h"
#else
#include "cpu/simd/portable.h"
#endif
