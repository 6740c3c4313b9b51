// Runs every kernel once under callgrind, which counts the instructions of each call apart and
// writes them to a file of its own. instructions.py builds, runs and reads it.
#include <valgrind/callgrind.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "coreai_torch/rms_norm.h"

using namespace coreai_torch;

namespace {

struct Pair {
  const char* name;
  DType input, scale;
};
constexpr Pair kPairs[] = {
    {"float32", DType::kFloat32, DType::kFloat32},
    {"bfloat16", DType::kBFloat16, DType::kBFloat16},
    {"float16", DType::kFloat16, DType::kFloat16},
    {"mixed", DType::kBFloat16, DType::kFloat32},
};

// Ordinary numbers: 0.5, 1, -1, -0.5 and so on.
std::vector<char> numbers(DType dtype, int64_t count) {
  constexpr float floats[] = {0.5f, 1.0f, -1.0f, -0.5f};
  constexpr uint16_t halves[] = {0x3800, 0x3c00, 0xbc00, 0xb800};
  const size_t size = dtype == DType::kFloat32 ? 4 : 2;
  std::vector<char> bytes(size_t(count) * size);
  for (int64_t i = 0; i < count; ++i) {
    char* to = bytes.data() + size_t(i) * size;
    const float value = floats[i % 4];
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t upper = uint16_t(bits >> 16);
    if (dtype == DType::kFloat32) std::memcpy(to, &value, 4);
    if (dtype == DType::kBFloat16) std::memcpy(to, &upper, 2);
    if (dtype == DType::kFloat16) std::memcpy(to, &halves[i % 4], 2);
  }
  return bytes;
}

RmsNormShape shape_of(const Pair& pair, int64_t rows, int64_t dim) {
  RmsNormShape shape = {};
  shape.input_dtype = pair.input;
  shape.scale_dtype = pair.scale;
  shape.rows = rows;
  shape.dim = dim;
  shape.groups = shape.inner = 1;
  shape.eps = 1e-5;
  shape.row_ndim = 1;
  shape.row_sizes[0] = rows;
  return shape;
}

template <class Call>
void count(const char* kernel, const Pair& pair, int64_t dim, Call call) {
  char label[64];
  std::snprintf(label, sizeof label, "%s %s %lld", kernel, pair.name, (long long)dim);
  call();  // what happens at a first call only, such as looking up symbols
  CALLGRIND_TOGGLE_COLLECT;
  call();
  CALLGRIND_TOGGLE_COLLECT;
  CALLGRIND_DUMP_STATS_AT(label);
}

void count_kernels(const Pair& pair, int64_t rows, int64_t dim) {
  const auto input = numbers(pair.input, rows * dim);
  const auto scale = numbers(pair.scale, dim);
  auto output = input, grad_input = input, grad_scale = scale;

  RmsNormForward forward = {};
  forward.shape = shape_of(pair, rows, dim);
  forward.input = input.data();
  forward.scale = scale.data();
  forward.output = output.data();
  forward.input_strides[0] = forward.output_strides[0] = dim;
  count("forward", pair, dim, [&] { rms_norm_forward_cpu(forward, serial_for); });

  RmsNormBackward backward = {};
  backward.shape = forward.shape;
  std::vector<char> workspace(size_t(rms_norm_backward_workspace_cpu(backward.shape)));
  backward.grad_output = backward.input = input.data();
  backward.scale = scale.data();
  backward.grad_input = grad_input.data();
  backward.grad_scale = grad_scale.data();
  backward.workspace = workspace.data();
  backward.grad_output_strides[0] = backward.input_strides[0] = backward.grad_input_strides[0] =
      dim;
  count("backward", pair, dim, [&] { rms_norm_backward_cpu(backward, serial_for); });
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    std::fprintf(stderr, "usage: %s rows dim...\n", arguments[0]);
    return 2;
  }
  const int64_t rows = std::atoll(arguments[1]);
  for (const Pair& pair : kPairs) {
    for (int i = 2; i < count; ++i) count_kernels(pair, rows, std::atoll(arguments[i]));
  }
}
