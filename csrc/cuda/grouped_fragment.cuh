// Fragments in registers, made of the packed integers of grouped.hpp with their scales.
#pragma once

#include "cuda/grouped_integers.cuh"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

// a * b, and below a * b + c, of pairs of T.
template <typename T>
__device__ __forceinline__ std::uint32_t times(std::uint32_t a, std::uint32_t b) {
  std::uint32_t c;
  if constexpr (std::is_same_v<T, f16>)
    asm("mul.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

template <typename T>
__device__ __forceinline__ std::uint32_t times_plus(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t d;
  if constexpr (std::is_same_v<T, f16>)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Fragments of weights: (integer - zero) * scale, rounded to T, of the two rows of a thread.
template <typename T, int kBits>
struct ScaledIntegers;

// A scale of more bits than T has is kept as a sum of two numbers of T.
template <typename T>
struct ScaledIntegers<T, 4> {
  std::uint32_t zeros[2], high[2], low[2];

  __device__ __forceinline__ void set(uint2 scales) {
    const std::uint32_t of_row[2] = {scales.x, scales.y};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float scale = float_of_bits(of_row[row] & 0xffffff00U), rounded = to_float(from_float<T>(scale));
      zeros[row] = kBase<T> + (of_row[row] & 0xffU) * 0x10001U;
      high[row] = pair<T>(scale, scale);
      low[row] = pair<T>(scale - rounded, scale - rounded);
    }
  }

  __device__ __forceinline__ void fragment(const std::uint32_t (&words)[8], int step, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t integers = minus<T>(nibbles(words[step] >> (4 * i), kBase<T>), zeros[i % 2]);
      a[i] = times_plus<T>(integers, high[i % 2], times<T>(integers, low[i % 2]));
    }
  }
};

template <typename T>
struct ScaledIntegers<T, 8> {
  float zeros[2], scales[2];

  __device__ __forceinline__ void set(uint2 both) {
    const std::uint32_t of_row[2] = {both.x, both.y};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      zeros[row] = float_of_bits(0x4b000000U + (of_row[row] & 0xffU));
      scales[row] = float_of_bits(of_row[row] & 0xffffff00U);
    }
  }

  __device__ __forceinline__ void fragment(const std::uint32_t (&words)[16], int step, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t word = words[2 * step + i / 2];
      const float low = float_of_bits(__byte_perm(word, 0x4b000000U, i % 2 == 0 ? 0x7650U : 0x7652U));
      const float high = float_of_bits(__byte_perm(word, 0x4b000000U, i % 2 == 0 ? 0x7651U : 0x7653U));
      a[i] = pair<T>((low - zeros[i % 2]) * scales[i % 2], (high - zeros[i % 2]) * scales[i % 2]);
    }
  }
};

}  // namespace vllmlite::cuda
