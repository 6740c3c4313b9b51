// Shadow memory: for every two bytes of every buffer, who last wrote and read them, and when. Time
// is a counter that each barrier advances; two accesses are ordered if a barrier that both threads
// took part in lies between them.
#include "check.h"

#include <link.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "simt.h"

namespace simt::check {
namespace {

constexpr size_t kGranule = 2;  // bytes: the smallest element
constexpr unsigned kWarp = 32;

struct Access {
  uint32_t time = 0;
  uint32_t thread = 0;      // within its cluster
  bool by_several = false;  // by threads of several warps since the last barrier
  bool any() const { return time != 0; }
};

struct Cell {
  Access write, read;
  bool initialized = false;
};

struct Traffic {
  uint64_t read = 0, written = 0;            // bytes
  uint64_t read_wide = 0, written_wide = 0;  // those of them that moved in accesses of 16 bytes
};

struct Region {
  unsigned char* base;
  size_t bytes;
  std::string name;
  bool shared;
  std::vector<Cell> cells;
  Traffic traffic;

  Region(void* p, size_t size, std::string what, bool is_shared)
      : base(static_cast<unsigned char*>(p)),
        bytes(size),
        name(std::move(what)),
        shared(is_shared),
        cells((size + kGranule - 1) / kGranule) {}
  bool holds(const unsigned char* p) const { return p >= base && p < base + bytes; }
};

std::vector<Region*> device_memory;  // by address
std::vector<Region*> shared_memory;  // of the blocks that run
uint32_t now = 1;
uint32_t launch_time = 1;           // when the launch began,
uint32_t blocks_time = 1;           // when the running blocks began,
uint32_t cluster_time = 1;          // when they last met,
std::vector<uint32_t> block_times;  // and when the threads of each block last met
unsigned block_threads = 1;
bool active = false;
bool saw_access = false;

// Addresses of this library: constants in it may be read, and they turn code addresses into the
// offsets that addr2line knows.
uintptr_t image_begin = 0, image_end = 0;

int find_image(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<uintptr_t>(&find_image);
  uintptr_t begin = UINTPTR_MAX, end = 0;
  bool is_this = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    const uintptr_t first = info->dlpi_addr + segment.p_vaddr;
    const uintptr_t last = first + segment.p_memsz;
    begin = std::min(begin, first);
    end = std::max(end, last);
    is_this = is_this || (here >= first && here < last);
  }
  if (!is_this) return 0;
  image_begin = begin;
  image_end = end;
  return 1;
}

Region* find(const void* p) {
  const auto* address = static_cast<const unsigned char*>(p);
  for (Region* region : shared_memory) {
    if (region->holds(address)) return region;
  }
  auto after = std::upper_bound(
      device_memory.begin(), device_memory.end(), address,
      [](const unsigned char* value, const Region* region) { return value < region->base; });
  if (after == device_memory.begin()) return nullptr;
  Region* region = *--after;
  return region->holds(address) ? region : nullptr;
}

// Was an earlier access ordered before what thread `me` does now?
bool is_ordered(const Region& region, const Access& earlier, unsigned me) {
  if (earlier.time < (region.shared ? blocks_time : launch_time)) return true;
  if (earlier.time < blocks_time) return false;  // by another block of this launch
  if (earlier.time < cluster_time) return true;
  const unsigned block = me / block_threads;
  if (!earlier.by_several && earlier.thread == me) return true;
  return earlier.thread / block_threads == block && earlier.time < block_times[block];
}

struct Site {
  size_t bytes;
  bool write;
  uintptr_t pc;
  const char* verb() const { return write ? "write" : "read"; }
};

void check_granule(Region& region, size_t granule, const Site& site, unsigned me) {
  Cell& cell = region.cells[granule];
  const size_t offset = granule * kGranule;
  if (cell.write.any() && !is_ordered(region, cell.write, me)) {
    fail(
        "race: %s of %s at byte %zu, written by thread %u of %s without a barrier between (pc "
        "%#zx)",
        site.verb(), region.name.c_str(), offset, cell.write.thread % block_threads,
        cell.write.time < blocks_time ? "another block" : "these blocks", size_t(site.pc));
  }
  if (site.write) {
    if (cell.read.any() && !is_ordered(region, cell.read, me)) {
      fail(
          "race: write of %s at byte %zu, read by thread %u without a barrier between (pc %#zx)",
          region.name.c_str(), offset, cell.read.thread % block_threads, size_t(site.pc));
    }
    cell.write = {now, me, false};
    cell.initialized = true;
    return;
  }
  const bool readable =
      region.shared ? cell.write.any() && cell.write.time >= blocks_time : cell.initialized;
  if (!readable) {
    fail(
        "read of uninitialized %s at byte %zu (pc %#zx)", region.name.c_str(), offset,
        size_t(site.pc));
  }
  const bool joins = cell.read.any() && !is_ordered(region, cell.read, me);
  cell.read = {now, me, joins};
}

// Kernels may also read their arguments and what describes the running thread.
bool is_ours(const void* p, bool write) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const auto thread = reinterpret_cast<uintptr_t>(current);
  if (!write && address >= image_begin && address < image_end) return true;
  return address >= thread && address < thread + sizeof(Thread);
}

void check_access(const void* p, size_t bytes, bool write, const void* pc) {
  if (!active || !current || on_own_stack(p)) return;
  saw_access = true;
  const Site site = {bytes, write, reinterpret_cast<uintptr_t>(pc) - image_begin - 1};
  Region* region = find(p);
  if (!region) {
    if (is_ours(p, write)) return;
    fail("%s of %zu bytes outside of every buffer (pc %#zx)", site.verb(), bytes, size_t(site.pc));
  }
  const size_t offset = static_cast<const unsigned char*>(p) - region->base;
  if (offset + bytes > region->bytes) {
    fail(
        "%s of %zu bytes at byte %zu runs past the end of %s, %zu bytes (pc %#zx)", site.verb(),
        bytes, offset, region->name.c_str(), region->bytes, size_t(site.pc));
  }
  const bool power_of_two = (bytes & (bytes - 1)) == 0;
  if (bytes <= 16 && power_of_two && reinterpret_cast<uintptr_t>(p) % bytes) {
    fail(
        "misaligned %s of %zu bytes of %s at byte %zu (pc %#zx)", site.verb(), bytes,
        region->name.c_str(), offset, size_t(site.pc));
  }
  (write ? region->traffic.written : region->traffic.read) += bytes;
  if (bytes == 16) (write ? region->traffic.written_wide : region->traffic.read_wide) += bytes;
  const unsigned me = current_thread();
  for (size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    check_granule(*region, i, site, me);
  }
}

}  // namespace

void launch_begin(
    unsigned char* const* shared, unsigned blocks, size_t shared_bytes, unsigned threads) {
  if (!image_begin) dl_iterate_phdr(find_image, nullptr);
  launch_time = ++now;
  block_threads = threads / blocks;
  block_times.assign(blocks, now);
  for (unsigned i = 0; i < blocks; ++i) {
    shared_memory.push_back(new Region(shared[i], shared_bytes, "shared memory", true));
  }
  active = true;
}

void launch_end() {
  for (Region* region : shared_memory) delete region;
  shared_memory.clear();
  active = false;
}

void blocks_begin() {
  blocks_time = cluster_time = ++now;
  for (uint32_t& time : block_times) time = now;
}

void block_barrier(unsigned block) { block_times[block] = ++now; }
void cluster_barrier() { cluster_time = ++now; }

}  // namespace simt::check

namespace simt {

void on_access(const void* p, size_t bytes, bool write, const void* pc) {
  check::check_access(p, bytes, write, pc);
}

}  // namespace simt

// ---- device memory, for the tests
// ------------------------------------------------------------------

using simt::check::Region;

extern "C" {

// Exactly so many bytes, at a multiple of 256, filled with NaN and not initialized.
void* simt_allocate(size_t bytes, const char* name) {
  void* p = nullptr;
  if (posix_memalign(&p, 256, bytes ? bytes : 1) != 0) return nullptr;
  memset(p, 0xff, bytes);
  auto* region = new Region(p, bytes, name, false);
  auto& all = simt::check::device_memory;
  all.insert(
      std::upper_bound(
          all.begin(), all.end(), region,
          [](const Region* a, const Region* b) { return a->base < b->base; }),
      region);
  return p;
}

void simt_free(void* p) {
  auto& all = simt::check::device_memory;
  const auto found =
      std::find_if(all.begin(), all.end(), [p](const Region* region) { return region->base == p; });
  if (found == all.end()) return;
  delete *found;
  all.erase(found);
  free(p);
}

void simt_copy_to_device(void* p, const void* from, size_t bytes) {
  memcpy(p, from, bytes);
  Region* region = simt::check::find(p);
  const size_t first = (static_cast<unsigned char*>(p) - region->base) / simt::check::kGranule;
  const size_t count = (bytes + simt::check::kGranule - 1) / simt::check::kGranule;
  for (size_t i = first; i < first + count; ++i) region->cells[i].initialized = true;
}

// Bytes read, written, and those of them that moved in accesses of 16 bytes.
void simt_traffic(const void* p, uint64_t* counts) {
  const auto& traffic = simt::check::find(p)->traffic;
  counts[0] = traffic.read;
  counts[1] = traffic.written;
  counts[2] = traffic.read_wide;
  counts[3] = traffic.written_wide;
}

// Has the checker seen anything yet? (Is it compiled in?)
int simt_saw_access() { return simt::check::saw_access; }

// ---- what -fsanitize=thread makes kernels call
// -----------------------------------------------------

#define SIMT_HOOK(name, bytes, write) \
  void name(void* p) { simt::check::check_access(p, bytes, write, __builtin_return_address(0)); }
#define SIMT_HOOKS(bytes)                               \
  SIMT_HOOK(__tsan_read##bytes, bytes, false)           \
  SIMT_HOOK(__tsan_write##bytes, bytes, true)           \
  SIMT_HOOK(__tsan_unaligned_read##bytes, bytes, false) \
  SIMT_HOOK(__tsan_unaligned_write##bytes, bytes, true)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  simt::check::check_access(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  simt::check::check_access(p, bytes, true, __builtin_return_address(0));
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  simt::check::check_access(from, bytes, false, __builtin_return_address(0));
  simt::check::check_access(to, bytes, true, __builtin_return_address(0));
  return memcpy(to, from, bytes);
}
void* __tsan_memset(void* p, int value, size_t bytes) {
  simt::check::check_access(p, bytes, true, __builtin_return_address(0));
  return memset(p, value, bytes);
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

}  // extern "C"
