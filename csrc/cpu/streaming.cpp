#include "cpu/streaming.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace coreai_torch {
namespace {

constexpr int64_t kLargerThanCaches = int64_t(24) << 20;  // bytes of output
constexpr int64_t kLine = 64;
constexpr int kSamples = 4;  // pages asked for, spread over the output

bool is_resident(const void* memory, int64_t bytes) {
#if defined(__linux__)
  static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  for (int i = 0; i < kSamples; ++i) {
    const uintptr_t address = uintptr_t(memory) + uintptr_t(bytes / kSamples * i + bytes / 8);
    unsigned char resident = 0;
    if (mincore(reinterpret_cast<void*>(address / page * page), 1, &resident) != 0) return false;
    if ((resident & 1) == 0) return false;
  }
  return true;
#else
  (void)memory;
  (void)bytes;
  return false;
#endif
}

}  // namespace

bool worth_streaming(const void* output, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kLargerThanCaches && row_bytes % kLine == 0 &&
         uintptr_t(output) % kLine == 0 && is_resident(output, rows * row_bytes);
}

}  // namespace coreai_torch
