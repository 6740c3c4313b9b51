// The kernels for the residual add and RMSNorm in float64, compiled once, for the baseline.
#include "cpu/simd/float64.h"

#include "cpu/add_rms_norm_kernels.h"
#include "cpu/rms_norm_backward.h"
#include "cpu/rms_norm_forward.h"

namespace coreai_torch {

extern const AddRmsNormKernels add_rms_norm_kernels_float64;
const AddRmsNormKernels add_rms_norm_kernels_float64 = {
    // In the order of DType: float32, float16, bfloat16, float64.
    {{}, {}, {}, {nullptr, nullptr, nullptr, forward<double, double>}},
    {{}, {}, {}, {nullptr, nullptr, nullptr, backward<double, double>}},
};

}  // namespace coreai_torch
