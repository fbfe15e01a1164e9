#pragma once

#include <pybind11/pybind11.h>

namespace vllmlite::cuda {

// Adds the classes that vllmlite/backends/cuda.py uses: a runtime, whose methods are the ops, and their data.
void bind_backend(pybind11::module_& module);

}  // namespace vllmlite::cuda
