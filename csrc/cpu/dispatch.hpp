// Which kernels this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.hpp"

namespace vllmlite::cpu {

// The kernel tables of this build that this CPU can run, the most basic first.
std::vector<const Kernels*> available_kernels();

// The table of `isa`, or the best one for "auto". std::invalid_argument if this CPU or this build does not have it.
const Kernels& choose_kernels(const std::string& isa);

// Whether memory that is read once is best left to the CPU's own prefetcher: AMD's are a quarter faster so, Intel's a
// tenth slower.
bool reads_ahead();

}  // namespace vllmlite::cpu
