// Python's view of Tensor. Each extension module binds its own (py::module_local()); between modules tensors travel by
// DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>

#include "tensor/tensor.hpp"

namespace vllmlite {

// `before_export` is called with the tensor's device before its memory is handed out, so that a consumer on another
// stream sees finished work; the CPU backend passes none.
void bind_tensor(pybind11::module_& module, std::function<void(Device)> before_export = {});

// A zero-copy view of any object with DLPack support (numpy, torch, another module's Tensor), or the Tensor itself.
Tensor tensor_from_python(pybind11::handle object);

}  // namespace vllmlite
