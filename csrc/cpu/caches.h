// What the kernels ask about the processor's caches.
#pragma once

#include <stdint.h>

namespace coreai_torch {

// Bytes of a core's first data cache; 32 KiB, which few have less than, if the system doesn't say.
int64_t first_cache_bytes();

}  // namespace coreai_torch
