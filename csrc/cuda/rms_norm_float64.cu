// RMSNorm of float64 input.
#include "rms_norm_dtype_impl.cuh"

template struct coreai_torch::RmsNormCuda<double, false>;
