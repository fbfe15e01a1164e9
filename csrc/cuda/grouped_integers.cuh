// Fragments of tensor-core products out of the packed integers of grouped.hpp.
#pragma once

#include "cuda/grouped_product.cuh"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

// Two equal numbers of T, 1024 in float16 and 128 in bfloat16: integers 0 to 15 are added to them by setting their low
// bits.
template <typename T>
constexpr std::uint32_t kBase = std::is_same_v<T, f16> ? 0x64006400U : 0x43004300U;

__device__ __forceinline__ float float_of_bits(std::uint32_t bits) { return __uint_as_float(bits); }

// Loads the packed integers of a lane out of shared memory.
template <int kCount>
__device__ __forceinline__ void load_words(const uint4 (&from)[kCount][32], int lane,
                                           std::uint32_t (&words)[kCount * 4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint4 four = from[i][lane];
    words[4 * i] = four.x;
    words[4 * i + 1] = four.y;
    words[4 * i + 2] = four.z;
    words[4 * i + 3] = four.w;
  }
}

// The integers at bits 0 to 3 of each half of `word`, added to `base`.
__device__ __forceinline__ std::uint32_t nibbles(std::uint32_t word, std::uint32_t base) {
  std::uint32_t both;
  asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(both) : "r"(word), "r"(base));
  return both;
}

template <typename T>
__device__ __forceinline__ std::uint32_t minus(std::uint32_t a, std::uint32_t b) {
  std::uint32_t difference;
  if constexpr (std::is_same_v<T, f16>)
    asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  else
#if __CUDA_ARCH__ >= 900
    asm("sub.bf16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
#elif __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(a), "r"(0x3f803f80U), "r"(b ^ 0x80008000U));
#else
    difference = 0;  // no tensor cores for bfloat16: such a backend does not run these kernels
#endif
  return difference;
}

// The fragment a of 16 rows and 16 columns out of a thread's integers (grouped.hpp says in which order), minus the
// zeros of its two rows.
template <typename T, int kBits>
struct Integers;

template <typename T>
struct Integers<T, 4> {
  std::uint32_t zeros[2];

  __device__ __forceinline__ Integers(std::uint32_t zero_a, std::uint32_t zero_b)
      : zeros{kBase<T> + zero_a * 0x10001U, kBase<T> + zero_b * 0x10001U} {}

  __device__ __forceinline__ void fragment(const std::uint32_t (&words)[8], int step, std::uint32_t (&a)[4]) const {
    const std::uint32_t word = words[step];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = minus<T>(nibbles(word >> (4 * i), kBase<T>), zeros[i % 2]);
  }
};

template <typename T>
struct Integers<T, 8> {
  float zeros[2];

  __device__ __forceinline__ Integers(std::uint32_t zero_a, std::uint32_t zero_b)
      : zeros{float_of_bits(0x4b000000U + zero_a), float_of_bits(0x4b000000U + zero_b)} {}

  __device__ __forceinline__ void fragment(const std::uint32_t (&words)[16], int step, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t word = words[2 * step + i / 2];
      const float low = float_of_bits(__byte_perm(word, 0x4b000000U, i % 2 == 0 ? 0x7650U : 0x7652U));
      const float high = float_of_bits(__byte_perm(word, 0x4b000000U, i % 2 == 0 ? 0x7651U : 0x7653U));
      a[i] = pair<T>(low - zeros[i % 2], high - zeros[i % 2]);
    }
  }
};

}  // namespace vllmlite::cuda
