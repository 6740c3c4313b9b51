#include "coreai_torch/parallel.h"

namespace coreai_torch {

void serial_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  if (begin < end) body(begin, end, context);
}

}  // namespace coreai_torch
