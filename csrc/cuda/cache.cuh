// What the L2 cache is asked to keep.
#pragma once

#include "coreai_torch/rms_norm.h"
#include "device.cuh"

namespace coreai_torch {

// Are rows that have been read the last to leave the L2 cache? It writes results back in better
// order then. Only where an operand is so large that nothing of it, nor of the results, would be
// there when the next kernel asks for it: what that works with finds less room for a while.
template <class Input>
bool rows_are_evicted_last(const RmsNormShape& shape, int device) {
  const double bytes = double(shape.rows) * double(shape.dim) * sizeof(Input);
  return bytes >= 2.0 * double(l2_cache_bytes(device));
}

}  // namespace coreai_torch
