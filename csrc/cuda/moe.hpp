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
  const std::int32_t* pairs;    // [places]
  const std::int32_t* experts;  // [pairs]
  const Group* groups;
  int num_groups, rows_of_group, top_k;
};

// A product of the experts' weights [n, k] with the rows of x for the pairs of each expert. x and y have a row for each
// sorted pair, or, where it says so, x one for each token and y one for each pair by its number.
struct ExpertProduct {
  Mixture mixture;
  bool x_of_tokens, y_of_pairs;
  const void* x;
  void* y;
  const void* const* w;  // by expert
  int n, k;
  Activation activation = Activation::silu;  // of products with a gate
  // By expert, of packed weights: scales; zeros of bytes; of groups of integers the order of columns, null where it is
  // x's.
  const void* const* w_scales = nullptr;
  const void* const* w_zeros = nullptr;
  const void* const* w_orders = nullptr;
  ByteScales x_scales = {};  // of x, where it is quantised
};

// The largest number of pairs of a group, chosen for the fastest products of this many pairs.
int rows_of_group(const Runtime& runtime, const Experts& experts, std::int64_t pairs);
// The same where weights are in groups of integers, and of bytes, from the mean number of an expert's pairs.
int pairs_of_group(const Runtime& runtime, std::int64_t pairs_of_expert);
int pairs_of_byte_group(const Runtime& runtime, std::int64_t pairs_of_expert);

// Computes f(gate) * up of float weights: x [tokens, hidden] -> y [sorted pairs, inner].
void multiply_gated(const Runtime& runtime, const ExpertProduct& product, DType dtype);
// Computes the product with float weights.
void multiply_experts(const Runtime& runtime, const ExpertProduct& product, DType dtype);
// The same with weights in groups of integers, and of 8-bit elements; x is of the runtime's dtype, or quantised.
void multiply_grouped_experts(const Runtime& runtime, const ExpertProduct& product, const GroupedForm& form);
void multiply_byte_experts(const Runtime& runtime, const ExpertProduct& product, const ByteInputs& inputs);

}  // namespace vllmlite::cuda
