// Tests of the framework-free library alone: every SIMD level against a double precision oracle and
// against the others bit for bit, any division into ranges, strides, groups, and unwritten memory.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <random>
#include <vector>

#include "coreai_torch/cpu_level.h"
#include "coreai_torch/rms_norm.h"
#include "testing.h"

using namespace coreai_torch;

namespace {

struct Problem {
  int64_t outer, groups, inner, dim, padding;
  bool transposed = false;  // (outer, inner, groups) in memory

  int64_t rows() const { return outer * groups * inner; }
  int64_t stride() const { return dim + padding; }

  // Of a row's first element.
  int64_t offset(int64_t row) const {
    if (!transposed) return row * stride();
    const int64_t run = row / inner;
    return ((run / groups * inner + row % inner) * groups + run % groups) * stride();
  }

  void describe(RmsNormShape* shape, std::initializer_list<int64_t*> operands) const {
    *shape = shape_of(rows(), groups, inner, dim);
    if (transposed) {
      shape->row_ndim = 3;
      shape->row_sizes[0] = outer;
      shape->row_sizes[1] = groups;
      shape->row_sizes[2] = inner;
    }
    for (int64_t* strides : operands) {
      strides[0] = transposed ? inner * groups * stride() : stride();
      strides[1] = stride();
      strides[2] = groups * stride();
    }
  }
};

struct Result {
  std::vector<float> output, grad_input, grad_scale;
  bool operator==(const Result& other) const {
    return same_bits(output, other.output) && same_bits(grad_input, other.grad_input) &&
           same_bits(grad_scale, other.grad_scale);
  }
};

struct Data {
  std::vector<float> input, scale, grad_output;
  explicit Data(const Problem& p) {
    std::mt19937 engine(7);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < p.rows() * p.stride(); ++i) input.push_back(normal(engine));
    for (int64_t i = 0; i < p.rows() * p.stride(); ++i) grad_output.push_back(normal(engine));
    for (int64_t i = 0; i < p.groups * p.dim; ++i) scale.push_back(normal(engine));
  }
};

Result run(const Problem& p, const Data& data, ParallelFor parallel_for) {
  const size_t size = size_t(p.rows() * p.stride());
  Result result{
      std::vector<float>(size, NAN), std::vector<float>(size, NAN),
      std::vector<float>(data.scale.size(), NAN)};

  RmsNormForward forward;
  p.describe(&forward.shape, {forward.input_strides, forward.output_strides});
  forward.input = data.input.data();
  forward.scale = data.scale.data();
  forward.output = result.output.data();
  rms_norm_forward_cpu(forward, parallel_for);

  RmsNormBackward backward;
  p.describe(
      &backward.shape,
      {backward.grad_output_strides, backward.input_strides, backward.grad_input_strides});
  std::vector<char> workspace(size_t(rms_norm_backward_workspace_cpu(backward.shape)), char(0xff));
  backward.grad_output = data.grad_output.data();
  backward.input = data.input.data();
  backward.scale = data.scale.data();
  backward.grad_input = result.grad_input.data();
  backward.grad_scale = result.grad_scale.data();
  backward.workspace = workspace.data();
  rms_norm_backward_cpu(backward, parallel_for);
  return result;
}

void check_against_double(const Problem& p, const Data& data, const Result& result) {
  std::vector<double> grad_scale(data.scale.size(), 0.0);
  std::vector<double> magnitude(data.scale.size(), 1.0);
  for (int64_t row = 0; row < p.rows(); ++row) {
    const float* x = &data.input[p.offset(row)];
    const float* g = &data.grad_output[p.offset(row)];
    const int64_t group = row / p.inner % p.groups;
    const float* w = &data.scale[group * p.dim];
    double squares = 0, dot = 0;
    for (int64_t i = 0; i < p.dim; ++i) {
      squares += double(x[i]) * x[i];
      dot += double(g[i]) * w[i] * x[i];
    }
    const double rstd = 1 / std::sqrt(squares / p.dim + 1e-5);
    for (int64_t i = 0; i < p.dim; ++i) {
      const double normalized = x[i] * rstd;
      const double output = normalized * w[i];
      const double grad_input = (double(g[i]) * w[i] - normalized * dot * rstd / p.dim) * rstd;
      const int64_t at = p.offset(row) + i;
      CHECK(
          std::abs(result.output[at] - output) <= 1e-6 * (1 + std::abs(output)),
          "row %lld element %lld: %g, expected %g", (long long)row, (long long)i, result.output[at],
          output);
      CHECK(
          std::abs(result.grad_input[at] - grad_input) <= 4e-6 * rstd * (1 + std::abs(dot)),
          "row %lld element %lld: %g, expected %g", (long long)row, (long long)i,
          result.grad_input[at], grad_input);
      grad_scale[group * p.dim + i] += g[i] * normalized;
      magnitude[group * p.dim + i] += std::abs(g[i] * normalized);
    }
    for (int64_t i = p.dim; i < p.stride(); ++i) {
      CHECK(
          std::isnan(result.output[p.offset(row) + i]), "written behind row %lld", (long long)row);
    }
  }
  for (size_t i = 0; i < grad_scale.size(); ++i) {
    CHECK(
        std::abs(result.grad_scale[i] - grad_scale[i]) <= 1e-6 * magnitude[i],
        "grad_scale %zu: %g, expected %g", i, result.grad_scale[i], grad_scale[i]);
  }
}

}  // namespace

int main() {
  std::vector<Problem> problems;
  for (const int64_t dim : {1, 3, 7, 8, 17, 31, 32, 33, 64, 100, 128, 513, 1024, 4097}) {
    problems.push_back({1, 1, 1, dim, 0});
    problems.push_back({1, 1, 37, dim, 5});
    problems.push_back({3, 4, 5, dim, 0});
    problems.push_back({2, 3, 1, dim, 1});
    problems.push_back({2, 3, 6, dim, 1, /*transposed=*/true});
    problems.push_back({2, 8, 5, dim, 1, /*transposed=*/true});
  }
  problems.push_back({1, 1, 3000, 16, 0});
  problems.push_back({2, 2, 700, 8, 0});
  problems.push_back({2, 3, 1401, 8, 0, /*transposed=*/true});
  problems.push_back({1, 1, 0, 8, 0});

  int runs = 0;
  for (const Problem& p : problems) {
    const Data data(p);
    CHECK(set_cpu_level(cpu_level_name(0)), "the lowest level runs everywhere");
    const Result lowest = run(p, data, serial_for);
    check_against_double(p, data, lowest);
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
  CHECK(!set_cpu_level("no such level"), "an unknown level is refused");
  CHECK(set_cpu_level(nullptr), "back to the automatic choice");
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures == 0 ? 0 : 1;
}
