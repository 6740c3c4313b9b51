# libtorch as the target coreai_torch_libtorch. For the Python module from the paths that setup.py asks
# torch for: find_package(Torch) would refuse to work with a CUDA build of torch on a machine without
# the CUDA toolkit. For C++ users from find_package, with which their own program finds it.
if(NOT COREAI_TORCH_PYTHON)
  find_package(Torch REQUIRED)
  add_library(coreai_torch_libtorch INTERFACE)
  target_link_libraries(coreai_torch_libtorch INTERFACE ${TORCH_LIBRARIES})
  return()
endif()

foreach(variable TORCH_INCLUDE_DIRS TORCH_LIBRARY_DIRS TORCH_CXX11_ABI)
  if(NOT DEFINED ${variable})
    message(FATAL_ERROR
      "${variable} is not set. Build the Python module with: pip install --no-build-isolation .")
  endif()
endforeach()

add_library(coreai_torch_libtorch INTERFACE)
target_include_directories(coreai_torch_libtorch SYSTEM INTERFACE ${TORCH_INCLUDE_DIRS})
target_compile_definitions(coreai_torch_libtorch INTERFACE
  _GLIBCXX_USE_CXX11_ABI=${TORCH_CXX11_ABI})
target_link_directories(coreai_torch_libtorch INTERFACE ${TORCH_LIBRARY_DIRS})
target_link_libraries(coreai_torch_libtorch INTERFACE torch_cpu c10)

# The current stream comes from libtorch_cuda, which a torch without CUDA does not have.
if(COREAI_TORCH_CUDA)
  find_library(COREAI_TORCH_LIBTORCH_CUDA torch_cuda PATHS ${TORCH_LIBRARY_DIRS} NO_DEFAULT_PATH)
  if(COREAI_TORCH_LIBTORCH_CUDA)
    target_link_libraries(coreai_torch_libtorch INTERFACE
      -Wl,--no-as-needed ${COREAI_TORCH_LIBTORCH_CUDA} -Wl,--as-needed)
  endif()
endif()
