// When to store past the caches.
#pragma once

#include <stdint.h>

namespace coreai_torch {

// Streaming stores save reading the lines that are about to be overwritten, a third of the traffic
// of a copy, where the output is too large to be found in the cache by whoever reads it next. On
// memory that the system has yet to hand out they are the wrong thing (its pages come zeroed, in
// the cache): 1.6 times as slow. So it is asked whether the pages are there already.
bool worth_streaming(const void* output, int64_t rows, int64_t row_bytes);

}  // namespace coreai_torch
