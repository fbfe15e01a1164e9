// Activations that gate.
#pragma once

#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"

namespace vllmlite::cuda {

__device__ __forceinline__ float gate_of(Gate gate, float x) {
  if (gate == Gate::silu) return x / (1 + expf(-x));
  if (gate == Gate::gelu) return 0.5F * x * erfcf(-x * 0.70710678118654752F);
  constexpr float kFactor = 0.79788456080286536F;  // sqrt(2 / pi)
  return 0.5F * x * (1 + tanhf(kFactor * fmaf(0.044715F * x * x, x, x)));
}

}  // namespace vllmlite::cuda
