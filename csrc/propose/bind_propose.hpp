// Python classes of the look-up of drafts, in every extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace vllmlite {

void bind_propose(pybind11::module_& module);

}  // namespace vllmlite
