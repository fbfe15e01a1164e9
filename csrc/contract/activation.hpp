// Nothing here may be inline: files that are compiled for CPUs newer than the one they run on include this header, and
// the linker may keep their copy of an inline function.
#pragma once

#include <cstdint>

namespace vllmlite {

// The activation functions, named as in vllmlite/backends/base.py.
enum class Activation : std::uint8_t { silu, gelu, gelu_tanh, relu, clamped_swiglu };

}  // namespace vllmlite
