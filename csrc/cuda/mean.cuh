// Means over rows of one width, and 1 / rms.
#pragma once

#include "device.cuh"

namespace coreai_torch {

// Multiplies by 1 / dim: a division would take a narrow row's threads as long as all their other
// arithmetic.
class Mean {
 public:
  Mean(int64_t dim, double eps)
      : inverse_dim_(1.0 / double(dim)),
        eps_(eps),
        inverse_dim_float_(float(inverse_dim_)),
        eps_float_(float(eps)) {}

  __device__ __forceinline__ float of(float sum) const { return sum * inverse_dim_float_; }
  __device__ __forceinline__ double of(double sum) const { return sum * inverse_dim_; }

  // 1 / sqrt(mean + eps), from the sum of squares.
  __device__ __forceinline__ float rstd(float squares) const {
    return reciprocal_sqrt(of(squares) + eps_float_);
  }
  __device__ __forceinline__ double rstd(double squares) const {
    return reciprocal_sqrt(of(squares) + eps_);
  }

 private:
  double inverse_dim_;
  double eps_;
  float inverse_dim_float_;
  float eps_float_;
};

}  // namespace coreai_torch
