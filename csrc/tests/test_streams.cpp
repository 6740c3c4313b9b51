// Outputs so large that they are stored past the caches: they have the bits of the same rows stored
// as usual, and nothing beside them is written, wherever in a line the rows begin and end.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "coreai_torch/cpu_level.h"
#include "coreai_torch/rms_norm.h"
#include "testing.h"

using namespace coreai_torch;

namespace {

constexpr int kFirstThatStreams = 1;  // of the SIMD levels
constexpr size_t kLine = 64;
constexpr size_t kLarge = size_t(25) << 20;  // bytes; operands of together 48 MiB are streamed

// Bytes between two lines that must stay as they are. Whole lines are stored past the caches only
// if the first byte begins one.
class Guarded {
 public:
  Guarded(size_t bytes, bool begins_line) : bytes_(bytes), memory_(bytes + 4 * kLine, kUntouched) {
    const size_t past = reinterpret_cast<uintptr_t>(memory_.data()) % kLine;
    begin_ = 2 * kLine - past + (begins_line ? 0 : sizeof(float));
  }

  void* data() { return memory_.data() + begin_; }
  bool operator==(const Guarded& other) const {
    return std::memcmp(&memory_[begin_], &other.memory_[other.begin_], bytes_) == 0;
  }
  bool is_untouched_around() const {
    const auto is_untouched = [](unsigned char byte) { return byte == kUntouched; };
    const auto begin = memory_.begin() + begin_, end = begin + bytes_;
    return std::all_of(memory_.begin(), begin, is_untouched) &&
           std::all_of(end, memory_.end(), is_untouched);
  }

 private:
  static constexpr unsigned char kUntouched = 0xfd;
  size_t bytes_, begin_;
  std::vector<unsigned char> memory_;
};

struct Data {
  RmsNormShape shape;
  std::vector<unsigned char> input, grad_output, scale, workspace;
  size_t bytes;

  Data(DType dtype, int64_t dim) {
    const size_t size = dtype == DType::kFloat32 ? 4 : 2;
    const int64_t rows = int64_t(kLarge / size_t(dim) / size);
    shape = shape_of(rows, 1, rows, dim);
    shape.input_dtype = shape.scale_dtype = dtype;
    bytes = size_t(rows * dim) * size;
    std::mt19937 engine(7);
    // Bits of numbers from 2^-3 to 2^3, in the upper half of a float32, and in each 16 bits.
    const uint16_t least = dtype == DType::kFloat16 ? 0x3000 : 0x3e00;
    const uint16_t range = dtype == DType::kFloat16 ? 0x17ff : 0x02ff;
    const auto fill = [&](std::vector<unsigned char>& operand, size_t count) {
      operand.resize(count);
      for (size_t i = 0; i < count; i += 2) {
        const uint16_t bits = uint16_t((least + engine() % range) | (engine() & 0x8000));
        std::memcpy(&operand[i], &bits, 2);
      }
    };
    fill(input, bytes);
    fill(grad_output, bytes);
    fill(scale, size_t(dim) * size);
    workspace.resize(size_t(rms_norm_backward_workspace_cpu(shape)));
  }
};

void forward(const Data& data, Guarded& output, ParallelFor parallel_for) {
  RmsNormForward args = {};
  args.shape = data.shape;
  args.input = data.input.data();
  args.scale = data.scale.data();
  args.output = output.data();
  args.input_strides[0] = args.output_strides[0] = data.shape.dim;
  rms_norm_forward_cpu(args, parallel_for);
}

void backward(Data& data, Guarded& grad_input, ParallelFor parallel_for) {
  std::vector<unsigned char> grad_scale(data.scale.size());
  RmsNormBackward args = {};
  args.shape = data.shape;
  args.grad_output = data.grad_output.data();
  args.input = data.input.data();
  args.scale = data.scale.data();
  args.grad_input = grad_input.data();
  args.grad_scale = grad_scale.data();
  args.workspace = data.workspace.data();
  args.grad_output_strides[0] = args.input_strides[0] = args.grad_input_strides[0] = data.shape.dim;
  rms_norm_backward_cpu(args, parallel_for);
}

}  // namespace

int main() {
  if (!cpu_level_supported(kFirstThatStreams)) {
    std::printf("no level that streams\n");
    return 0;
  }
  int runs = 0;
  // Rows of half a pair of vectors more, which are streamed in float32 only, and rows that begin
  // anywhere in a line, in all ways that they are gone through.
  for (const int64_t dim : {80, 1001, 4095, 8200}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      Data data(dtype, dim);
      Guarded output(data.bytes, false), grad_input(data.bytes, false);
      CHECK(set_cpu_level(nullptr), "the automatic choice");
      forward(data, output, serial_for);
      backward(data, grad_input, serial_for);
      for (int level = kFirstThatStreams; level < cpu_level_count(); ++level) {
        if (!cpu_level_supported(level)) continue;
        CHECK(set_cpu_level(cpu_level_name(level)), "%s", cpu_level_name(level));
        for (const ParallelFor parallel_for : {serial_for, scattered_for}) {
          Guarded streamed(data.bytes, true), streamed_grad(data.bytes, true);
          forward(data, streamed, parallel_for);
          backward(data, streamed_grad, parallel_for);
          const char* const name = cpu_level_name(level);
          CHECK(streamed == output, "%s, dim %lld: other bits", name, (long long)dim);
          CHECK(streamed_grad == grad_input, "%s, dim %lld: other bits", name, (long long)dim);
          CHECK(
              streamed.is_untouched_around() && streamed_grad.is_untouched_around(),
              "%s, dim %lld: written beside the output", name, (long long)dim);
          ++runs;
        }
      }
    }
  }
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures == 0 ? 0 : 1;
}
