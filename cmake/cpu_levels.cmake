include(CheckCXXSourceCompiles)

# SIMD levels: one object library per level from the same source, each with that level's flags. The
# list is that of csrc/cpu/levels.h.

# Products and sums are rounded one by one (no contraction to fused multiply-add), so that results
# have the same bits at every level. Vectors wider than the level's registers, of which compilers warn,
# are passed between inline functions only.
set(COREAI_TORCH_KERNEL_FLAGS -ffp-contract=off -fno-math-errno -Wno-psabi)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC does not see that rows of a block beyond its count are not touched; valgrind looks at that in
  # CI.
  list(APPEND COREAI_TORCH_KERNEL_FLAGS -Wno-maybe-uninitialized)
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(COREAI_TORCH_LEVELS x86_64 x86_64_v3 x86_64_v4 x86_64_v4_bf16)
  set(COREAI_TORCH_FLAGS_x86_64 -march=x86-64)
  set(COREAI_TORCH_FLAGS_x86_64_v3 -march=x86-64-v3)
  set(COREAI_TORCH_FLAGS_x86_64_v4 -march=x86-64-v4)
  set(COREAI_TORCH_FLAGS_x86_64_v4_bf16 -march=x86-64-v4 -mavx512bf16)
  set(COREAI_TORCH_FLAGS_x86_64_v4_fp16 -march=x86-64-v4 -mavx512bf16 -mavx512fp16)
  # GCC knows it from 12 on, clang from 14 on.
  list(JOIN COREAI_TORCH_FLAGS_x86_64_v4_fp16 " " CMAKE_REQUIRED_FLAGS)
  check_cxx_source_compiles("
    #include <immintrin.h>
    __m256h product(__m256h a, __m256h b) { return _mm256_mul_ph(a, b); }
    int main() {}" COREAI_TORCH_COMPILES_AVX512_FP16)
  unset(CMAKE_REQUIRED_FLAGS)
  if(COREAI_TORCH_COMPILES_AVX512_FP16)
    list(APPEND COREAI_TORCH_LEVELS x86_64_v4_fp16)
  endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(COREAI_TORCH_LEVELS neon)
else()
  set(COREAI_TORCH_LEVELS portable)
endif()

# add_cpu_levels(target source...): compiles the sources once per level into target, whose own sources
# see by COREAI_TORCH_HAS_FP16_LEVEL whether there is that one.
function(add_cpu_levels target)
  foreach(level IN LISTS COREAI_TORCH_LEVELS)
    add_library(${target}_${level} OBJECT ${ARGN})
    target_include_directories(${target}_${level} PRIVATE csrc csrc/include)
    target_compile_definitions(${target}_${level} PRIVATE COREAI_TORCH_CPU_LEVEL=${level})
    target_compile_options(${target}_${level} PRIVATE
      ${COREAI_TORCH_KERNEL_FLAGS} ${COREAI_TORCH_FLAGS_${level}})
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND level MATCHES "v4")
      # GCC's own AVX-512 header leaves lanes undefined on purpose and warns of it.
      target_compile_options(${target}_${level} PRIVATE -Wno-uninitialized)
    endif()
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${level}>)
  endforeach()
  if(x86_64_v4_fp16 IN_LIST COREAI_TORCH_LEVELS)
    target_compile_definitions(${target} PRIVATE COREAI_TORCH_HAS_FP16_LEVEL)
  endif()
endfunction()
