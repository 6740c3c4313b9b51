#include "torch/python_calls.h"

#include <tuple>

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "torch/add_rms_norm.h"
#include "torch/rms_norm.h"

namespace coreai_torch {
namespace {

namespace py = pybind11;

// Are these tensors and eps, with nobody between Python and the dispatcher who wants to see them: a
// subclass of Tensor or a mode with a __torch_function__?
template <int kTensors>
bool are_plain(PyObject* const* args, Py_ssize_t count) {
  if (count != kTensors + 1 || !PyFloat_CheckExact(args[kTensors])) return false;
  for (int i = 0; i < kTensors; ++i) {
    if (!THPVariable_CheckExact(args[i])) return false;
  }
  return !at::impl::torch_function_mode_enabled();
}

// torch.ops.coreai_torch.NAME.default, for everything else.
PyObject* call_torch_op(const char* name, PyObject* const* args, Py_ssize_t count) {
  const py::object op =
      py::module_::import("torch").attr("ops").attr("coreai_torch").attr(name).attr("default");
  return PyObject_Vectorcall(op.ptr(), args, count, nullptr);
}

const at::Tensor& tensor(PyObject* arg) { return THPVariable_Unpack(arg); }

PyObject* fused_rms_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!are_plain<2>(args, count)) return call_torch_op("fused_rms_norm", args, count);
  const double eps = PyFloat_AS_DOUBLE(args[2]);
  at::Tensor output;
  {
    const py::gil_scoped_release no_gil;
    output = call_rms_norm(tensor(args[0]), tensor(args[1]), eps);
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

PyObject* fused_add_rms_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!are_plain<3>(args, count)) return call_torch_op("fused_add_rms_norm", args, count);
  const double eps = PyFloat_AS_DOUBLE(args[3]);
  std::tuple<at::Tensor, at::Tensor> results;
  {
    const py::gil_scoped_release no_gil;
    results = call_add_rms_norm(tensor(args[0]), tensor(args[1]), tensor(args[2]), eps);
  }
  auto& [output, new_residual] = results;
  return py::make_tuple(
             py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output))),
             py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(new_residual))))
      .release()
      .ptr();
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kFunction)), METH_FASTCALL,
      nullptr};
}

}  // namespace

void add_calls(pybind11::module_& module) {
  static PyMethodDef methods[] = {
      method<fused_rms_norm>("fused_rms_norm"),
      method<fused_add_rms_norm>("fused_add_rms_norm"),
      {},
  };
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace coreai_torch
