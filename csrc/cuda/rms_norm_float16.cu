// RMSNorm of float16 input.
#include "rms_norm_dtype_impl.cuh"

template struct coreai_torch::RmsNormCuda<coreai_torch::Float16, false>;
