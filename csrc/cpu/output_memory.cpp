#include "cpu/output_memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace coreai_torch {
namespace {

constexpr int64_t kLargerThanCaches = int64_t(48) << 20;  // bytes of all operands
constexpr int64_t kFillingCaches = kLargerThanCaches / 2;
constexpr int64_t kWorthAsking = int64_t(4) << 20;  // bytes of an output
constexpr int64_t kRequest = int64_t(512) << 10;

#if defined(__linux__)

#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // of Linux 5.14; older ones answer that they don't know it
#endif

uintptr_t page_size() {
  static const uintptr_t size = uintptr_t(sysconf(_SC_PAGESIZE));
  return size;
}

// Looks at four pages, which takes the system some microseconds. Of what is not to be streamed it
// looks at one, near the end, since a heap grows there.
bool is_resident(const OutputMemory& output, bool is_to_stream) {
  constexpr int kSamples = 4;
  const int last = is_to_stream ? 0 : kSamples - 1;
  for (int i = kSamples - 1; i >= last; --i) {
    const uintptr_t address =
        uintptr_t(output.data) + uintptr_t(output.bytes / kSamples * i + output.bytes / 8);
    const uintptr_t page = address / page_size() * page_size();
    unsigned char resident = 0;
    if (mincore(reinterpret_cast<void*>(page), 1, &resident) != 0) return false;
    if ((resident & 1) == 0) return false;
  }
  return true;
}

// Nothing is lost where this fails: pages are then handed out one by one, as they are written.
void request_pages(uintptr_t begin, uintptr_t end) {
  const uintptr_t first = begin / page_size() * page_size();
  const uintptr_t last = (end + page_size() - 1) / page_size() * page_size();
  madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE);
}

#else

bool is_resident(const OutputMemory&, bool) { return false; }
void request_pages(uintptr_t, uintptr_t) {}

#endif

}  // namespace

Outputs::Outputs(std::initializer_list<OutputMemory> outputs, int64_t all_bytes, bool can_stream) {
  if (can_stream && all_bytes >= kFillingCaches) {
    streamed_ = all_bytes >= kLargerThanCaches ? Streamed::kAll : Streamed::kReadLate;
  }
  for (const OutputMemory& output : outputs) {
    outputs_[count_++] = output;
    if (uintptr_t(output.data) % kLine != 0) streamed_ = Streamed::kNone;
    if (output.bytes >= kWorthAsking && !is_resident(output, streamed_ != Streamed::kNone)) {
      streamed_ = Streamed::kNone;
      if (output.unit_bytes > 0) {
        units_to_request_ = output.unit_bytes < kRequest ? kRequest / output.unit_bytes : 1;
      }
    }
  }
}

void Outputs::request(int64_t begin, int64_t end) const {
  for (int i = 0; i < count_; ++i) {
    const OutputMemory& output = outputs_[i];
    const int64_t last = end * output.unit_bytes;
    request_pages(
        uintptr_t(output.data) + begin * output.unit_bytes,
        uintptr_t(output.data) + (last < output.bytes ? last : output.bytes));
  }
}

}  // namespace coreai_torch
