// Fibers, warps, blocks, clusters.
#include "simt.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <string>
#include <vector>

#include "check.h"

// ---- context switch
// ------------------------------------------------------------------------------ simt_switch(save,
// load): stores the callee-saved registers on the stack, the stack pointer in *save, and goes on
// where the stack `load` was left.

#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#else
#include <ucontext.h>
#define SIMT_UCONTEXT 1
#endif

namespace simt {

Thread* current = nullptr;
Index3 block_size = {1, 1, 1};
Index3 grid_size = {1, 1, 1};

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr uint64_t kStackGuard = 0x5afe57acc0ffee00;

enum class State : uint8_t { kReady, kInShuffle, kInBlockBarrier, kInClusterBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  const void* pc;
};

struct Fiber : Thread {
  char* stack = nullptr;
#ifdef SIMT_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  State state = State::kReady;
  unsigned index = 0, block = 0, warp = 0, lane = 0;  // all but lane: within the cluster
  uint32_t mask = 0;                                  // of the shuffle that it is in
  uint64_t value = 0;
  int lanes = 0;
  const char* file = "start";
  int line = 0;
  std::vector<Copy> copies;     // under way, in their order
  std::vector<size_t> batches;  // how many of them each batch has
  size_t in_open_batch = 0;
};

struct Warp {
  unsigned first = 0;                           // fiber
  uint32_t exists = 0, ready = 0, waiting = 0;  // lanes
};

std::vector<Fiber> fibers;  // of one cluster
std::vector<Warp> warps;
std::vector<char*> stacks;
std::vector<unsigned char*> shared;  // of each block of the cluster
std::vector<unsigned> waiting_in_block;
std::vector<bool> block_has_exits;
size_t shared_bytes = 0;
unsigned block_threads = 0;
unsigned waiting_in_cluster = 0;
unsigned cluster_barriers = 0;
unsigned last_warp = 0;
void (*thread_body)(void*) = nullptr;
void* thread_context = nullptr;
std::string error;
Schedule schedule = Schedule::kForward;
uint64_t random_state = 1;
#ifdef SIMT_UCONTEXT
ucontext_t scheduler_context;
#else
void* scheduler_stack_pointer = nullptr;
#endif

Fiber* self() { return static_cast<Fiber*>(current); }

uint64_t random_number() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

std::string describe(const Fiber& fiber) {
  static const char* const kStates[] = {
      "running", "a shuffle", "__syncthreads", "cluster_sync", "exit"};
  char text[256];
  snprintf(
      text, sizeof(text), "block %u thread %u at %s, %s:%d", fiber.block_index.x,
      fiber.thread_index.x, kStates[int(fiber.state)], fiber.file, fiber.line);
  return text;
}

void set_error(const std::string& text) {
  if (error.empty()) error = text;
}

// ---- switching
// -----------------------------------------------------------------------------------

void give_way() {
#ifdef SIMT_UCONTEXT
  swapcontext(&self()->context, &scheduler_context);
#else
  simt_switch(&self()->stack_pointer, scheduler_stack_pointer);
#endif
}

void fiber_main() {
  thread_body(thread_context);
  self()->state = State::kDone;
  give_way();
  abort();
}

void prepare(Fiber& fiber) {
  memcpy(fiber.stack, &kStackGuard, sizeof(kStackGuard));
#ifdef SIMT_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#else
  // As simt_switch leaves a stack: six registers, then the address to return to. At entry of a
  // function the stack pointer is 8 above a multiple of 16.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 16);
  *top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

void resume(Fiber& fiber) {
  current = &fiber;
#ifdef SIMT_UCONTEXT
  swapcontext(&scheduler_context, &fiber.context);
#else
  simt_switch(&scheduler_stack_pointer, fiber.stack_pointer);
#endif
  if (memcmp(fiber.stack, &kStackGuard, sizeof(kStackGuard)) != 0) {
    fprintf(stderr, "simt: a thread's stack overflowed\n");
    abort();
  }
}

// ---- meetings
// ------------------------------------------------------------------------------------

void wake(Fiber& fiber) {
  fiber.state = State::kReady;
  warps[fiber.warp].ready |= 1u << fiber.lane;
}

void finish_shuffle(Warp& warp, uint32_t mask) {
  Fiber* lanes = &fibers[warp.first];
  const Fiber& leader = lanes[__builtin_ctz(mask)];
  uint64_t values[kWarp] = {};
  for (uint32_t left = mask; left; left &= left - 1) {
    const Fiber& fiber = lanes[__builtin_ctz(left)];
    if (fiber.mask != mask || fiber.line != leader.line || fiber.file != leader.file) {
      return set_error(
          "lanes of one warp meet in different shuffles: " + describe(leader) + " and " +
          describe(fiber));
    }
    const unsigned source = fiber.lane ^ unsigned(fiber.lanes);
    if (source >= kWarp || !(mask >> source & 1)) {
      return set_error(
          "a shuffle reads lane " + std::to_string(source) +
          ", which is not in the mask: " + describe(fiber));
    }
    values[fiber.lane] = lanes[source].value;
  }
  warp.waiting &= ~mask;
  for (uint32_t left = mask; left; left &= left - 1) {
    Fiber& fiber = lanes[__builtin_ctz(left)];
    fiber.value = values[fiber.lane];
    wake(fiber);
  }
}

void enter_shuffle(Fiber& fiber) {
  Warp& warp = warps[fiber.warp];
  if (!(fiber.mask >> fiber.lane & 1) || (fiber.mask & ~warp.exists)) {
    return set_error(
        "a shuffle's mask lacks the lane itself or names lanes that do not exist: " +
        describe(fiber));
  }
  warp.waiting |= 1u << fiber.lane;
  if ((warp.waiting & fiber.mask) == fiber.mask) finish_shuffle(warp, fiber.mask);
}

void enter_block_barrier(const Fiber& fiber) {
  if (++waiting_in_block[fiber.block] < block_threads) return;
  waiting_in_block[fiber.block] = 0;
  Fiber* first = &fibers[fiber.block * block_threads];
  for (unsigned i = 0; i < block_threads; ++i) {
    if (first[i].line != first->line || first[i].file != first->file) {
      return set_error(
          "threads of one block meet in different barriers: " + describe(*first) + " and " +
          describe(first[i]));
    }
  }
  check::block_barrier(fiber.block);
  for (unsigned i = 0; i < block_threads; ++i) wake(first[i]);
}

void enter_cluster_barrier() {
  if (++waiting_in_cluster < fibers.size()) return;
  waiting_in_cluster = 0;
  ++cluster_barriers;
  check::cluster_barrier();
  for (Fiber& fiber : fibers) wake(fiber);
}

// ---- scheduling
// ----------------------------------------------------------------------------------

unsigned pick_warp() {
  const unsigned count = unsigned(warps.size());
  const bool random = schedule == Schedule::kRandom || schedule == Schedule::kGreedy;
  unsigned warp = last_warp;
  if (random) {
    if (schedule == Schedule::kGreedy && warps[warp].ready) return warp;
    warp = unsigned(random_number() % count);
  }
  while (!warps[warp].ready) {
    warp = schedule == Schedule::kReverse ? (warp + count - 1) % count : (warp + 1) % count;
  }
  return warp;
}

// The fiber to run next, or -1 where none can.
int pick() {
  bool any = false;
  for (const Warp& warp : warps) any = any || warp.ready;
  if (!any) return -1;
  last_warp = pick_warp();
  const Warp& warp = warps[last_warp];
  uint32_t ready = warp.ready;
  if (schedule == Schedule::kReverse) return int(warp.first + 31 - __builtin_clz(ready));
  if (schedule != Schedule::kForward) {
    const int skipped = int(random_number() % unsigned(__builtin_popcount(ready)));
    for (int i = 0; i < skipped; ++i) ready &= ready - 1;
  }
  return int(warp.first) + __builtin_ctz(ready);
}

void run_cluster() {
  size_t live = fibers.size();
  while (live && error.empty()) {
    const int next = pick();
    if (next < 0) {
      std::string text = "deadlock:";
      int shown = 0;
      for (const Fiber& fiber : fibers) {
        if (fiber.state != State::kDone && shown++ < 4) text += " [" + describe(fiber) + "]";
      }
      return set_error(text);
    }
    Fiber& fiber = fibers[next];
    warps[fiber.warp].ready &= ~(1u << fiber.lane);
    resume(fiber);
    if (!error.empty()) return;
    switch (fiber.state) {
      case State::kInShuffle:
        enter_shuffle(fiber);
        break;
      case State::kInBlockBarrier:
        enter_block_barrier(fiber);
        break;
      case State::kInClusterBarrier:
        enter_cluster_barrier();
        break;
      default:
        if (!fiber.copies.empty()) {
          return set_error("a thread ends without waiting for its copies: " + describe(fiber));
        }
        --live;
        block_has_exits[fiber.block] = true;
    }
  }
}

void start_cluster(int64_t first_block) {
  const unsigned block_warps = (block_threads + kWarp - 1) / kWarp;
  for (unsigned char* memory : shared) memset(memory, 0xff, shared_bytes);  // NaN
  for (Warp& warp : warps) warp = {};
  for (unsigned i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber = {};
    const unsigned thread = i % block_threads;
    fiber.stack = stacks[i];
    fiber.index = i;
    fiber.block = fiber.cluster_rank = i / block_threads;
    fiber.warp = fiber.block * block_warps + thread / kWarp;
    fiber.lane = thread % kWarp;
    fiber.thread_index = {thread, 0, 0};
    fiber.block_index = {unsigned(first_block) + fiber.block, 0, 0};
    Warp& warp = warps[fiber.warp];
    if (!warp.exists) warp.first = i;
    warp.exists |= 1u << fiber.lane;
    warp.ready |= 1u << fiber.lane;
    prepare(fiber);
  }
  waiting_in_cluster = cluster_barriers = 0;
  last_warp = schedule == Schedule::kReverse ? unsigned(warps.size()) - 1 : 0;
  check::blocks_begin();
}

void meet(State state, const char* file, int line) {
  Fiber* fiber = self();
  fiber->file = file;
  fiber->line = line;
  fiber->state = state;
  give_way();
}

}  // namespace

void fail(const char* format, ...) {
  char text[600];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  set_error(std::string(text) + " -- " + describe(*self()));
  give_way();
  abort();
}

void copy_async(void* to, const void* from, size_t bytes, const void* pc) {
  on_access(from, bytes, false, pc);
  memset(to, 0xff, bytes);  // who reads before waiting finds NaN
  self()->copies.push_back({to, from, bytes, pc});
  ++self()->in_open_batch;
}
void copy_async_commit() {
  self()->batches.push_back(self()->in_open_batch);
  self()->in_open_batch = 0;
}
void copy_async_wait(size_t pending) {
  Fiber* fiber = self();
  while (fiber->batches.size() > pending) {
    for (size_t i = 0; i < fiber->batches.front(); ++i) {
      const Copy& copy = fiber->copies[i];
      on_access(copy.to, copy.bytes, true, copy.pc);
      memcpy(copy.to, copy.from, copy.bytes);
    }
    fiber->copies.erase(fiber->copies.begin(), fiber->copies.begin() + fiber->batches.front());
    fiber->batches.erase(fiber->batches.begin());
  }
}

void sync_block(const char* file, int line) { meet(State::kInBlockBarrier, file, line); }
void sync_cluster(const char* file, int line) { meet(State::kInClusterBarrier, file, line); }

uint64_t shuffle_xor(uint32_t mask, uint64_t value, int lanes, const char* file, int line) {
  Fiber* fiber = self();
  fiber->mask = mask;
  fiber->value = value;
  fiber->lanes = lanes;
  meet(State::kInShuffle, file, line);
  return fiber->value;
}

void* shared_memory() { return shared[self()->block]; }

void* map_to_rank(void* p, unsigned rank) {
  const ptrdiff_t offset = static_cast<unsigned char*>(p) - shared[self()->block];
  if (offset < 0 || size_t(offset) >= shared_bytes) {
    fail("not a pointer into this block's shared memory");
  }
  if (rank >= shared.size()) fail("rank %u of a cluster of %zu", rank, shared.size());
  if (rank != self()->block) {
    if (!cluster_barriers) {
      fail(
          "access to another block's shared memory before any cluster_sync: that block may not "
          "have started");
    }
    if (block_has_exits[rank]) {
      fail(
          "access to the shared memory of block %u of the cluster, threads of which have exited",
          rank);
    }
  }
  return shared[rank] + offset;
}

unsigned current_thread() { return self()->index; }

bool on_own_stack(const void* p) {
  const char* address = static_cast<const char*>(p);
  return address >= self()->stack && address < self()->stack + kStackBytes;
}

const char* run(const Launch& launch, void (*body)(void*), void* context) {
  error.clear();
  if (launch.threads < 1 || launch.threads > 1024) return "not 1 to 1024 threads a block";
  if (launch.blocks < 1 || launch.blocks % launch.cluster) return "not a whole number of clusters";
  const unsigned cluster = unsigned(launch.cluster);
  block_threads = unsigned(launch.threads);
  shared_bytes = launch.shared_bytes;
  thread_body = body;
  thread_context = context;
  block_size = {block_threads, 1, 1};
  grid_size = {unsigned(launch.blocks), 1, 1};
  fibers.resize(size_t(block_threads) * cluster);
  warps.resize(size_t((block_threads + kWarp - 1) / kWarp) * cluster);
  while (stacks.size() < fibers.size()) {
    void* stack = mmap(
        nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
        -1, 0);
    if (stack == MAP_FAILED) return "out of memory for stacks";
    stacks.push_back(static_cast<char*>(stack));
  }
  shared.assign(cluster, nullptr);
  for (unsigned char*& memory : shared) {
    memory = static_cast<unsigned char*>(aligned_alloc(16, (shared_bytes + 31) / 16 * 16));
  }
  check::launch_begin(shared.data(), cluster, shared_bytes, unsigned(fibers.size()));
  for (int64_t i = 0; i < launch.blocks && error.empty(); i += cluster) {
    waiting_in_block.assign(cluster, 0);
    block_has_exits.assign(cluster, false);
    start_cluster(schedule == Schedule::kReverse ? launch.blocks - cluster - i : i);
    run_cluster();
  }
  check::launch_end();
  for (unsigned char* memory : shared) free(memory);
  shared.clear();
  current = nullptr;
  return error.empty() ? nullptr : error.c_str();
}

extern "C" void simt_set_schedule(int which, uint64_t seed) {
  schedule = Schedule(which);
  random_state = seed * 2654435761u + 88172645463325252u;
}

}  // namespace simt
