// Who runs the threads is the caller's business: the kernels work on index ranges. Framework-free.
#pragma once

#include <stdint.h>

namespace coreai_torch {

// Calls body(begin, end, context) on disjoint ranges that together cover [begin, end), possibly at
// the same time, each at least `grain` long where that is possible, and returns when all are done.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor =
    void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

// A ParallelFor that makes one call on the calling thread.
void serial_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

}  // namespace coreai_torch
