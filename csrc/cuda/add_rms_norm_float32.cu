// The residual add and RMSNorm of float32 input.
#include "rms_norm_dtype_impl.cuh"

template struct coreai_torch::RmsNormCuda<float, true>;
