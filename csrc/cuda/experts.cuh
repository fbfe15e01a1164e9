// The rows of x and y that the products of a mixture of experts have for a place in the sorted pairs.
#pragma once

#include "cuda/kernel.cuh"
#include "cuda/moe.hpp"

namespace vllmlite::cuda {

__device__ __forceinline__ int row_of_x(const ExpertProduct& product, int place) {
  return product.x_of_tokens ? product.mixture.pairs[place] / product.mixture.top_k : place;
}

__device__ __forceinline__ int row_of_y(const ExpertProduct& product, int place) {
  return product.y_of_pairs ? product.mixture.pairs[place] : place;
}

}  // namespace vllmlite::cuda
