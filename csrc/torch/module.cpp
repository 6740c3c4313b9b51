// The Python module _C: what was built, the SIMD level, and a shorter way to the ops, which are
// registered with PyTorch's dispatcher when this library is loaded.
#include <pybind11/pybind11.h>

#include "coreai_torch/cpu_level.h"
#include "torch/python_calls.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  coreai_torch::add_calls(m);
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = COREAI_TORCH_COMPILER;
    info["build_type"] = COREAI_TORCH_BUILD_TYPE;
#ifdef COREAI_TORCH_CUDA_VERSION
    info["cuda_version"] = COREAI_TORCH_CUDA_VERSION;
    info["cuda_architectures"] = COREAI_TORCH_CUDA_ARCHITECTURES;
#else
    info["cuda_version"] = py::none();
    info["cuda_architectures"] = py::none();
#endif
    return info;
  });
  m.def("cpu_levels", [] {
    py::list names;
    for (int level = 0; level < coreai_torch::cpu_level_count(); ++level) {
      names.append(
          py::make_tuple(
              coreai_torch::cpu_level_name(level), coreai_torch::cpu_level_supported(level)));
    }
    return names;
  });
  m.def("cpu_level", [] { return coreai_torch::cpu_level_name(coreai_torch::cpu_level()); });
  m.def("set_cpu_level", [](const py::object& name) {
    if (name.is_none()) return coreai_torch::set_cpu_level(nullptr);
    return coreai_torch::set_cpu_level(name.cast<std::string>().c_str());
  });
}
