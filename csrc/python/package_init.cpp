// `__init__.abi3.so` of a wheel's packages: runs the `_package_init.py` beside it as the package's
// `__init__`. Python prefers an extension module to an `__init__.py` in the same folder, which lets
// a wheel of ours and Apple's `coreai-torch` share the import name without sharing a file
// (build_backend/README.md). One file serves both packages: Python looks for `PyInit_` and the
// package's last name.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

namespace {

constexpr char kRunPackageInit[] = R"(
from importlib.machinery import SourceFileLoader
from os.path import dirname, join

path = join(dirname(package.__file__), "_package_init.py")
exec(SourceFileLoader(package.__name__, path).get_code(package.__name__), vars(package))
)";

int run_package_init(PyObject* package) {
  PyObject* names = PyDict_New();
  PyObject* code = Py_CompileString(kRunPackageInit, "package_init.cpp", Py_file_input);
  PyObject* result = nullptr;
  if (names && code && PyDict_SetItemString(names, "package", package) == 0 &&
      PyDict_SetItemString(names, "__builtins__", PyEval_GetBuiltins()) == 0) {
    result = PyEval_EvalCode(code, names, names);
  }
  Py_XDECREF(code);
  Py_XDECREF(names);
  Py_XDECREF(result);
  return result ? 0 : -1;
}

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(run_package_init)}, {0, nullptr}};

PyModuleDef definition(const char* name) {
  return {PyModuleDef_HEAD_INIT, name, nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};
}

PyModuleDef coreai_torch = definition("coreai_torch");
PyModuleDef composite_ops = definition("coreai_torch.composite_ops");

}  // namespace

PyMODINIT_FUNC PyInit_coreai_torch() { return PyModuleDef_Init(&coreai_torch); }
PyMODINIT_FUNC PyInit_composite_ops() { return PyModuleDef_Init(&composite_ops); }
