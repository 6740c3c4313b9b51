// The RMSNorm kernels of one SIMD level. This file is compiled once per level, with that level's
// flags and COREAI_TORCH_CPU_LEVEL set to its identifier; the table is all that it exports.
#include "cpu/simd/simd.h"

#include "cpu/rms_norm_backward.h"
#include "cpu/rms_norm_forward.h"

namespace coreai_torch {

#define COREAI_TORCH_JOIN_(a, b) a##b
#define COREAI_TORCH_JOIN(a, b) COREAI_TORCH_JOIN_(a, b)
#define COREAI_TORCH_TABLE COREAI_TORCH_JOIN(rms_norm_kernels_, COREAI_TORCH_CPU_LEVEL)

extern const RmsNormKernels COREAI_TORCH_TABLE;
const RmsNormKernels COREAI_TORCH_TABLE = {
#if defined(__AVX512FP16__)
    // What differs from the level below.
    {{}, {nullptr, forward<Float16, Float16>}},
    {},
    {},
#else
    // In the order of DType: float32, float16, bfloat16, float64.
    {
        {forward<float, float>, forward<float, Float16>, forward<float, BFloat16>, nullptr},
        {forward<Float16, float>, forward<Float16, Float16>, forward<Float16, BFloat16>, nullptr},
        {forward<BFloat16, float>, forward<BFloat16, Float16>, forward<BFloat16, BFloat16>,
         nullptr},
        {},
    },
    {
        {backward<float, float>, backward<float, Float16>, backward<float, BFloat16>, nullptr},
        {backward<Float16, float>, backward<Float16, Float16>, backward<Float16, BFloat16>,
         nullptr},
        {backward<BFloat16, float>, backward<BFloat16, Float16>, backward<BFloat16, BFloat16>,
         nullptr},
        {},
    },
    {reduce<float>, reduce<Float16>, reduce<BFloat16>, nullptr},
#endif
};

}  // namespace coreai_torch
