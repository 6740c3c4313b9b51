// Tests of the residual add and RMSNorm in one call: at every SIMD level and in any division of the
// rows, the sum has the bits of an addition and the rest those of RMSNorm of that sum. Backward
// adds one gradient more, and is held against double precision.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "coreai_torch/add_rms_norm.h"
#include "coreai_torch/cpu_level.h"
#include "testing.h"

using namespace coreai_torch;

namespace {

struct Problem {
  int64_t outer, groups, inner, dim;
  int64_t rows() const { return outer * groups * inner; }
};

using Vector = std::vector<float>;

// A matrix whose rows are `padding` elements apart; NaN in between.
struct Matrix {
  int64_t stride;
  Vector elements;
  Matrix(const Problem& p, int64_t padding)
      : stride(p.dim + padding), elements(size_t(p.rows() * stride), NAN) {}

  void fill(const Problem& p, std::mt19937& engine) {
    std::normal_distribution<float> normal;
    for (int64_t row = 0; row < p.rows(); ++row) {
      for (int64_t i = 0; i < p.dim; ++i) at(row)[i] = normal(engine);
    }
  }
  float* at(int64_t row) { return &elements[size_t(row * stride)]; }
  const float* at(int64_t row) const { return &elements[size_t(row * stride)]; }
};

struct Data {
  Matrix input, residual, grad_output, grad_new_residual;  // all of different strides
  Vector scale;
  explicit Data(const Problem& p)
      : input(p, 0), residual(p, 3), grad_output(p, 1), grad_new_residual(p, 5) {
    std::mt19937 engine(7);
    for (Matrix* m : {&input, &residual, &grad_output, &grad_new_residual}) m->fill(p, engine);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < p.groups * p.dim; ++i) scale.push_back(normal(engine));
  }
};

struct Result {
  Matrix output, new_residual, grad_input;
  Vector grad_scale;
  Result(const Problem& p, const Data& data)
      : output(p, 2), new_residual(p, 4), grad_input(p, 6), grad_scale(data.scale.size(), NAN) {}
  bool operator==(const Result& other) const {
    return same_bits(output.elements, other.output.elements) &&
           same_bits(new_residual.elements, other.new_residual.elements) &&
           same_bits(grad_input.elements, other.grad_input.elements) &&
           same_bits(grad_scale, other.grad_scale);
  }
};

void describe(
    RmsNormForward& forward, const Problem& p, const Matrix& input, const Data& data,
    Matrix& output) {
  forward.shape = shape_of(p.rows(), p.groups, p.inner, p.dim);
  forward.input = input.elements.data();
  forward.scale = data.scale.data();
  forward.output = output.elements.data();
  forward.input_strides[0] = input.stride;
  forward.output_strides[0] = output.stride;
}

void describe(
    RmsNormBackward& backward, const Problem& p, const Data& data, std::vector<char>& workspace,
    Result& result) {
  backward.shape = shape_of(p.rows(), p.groups, p.inner, p.dim);
  workspace.assign(size_t(rms_norm_backward_workspace_cpu(backward.shape)), char(0xff));
  backward.grad_output = data.grad_output.elements.data();
  backward.input = result.new_residual.elements.data();
  backward.scale = data.scale.data();
  backward.grad_input = result.grad_input.elements.data();
  backward.grad_scale = result.grad_scale.data();
  backward.workspace = workspace.data();
  backward.grad_output_strides[0] = data.grad_output.stride;
  backward.input_strides[0] = result.new_residual.stride;
  backward.grad_input_strides[0] = result.grad_input.stride;
}

Result run(const Problem& p, const Data& data, ParallelFor parallel_for) {
  Result result(p, data);
  AddRmsNormForward forward;
  describe(forward, p, data.input, data, result.output);
  forward.residual = data.residual.elements.data();
  forward.new_residual = result.new_residual.elements.data();
  forward.residual_strides[0] = data.residual.stride;
  forward.new_residual_strides[0] = result.new_residual.stride;
  add_rms_norm_forward_cpu(forward, parallel_for);

  AddRmsNormBackward backward;
  std::vector<char> workspace;
  describe(backward, p, data, workspace, result);
  backward.grad_new_residual = data.grad_new_residual.elements.data();
  backward.grad_new_residual_strides[0] = data.grad_new_residual.stride;
  add_rms_norm_backward_cpu(backward, parallel_for);
  return result;
}

// The addition by itself, and RMSNorm of its result.
Result run_apart(const Problem& p, const Data& data) {
  Result result(p, data);
  for (int64_t row = 0; row < p.rows(); ++row) {
    for (int64_t i = 0; i < p.dim; ++i) {
      result.new_residual.at(row)[i] = data.input.at(row)[i] + data.residual.at(row)[i];
    }
  }
  RmsNormForward forward;
  describe(forward, p, result.new_residual, data, result.output);
  rms_norm_forward_cpu(forward, serial_for);
  RmsNormBackward backward;
  std::vector<char> workspace;
  describe(backward, p, data, workspace, result);
  rms_norm_backward_cpu(backward, serial_for);
  return result;
}

void check_grad_input(const Problem& p, const Data& data, const Result& result) {
  for (int64_t row = 0; row < p.rows(); ++row) {
    const float* x = result.new_residual.at(row);
    const float* g = data.grad_output.at(row);
    const float* w = &data.scale[size_t(row / p.inner % p.groups * p.dim)];
    double squares = 0, dot = 0;
    for (int64_t i = 0; i < p.dim; ++i) {
      squares += double(x[i]) * x[i];
      dot += double(g[i]) * w[i] * x[i];
    }
    const double rstd = 1 / std::sqrt(squares / p.dim + 1e-5);
    for (int64_t i = 0; i < p.dim; ++i) {
      const double of_norm = (double(g[i]) * w[i] - x[i] * rstd * dot * rstd / p.dim) * rstd;
      const double expected = of_norm + data.grad_new_residual.at(row)[i];
      const double given = result.grad_input.at(row)[i];
      CHECK(
          std::abs(given - expected) <=
              4e-6 * rstd * (1 + std::abs(dot)) + 1e-6 * std::abs(expected),
          "row %lld element %lld: %g, expected %g", (long long)row, (long long)i, given, expected);
    }
    for (int64_t i = p.dim; i < result.grad_input.stride; ++i) {
      CHECK(std::isnan(result.grad_input.at(row)[i]), "written behind row %lld", (long long)row);
    }
  }
}

}  // namespace

int main() {
  std::vector<Problem> problems;
  for (const int64_t dim : {1, 3, 8, 17, 31, 32, 33, 64, 100, 128, 513, 1024, 4097}) {
    problems.push_back({1, 1, 1, dim});
    problems.push_back({1, 1, 37, dim});
    problems.push_back({3, 4, 5, dim});
  }
  problems.push_back({1, 1, 3000, 16});
  problems.push_back({1, 1, 0, 8});

  int runs = 0;
  for (const Problem& p : problems) {
    const Data data(p);
    CHECK(set_cpu_level(cpu_level_name(0)), "the lowest level runs everywhere");
    const Result lowest = run(p, data, serial_for);
    const Result apart = run_apart(p, data);
    CHECK(
        same_bits(lowest.new_residual.elements, apart.new_residual.elements), "dim %lld: the sum",
        (long long)p.dim);
    CHECK(
        same_bits(lowest.output.elements, apart.output.elements), "dim %lld: the norm",
        (long long)p.dim);
    CHECK(same_bits(lowest.grad_scale, apart.grad_scale), "dim %lld: grad_scale", (long long)p.dim);
    check_grad_input(p, data, lowest);
    for (int level = 0; level < cpu_level_count(); ++level) {
      if (!cpu_level_supported(level)) continue;
      CHECK(set_cpu_level(cpu_level_name(level)), "%s", cpu_level_name(level));
      for (const ParallelFor parallel_for : {serial_for, scattered_for}) {
        CHECK(
            run(p, data, parallel_for) == lowest, "%s, rows %lld, dim %lld: other bits",
            cpu_level_name(level), (long long)p.rows(), (long long)p.dim);
        ++runs;
      }
    }
  }
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures == 0 ? 0 : 1;
}
