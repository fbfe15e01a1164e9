// Ops in which the ranks that compute a model together exchange tensors.
#pragma once

#include <memory>
#include <vector>

#include "cpu/ranks.hpp"
#include "cpu/runtime.hpp"

namespace vllmlite::cpu {

// The sum of the ranks' float32 `x`, added in rank order. Overwrites x unless it is read-only.
Tensor all_reduce(Runtime& runtime, const Tensor& x, const std::shared_ptr<Exchange>& exchange);

// The ranks' `x` [N, widths[rank]] side by side.
Tensor all_gather(Runtime& runtime, const Tensor& x, const std::vector<std::int64_t>& widths,
                  const std::shared_ptr<Exchange>& exchange);

// Sends x to the rank that calls receive. A tensor of the same shape and dtype must be expected there.
void send(Runtime& runtime, const Tensor& x, const std::shared_ptr<Ranks>& ranks);
Tensor receive(Runtime& runtime, std::vector<std::int64_t> shape, DType dtype, int from,
               const std::shared_ptr<Ranks>& ranks);

}  // namespace vllmlite::cpu
