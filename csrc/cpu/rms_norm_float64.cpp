// The RMSNorm kernels for float64 input, compiled once, for the baseline.
#include "cpu/simd/float64.h"

#include "cpu/rms_norm_backward.h"
#include "cpu/rms_norm_forward.h"

namespace coreai_torch {

extern const RmsNormKernels rms_norm_kernels_float64;
const RmsNormKernels rms_norm_kernels_float64 = {
    // In the order of DType: float32, float16, bfloat16, float64.
    {{},
     {},
     {},
     {forward<double, float>, forward<double, Float16>, forward<double, BFloat16>,
      forward<double, double>}},
    {{},
     {},
     {},
     {backward<double, float>, backward<double, Float16>, backward<double, BFloat16>,
      backward<double, double>}},
    {reduce<float>, reduce<Float16>, reduce<BFloat16>, reduce<double>},
};

}  // namespace coreai_torch
