// The library under threads, for ThreadSanitizer above all: a call that is spread over threads,
// calls from many threads at once, and the SIMD level changed meanwhile. Whatever happens, the bits
// are those of one call on one thread.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "coreai_torch/cpu_level.h"
#include "coreai_torch/rms_norm.h"
#include "testing.h"

using namespace coreai_torch;

namespace {

constexpr int kThreadsOfACall = 4;
constexpr int kCallers = 4;
constexpr int kCallsEach = 20;

// A ParallelFor with threads of its own, each of which takes the next range that is left.
void threads_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  std::atomic<int64_t> next{begin};
  const auto work = [&] {
    for (int64_t from = next.fetch_add(grain); from < end; from = next.fetch_add(grain)) {
      body(from, from + grain < end ? from + grain : end, context);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < kThreadsOfACall; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

// A ParallelFor whose ranges have all lengths from 1 to 7, whatever the grain.
void pieces_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  for (int64_t from = begin, length = 1; from < end; from += length, length = length % 7 + 1) {
    body(from, from + length < end ? from + length : end, context);
  }
}

struct Data {
  int64_t groups, inner, rows, dim;
  bool transposed;  // (outer, inner, groups, dim) in memory: the groups take turns
  std::vector<float> input, grad_output, scale;

  Data(int64_t outer, int64_t groups, int64_t inner, int64_t dim, bool transposed = false)
      : groups(groups),
        inner(inner),
        rows(outer * groups * inner),
        dim(dim),
        transposed(transposed) {
    std::mt19937 engine(7);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows * dim; ++i) input.push_back(normal(engine));
    for (int64_t i = 0; i < rows * dim; ++i) grad_output.push_back(normal(engine));
    for (int64_t i = 0; i < groups * dim; ++i) scale.push_back(normal(engine));
  }
};

RmsNormShape shape_with_layout(const Data& data) {
  RmsNormShape shape = shape_of(data.rows, data.groups, data.inner, data.dim);
  if (data.transposed) {
    shape.row_ndim = 3;
    shape.row_sizes[0] = data.rows / (data.groups * data.inner);
    shape.row_sizes[1] = data.groups;
    shape.row_sizes[2] = data.inner;
  }
  return shape;
}

void set_strides(const Data& data, int64_t (&strides)[kMaxDims]) {
  if (data.transposed) {
    strides[0] = data.inner * data.groups * data.dim;
    strides[1] = data.dim;
    strides[2] = data.groups * data.dim;
  } else {
    strides[0] = data.dim;
  }
}

// Output, grad_input and grad_scale, one behind the other.
std::vector<float> run(const Data& data, ParallelFor parallel_for) {
  const size_t size = data.input.size();
  std::vector<float> results(2 * size + data.scale.size(), NAN);
  RmsNormForward forward = {};
  forward.shape = shape_with_layout(data);
  forward.input = data.input.data();
  forward.scale = data.scale.data();
  forward.output = results.data();
  set_strides(data, forward.input_strides);
  set_strides(data, forward.output_strides);
  rms_norm_forward_cpu(forward, parallel_for);

  RmsNormBackward backward = {};
  backward.shape = forward.shape;
  std::vector<char> workspace(size_t(rms_norm_backward_workspace_cpu(backward.shape)), char(0xff));
  backward.grad_output = data.grad_output.data();
  backward.input = data.input.data();
  backward.scale = data.scale.data();
  backward.grad_input = results.data() + size;
  backward.grad_scale = results.data() + 2 * size;
  backward.workspace = workspace.data();
  set_strides(data, backward.grad_output_strides);
  set_strides(data, backward.input_strides);
  set_strides(data, backward.grad_input_strides);
  rms_norm_backward_cpu(backward, parallel_for);
  return results;
}

}  // namespace

int main() {
  // One that is divided over rows, one over heads, one with many chunks to add up, and one with
  // many chunks of heads that take turns.
  const Data problems[] = {
      Data(1, 1, 300, 257), Data(3, 4, 33, 64), Data(1, 1, 6000, 16),
      Data(3, 5, 300, 17, /*transposed=*/true)};
  std::atomic<int> different{0};
  for (const Data& data : problems) {
    const std::vector<float> expected = run(data, serial_for);
    if (!same_bits(run(data, pieces_for), expected)) ++different;
    std::atomic<bool> done{false};
    std::thread switcher([&] {
      for (int level = 0; !done; level = (level + 1) % cpu_level_count()) {
        set_cpu_level(cpu_level_name(level));
        std::this_thread::yield();
      }
    });
    std::vector<std::thread> callers;
    for (int i = 0; i < kCallers; ++i) {
      callers.emplace_back([&, i] {
        const ParallelFor parallel_for = i % 2 == 0 ? threads_for : serial_for;
        for (int k = 0; k < kCallsEach; ++k) {
          if (!same_bits(run(data, parallel_for), expected)) ++different;
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    done = true;
    switcher.join();
  }
  set_cpu_level(nullptr);
  const int runs = int(sizeof(problems) / sizeof(problems[0])) * (1 + kCallers * kCallsEach);
  std::printf("%d runs, %d with other bits\n", runs, different.load());
  return different == 0 ? 0 : 1;
}
