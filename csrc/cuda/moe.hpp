// Arguments of the products of a mixture of experts. A pair is a token and one of its chosen experts, with the number
// token * top_k + choice; pairs are sorted by expert, and this order is cut into groups.
#pragma once

#include "cuda/ops.hpp"
#include "cuda/runtime.hpp"

namespace vllmlite::cuda {

// Sorted pairs `first` up to `first + count`, of one expert, which are multiplied together. An expert of -1 is no
// group.
struct Group {
  std::int32_t expert, first, count, unused;
};

struct Mixture {
  const std::int32_t* pairs;  // [places]
  const Group* groups;
  int num_groups, rows_of_group, top_k;
};

// The largest number of pairs of a group, chosen for the fastest products of this many pairs.
int rows_of_group(const Runtime& runtime, const Experts& experts, std::int64_t pairs);

// Computes f(gate) * up for the token of each pair: x [tokens, hidden] -> y [sorted pairs, inner].
void multiply_up(const Runtime& runtime, const Mixture& mixture, const Experts& experts, Activation activation,
                 const void* x, void* y);
// Computes down for each pair: x [sorted pairs, inner] -> y [pairs, hidden].
void multiply_down(const Runtime& runtime, const Mixture& mixture, const Experts& experts, const void* x, void* y);

}  // namespace vllmlite::cuda
