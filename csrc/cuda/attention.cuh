// Changes of attention scores after scaling: a soft cap, then linear biases (Press et al. 2021).
#pragma once

#include "cuda/attention.hpp"
#include "cuda/kernel.cuh"

namespace vllmlite::cuda {

__host__ __device__ __forceinline__ bool edits_scores(const Attention& given) {
  return given.soft_cap > 0 || given.alibi != nullptr;
}

__device__ __forceinline__ float slope_of(const Attention& given, int head) {
  return given.alibi == nullptr ? 0 : given.alibi[head];
}

// A product of query and key, scaled and edited; `offset` is the key's position less the query's.
__device__ __forceinline__ float edited_score(const Attention& given, float score, float slope, int offset) {
  score *= given.scale;
  if (given.soft_cap > 0) score = given.soft_cap * tanhf(score / given.soft_cap);
  return fmaf(slope, static_cast<float>(offset), score);
}

}  // namespace vllmlite::cuda
