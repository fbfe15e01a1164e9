// Products of a warpgroup whose first operand is a fragment in registers, made of the packed integers of grouped.hpp.
#pragma once

#include "cuda/grouped_integers.cuh"
#include "cuda/hopper.cuh"

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

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define VLLMLITE_4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define VLLMLITE_8(c, i) VLLMLITE_4(c, i), VLLMLITE_4(c, i + 4)
#define VLLMLITE_16(c, i) VLLMLITE_8(c, i), VLLMLITE_8(c, i + 8)
#define VLLMLITE_32(c, i) VLLMLITE_16(c, i), VLLMLITE_16(c, i + 16)
#define VLLMLITE_64(c, i) VLLMLITE_32(c, i), VLLMLITE_32(c, i + 32)

// sums (64 x kCount * 2) = a b, or += unless `first`: a is a fragment, 64 x 16, b kCount * 2 rows of 16 columns.
template <typename T, int kCount>
__device__ __forceinline__ void multiply_fragment(float (&sums)[kCount], const std::uint32_t (&a)[4], std::uint64_t b,
                                                  bool first) {
#define VLLMLITE_MULTIPLY(type, columns, names, all, a0, a1, a2, a3, at_b, adds)                                \
  asm volatile("{\n.reg .pred adds;\nsetp.eq.u32 adds, " adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
               "k16.f32." type " {" names "}, {" a0 "," a1 "," a2 "," a3 "}, " at_b ", adds, 1, 1, 0;\n}"       \
               : all(sums, 0)                                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<std::uint32_t>(first)))
#define VLLMLITE_MULTIPLY_BY(type)                                                                                    \
  if constexpr (kCount == 4)                                                                                          \
    VLLMLITE_MULTIPLY(type, "8", "%0,%1,%2,%3", VLLMLITE_4, "%4", "%5", "%6", "%7", "%8", "%9");                      \
  else if constexpr (kCount == 8)                                                                                     \
    VLLMLITE_MULTIPLY(type, "16", "%0,%1,%2,%3,%4,%5,%6,%7", VLLMLITE_8, "%8", "%9", "%10", "%11", "%12", "%13");     \
  else if constexpr (kCount == 16)                                                                                    \
    VLLMLITE_MULTIPLY(type, "32", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", VLLMLITE_16, "%16", "%17", \
                      "%18", "%19", "%20", "%21");                                                                    \
  else if constexpr (kCount == 32)                                                                                    \
    VLLMLITE_MULTIPLY(type, "64",                                                                                     \
                      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"    \
                      "%25,%26,%27,%28,%29,%30,%31",                                                                  \
                      VLLMLITE_32, "%32", "%33", "%34", "%35", "%36", "%37");                                         \
  else                                                                                                                \
    VLLMLITE_MULTIPLY(type, "128",                                                                                    \
                      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"    \
                      "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"  \
                      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63",                              \
                      VLLMLITE_64, "%64", "%65", "%66", "%67", "%68", "%69")
  static_assert(kCount <= 64);
  if constexpr (std::is_same_v<T, f16>) {
    VLLMLITE_MULTIPLY_BY("f16.f16");
  } else {
    VLLMLITE_MULTIPLY_BY("bf16.bf16");
  }
#undef VLLMLITE_MULTIPLY_BY
#undef VLLMLITE_MULTIPLY
}

#undef VLLMLITE_64
#undef VLLMLITE_32
#undef VLLMLITE_16
#undef VLLMLITE_8
#undef VLLMLITE_4

#endif

}  // namespace vllmlite::cuda
