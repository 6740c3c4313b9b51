// The memory checker. Kernels are compiled with -fsanitize=thread, but linked to functions of our
// own instead of that tool's library, so that every load and store of a kernel is seen here. It
// reports, whatever the schedule: accesses outside of every buffer, misaligned accesses, reads of
// what was never written, and pairs of accesses to one place, at least one of them a write, that no
// barrier orders. It counts the bytes that move.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace simt {

// Of the running thread, within its cluster.
unsigned current_thread();
bool on_own_stack(const void* p);

namespace check {

void launch_begin(
    unsigned char* const* shared, unsigned blocks, size_t shared_bytes, unsigned threads);
void launch_end();
void blocks_begin();  // of a cluster, or of a single block
void block_barrier(unsigned block);
void cluster_barrier();

}  // namespace check
}  // namespace simt
