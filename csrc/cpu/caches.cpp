#include "cpu/caches.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace coreai_torch {

int64_t first_cache_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t said = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (said > 0) return said;
#endif
  return 32768;
}

}  // namespace coreai_torch
