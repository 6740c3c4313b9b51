// How large outputs are written, which depends on whether the system has handed out their memory.
#pragma once

#include <stdint.h>

#include <initializer_list>

#include "cpu/streamed.h"

namespace coreai_torch {

constexpr int64_t kLine = 64;  // bytes of a cache line

// A contiguous output of a kernel that is called for ranges of units: rows, or tasks of backward.
struct OutputMemory {
  void* data;
  int64_t bytes;
  int64_t unit_bytes;  // which the next unit's follow; 0 where a unit's are scattered
};

class Outputs {
 public:
  // `all_bytes`: of the kernel's large operands, the outputs among them. `can_stream`: can it store
  // past the caches, but for the operands' size and the outputs' alignment?
  Outputs(std::initializer_list<OutputMemory> outputs, int64_t all_bytes, bool can_stream);
  Outputs() = default;  // nothing is known of them

  // Stores past the caches save reading the lines that are about to be overwritten, a third of the
  // traffic of a copy, where the operands are so large that little of the output is found in the
  // cache by whoever reads it next. On memory that the system has yet to hand out they are the
  // wrong thing, 1.6 times as slow: its pages come zeroed, in the cache.
  // What is not read next is not worth room in the cache where operands are half as large.
  Streamed streamed() const { return streamed_; }

  // Such memory would be handed out page by page, with an interrupt for each. It is asked for in
  // pieces that stay in the cache until they are written, by the thread that writes them. This is
  // how many units a piece has, or 0 where the memory is there already.
  int64_t units_to_request() const { return units_to_request_; }
  void request(int64_t begin, int64_t end) const;

 private:
  static constexpr int kMost = 2;
  OutputMemory outputs_[kMost];
  int count_ = 0;
  Streamed streamed_ = Streamed::kNone;
  int64_t units_to_request_ = 0;
};

}  // namespace coreai_torch
