// How kernels quantise activations to 8-bit floats; fp8.hpp says what they compute.
#pragma once

#include "cuda/kernel.cuh"

namespace vllmlite::cuda {

constexpr float kLargestFp8 = 448;           // of e4m3
constexpr float kLeastFp8Scale = 0x1p-100F;  // whose reciprocal is a normal number

__device__ __forceinline__ float fp8_scale(float largest) { return fmaxf(largest / kLargestFp8, kLeastFp8Scale); }

template <typename T>
__device__ __forceinline__ float largest_magnitude(const Pack<T, 8>& values) {
  float most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(to_float(values.at[i])));
  return most;
}

// The scale of a block's row, of which each thread has the largest magnitude of its part; `constant` if that is not 0.
__device__ __forceinline__ float fp8_row_scale(float most, float constant, float* shared) {
  if (constant != 0) return constant;
  return fp8_scale(block_reduce(most, shared, [](float a, float b) { return fmaxf(a, b); }));
}

// The codes of eight numbers times `inverse`.
template <typename T>
__device__ __forceinline__ uint2 quantised(const Pack<T, 8>& values, float inverse) {
  std::uint32_t words[2] = {};
#if __CUDA_ARCH__ >= 890
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    std::uint16_t two;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(two)
        : "f"(to_float(values.at[2 * i + 1]) * inverse), "f"(to_float(values.at[2 * i]) * inverse));
    words[i / 2] |= static_cast<std::uint32_t>(two) << (i % 2 * 16);
  }
#endif
  return make_uint2(words[0], words[1]);
}

}  // namespace vllmlite::cuda
