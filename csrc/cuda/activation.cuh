// The activation functions of MLPs.
#pragma once

#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"

namespace vllmlite::cuda {

template <Activation kActivation>
__device__ __forceinline__ float activated(float x) {
  if constexpr (kActivation == Activation::relu) return x < 0 ? 0 : x;
  if constexpr (kActivation == Activation::silu) return x / (1 + expf(-x));
  if constexpr (kActivation == Activation::gelu) return 0.5F * x * erfcf(-x * 0.70710678118654752F);
  constexpr float kFactor = 0.79788456080286536F;  // sqrt(2 / pi)
  return 0.5F * x * (1 + tanhf(kFactor * fmaf(0.044715F * x * x, x, x)));
}

// The same, chosen at run time: for kernels that would grow too large with a copy for each.
__device__ __forceinline__ float activated(float x, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return activated<Activation::relu>(x);
    case Activation::silu:
      return activated<Activation::silu>(x);
    case Activation::gelu:
      return activated<Activation::gelu>(x);
    default:
      return activated<Activation::gelu_tanh>(x);
  }
}

}  // namespace vllmlite::cuda
