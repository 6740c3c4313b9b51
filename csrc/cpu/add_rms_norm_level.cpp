// The kernels of one SIMD level for the residual add and RMSNorm. This file is compiled once per
// level, with that level's flags and COREAI_TORCH_CPU_LEVEL set to its identifier; the table is all
// that it exports.
#include "cpu/simd/simd.h"

#include "cpu/add_rms_norm_kernels.h"
#include "cpu/rms_norm_backward.h"
#include "cpu/rms_norm_forward.h"

namespace coreai_torch {

#define COREAI_TORCH_JOIN_(a, b) a##b
#define COREAI_TORCH_JOIN(a, b) COREAI_TORCH_JOIN_(a, b)
#define COREAI_TORCH_TABLE COREAI_TORCH_JOIN(add_rms_norm_kernels_, COREAI_TORCH_CPU_LEVEL)

extern const AddRmsNormKernels COREAI_TORCH_TABLE;
const AddRmsNormKernels COREAI_TORCH_TABLE = {
#if defined(__AVX512FP16__)
    // What differs from the level below.
    {{}, {nullptr, forward<Float16, Float16>}},
    {},
#else
    // In the order of DType: float32, float16, bfloat16, float64.
    {
        {forward<float, float>, nullptr, nullptr, nullptr},
        {forward<Float16, float>, forward<Float16, Float16>, nullptr, nullptr},
        {forward<BFloat16, float>, nullptr, forward<BFloat16, BFloat16>, nullptr},
        {},
    },
    {
        {backward<float, float>, nullptr, nullptr, nullptr},
        {backward<Float16, float>, backward<Float16, Float16>, nullptr, nullptr},
        {backward<BFloat16, float>, nullptr, backward<BFloat16, BFloat16>, nullptr},
        {},
    },
#endif
};

}  // namespace coreai_torch
