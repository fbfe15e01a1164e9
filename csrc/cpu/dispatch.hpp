// Which kernels this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.hpp"

namespace vllmlite::cpu {

// The tables of this binary that this CPU can run, the plainest first.
std::vector<const Kernels*> available_kernels();

// The table of `isa`, or the best one for "auto". std::invalid_argument if there is none.
const Kernels& choose_kernels(const std::string& isa);

// Whether this CPU, going over memory once, is fastest by itself: AMD's is, by a quarter; Intel's loses a tenth.
bool reads_ahead();

}  // namespace vllmlite::cpu
