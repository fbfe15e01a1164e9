// This header is read by code that is compiled for newer CPUs than the one it may run on: nothing inline.
#pragma once

#include <cstdint>

namespace vllmlite {

// Functions of an activation, by the names in vllmlite/backends/base.py.
enum class Activation : std::uint8_t { silu, gelu, gelu_tanh, relu };

}  // namespace vllmlite
