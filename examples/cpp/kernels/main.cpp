// The kernels without PyTorch: forward and backward of RMSNorm on arrays of this program, on
// threads of this program, compared with the formula in double precision.
#include <coreai_torch/cpu_level.h>
#include <coreai_torch/rms_norm.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

using namespace coreai_torch;

namespace {

// Who runs the threads is the caller's business. This is the simplest way; serial_for is none.
void thread_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
  const int64_t part = std::max(grain, (end - begin + processors - 1) / processors);
  std::vector<std::thread> threads;
  for (; begin < end; begin += part) {
    threads.emplace_back(body, begin, std::min(begin + part, end), context);
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  const int64_t rows = 512, dim = 1024;
  std::vector<float> input(rows * dim), scale(dim), grad_output(rows * dim, 1.0f);
  for (int64_t i = 0; i < rows * dim; ++i) input[i] = std::sin(0.1f * float(i));
  for (int64_t i = 0; i < dim; ++i) scale[i] = 1 + 0.001f * float(i);

  RmsNormForward forward = {};
  forward.shape.input_dtype = forward.shape.scale_dtype = DType::kFloat32;
  forward.shape.rows = forward.shape.row_sizes[0] = rows;
  forward.shape.row_ndim = 1;
  forward.shape.dim = dim;
  forward.shape.groups = forward.shape.inner = 1;  // one scale for all rows
  forward.shape.eps = 1e-5;
  std::vector<float> output(rows * dim);
  forward.input = input.data();
  forward.scale = scale.data();
  forward.output = output.data();
  forward.input_strides[0] = forward.output_strides[0] = dim;
  rms_norm_forward_cpu(forward, thread_for);

  RmsNormBackward backward = {};
  backward.shape = forward.shape;
  std::vector<float> grad_input(rows * dim), grad_scale(dim);
  std::vector<char> workspace(rms_norm_backward_workspace_cpu(backward.shape));
  backward.grad_output = grad_output.data();
  backward.input = input.data();
  backward.scale = scale.data();
  backward.grad_input = grad_input.data();
  backward.grad_scale = grad_scale.data();
  backward.workspace = workspace.data();
  backward.grad_output_strides[0] = backward.input_strides[0] = backward.grad_input_strides[0] =
      dim;
  rms_norm_backward_cpu(backward, thread_for);

  double error = 0;
  std::vector<double> expected(dim);  // of grad_scale: the normalized input, summed over the rows
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = &input[row * dim];
    double squares = 0;
    for (int64_t i = 0; i < dim; ++i) squares += double(x[i]) * x[i];
    const double rstd = 1 / std::sqrt(squares / dim + 1e-5);
    for (int64_t i = 0; i < dim; ++i) {
      error = std::max(error, std::abs(output[row * dim + i] - x[i] * rstd * scale[i]));
      expected[i] += x[i] * rstd;
    }
  }
  double grad_error = 0;
  for (int64_t i = 0; i < dim; ++i) {
    grad_error = std::max(grad_error, std::abs(grad_scale[i] - expected[i]));
  }
  std::printf(
      "%lld rows of %lld at level %s: largest error of the output %.1e, of grad_scale %.1e\n",
      static_cast<long long>(rows), static_cast<long long>(dim), cpu_level_name(cpu_level()), error,
      grad_error);
  return error < 1e-5 && grad_error < 1e-3 ? 0 : 1;
}
