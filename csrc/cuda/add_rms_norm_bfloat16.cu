// The residual add and RMSNorm of bfloat16 input.
#include "rms_norm_dtype_impl.cuh"

template struct coreai_torch::RmsNormCuda<coreai_torch::BFloat16, true>;
