// The ops as functions of the Python module: what torch.ops.coreai_torch.NAME.default does, but
// past torch.ops, which carries arguments and results over in a list of boxed values. That took as
// long as all the rest of a small call; and the list lay in the heap right where the last output
// had been freed, so that a large output never came to lie in the same, cached place again.
#pragma once

#include <pybind11/pybind11.h>

namespace coreai_torch {

void add_calls(pybind11::module_& module);

}  // namespace coreai_torch
