#pragma once

namespace coreai_torch {

// Which outputs of a kernel are stored past the caches: those that the kernels after it don't read,
// or all of them.
enum class Streamed { kNone, kReadLate, kAll };

}  // namespace coreai_torch
