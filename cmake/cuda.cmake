# The CUDA kernels: framework-free, linked to the CUDA runtime statically, so that the module needs
# nothing of the toolkit when it runs.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  message(FATAL_ERROR
    "CMAKE_CUDA_ARCHITECTURES is not set, for example: -DCMAKE_CUDA_ARCHITECTURES=80-real;90")
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

add_library(coreai_torch_cuda_kernels STATIC
  csrc/cuda/add_rms_norm_bfloat16.cu
  csrc/cuda/add_rms_norm_float16.cu
  csrc/cuda/add_rms_norm_float32.cu
  csrc/cuda/add_rms_norm_float64.cu
  csrc/cuda/rms_norm.cu
  csrc/cuda/rms_norm_bfloat16.cu
  csrc/cuda/rms_norm_float16.cu
  csrc/cuda/rms_norm_float32.cu
  csrc/cuda/rms_norm_float64.cu)
target_include_directories(coreai_torch_cuda_kernels
  PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include>
  PRIVATE csrc/cuda csrc/cuda/platform)
target_link_libraries(coreai_torch_cuda_kernels PUBLIC CUDA::cudart_static)
set_target_properties(coreai_torch_cuda_kernels PROPERTIES
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_VISIBILITY_PRESET hidden)
# A fifth of the size, at no cost but that of unpacking a kernel when it is first used.
target_compile_options(coreai_torch_cuda_kernels PRIVATE -Xfatbin=-compress-all)
if(COREAI_TORCH_WERROR)
  target_compile_options(coreai_torch_cuda_kernels PRIVATE --Werror=all-warnings)
endif()
