// What the products of a mixture of experts are given. A pair is a token and one of the experts that it chose, numbered
// token * top_k + choice; pairs are sorted by expert, and groups are cut from that order.
#pragma once

#include "cuda/ops.hpp"
#include "cuda/runtime.hpp"

namespace vllmlite::cuda {

// Pairs of an expert that are multiplied together: places `first` up to `first + count`. Expert -1: nothing to do.
struct Group {
  std::int32_t expert, first, count, unused;
};

struct Mixture {
  const std::int32_t* pairs;  // [places]
  const Group* groups;
  int num_groups, rows_of_group, top_k;
};

// How many pairs a group has at most: a property of how products of so many are best cut.
int rows_of_group(const Runtime& runtime, const Experts& experts, std::int64_t pairs);

// f(gate) * up of each pair's token: x [tokens, hidden] -> y [places, inner].
void multiply_up(const Runtime& runtime, const Mixture& mixture, const Experts& experts, Activation activation,
                 const void* x, void* y);
// Of that: x [places, inner] -> y [pairs, hidden].
void multiply_down(const Runtime& runtime, const Mixture& mixture, const Experts& experts, const void* x, void* y);

}  // namespace vllmlite::cuda
