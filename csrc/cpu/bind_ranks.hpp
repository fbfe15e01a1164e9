#pragma once

#include <pybind11/pybind11.h>

#include "cpu/runtime.hpp"

namespace vllmlite::cpu {

// Binds Ranks, Exchange and the collective ops of `runtime`.
void bind_ranks(pybind11::module_& module, pybind11::class_<Runtime>& runtime);

}  // namespace vllmlite::cpu
