# cmake --install: headers, libraries, and a package for find_package(coreai_torch).
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(targets coreai_torch_kernels)
set_target_properties(coreai_torch_kernels PROPERTIES EXPORT_NAME kernels)
if(COREAI_TORCH_CUDA)
  list(APPEND targets coreai_torch_cuda_kernels)
  set_target_properties(coreai_torch_cuda_kernels PROPERTIES EXPORT_NAME cuda_kernels)
endif()
if(COREAI_TORCH_OPS)
  list(APPEND targets coreai_torch_ops)
  set_target_properties(coreai_torch_ops PROPERTIES EXPORT_NAME ops)
endif()

set(folder ${CMAKE_INSTALL_LIBDIR}/cmake/coreai_torch)
install(TARGETS ${targets} EXPORT coreai_torch INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY csrc/include/coreai_torch DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT coreai_torch NAMESPACE coreai_torch:: DESTINATION ${folder}
  FILE coreai_torch-targets.cmake)
configure_package_config_file(cmake/coreai_torch-config.cmake.in coreai_torch-config.cmake
  INSTALL_DESTINATION ${folder})
write_basic_package_version_file(coreai_torch-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/coreai_torch-config.cmake
  ${PROJECT_BINARY_DIR}/coreai_torch-config-version.cmake
  DESTINATION ${folder})
