// Operands of the decoding kernel's matrix products: fragments of keys and values from shared memory, queries and
// results. Floats are multiplied in their own dtype, which is that of q and the result. Bytes become f16 in registers,
// exactly; then q is rounded to f16, with magnitudes of at most 65504.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/cache.cuh"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

template <typename E>
using Multiplied = std::conditional_t<kQuantized<E>, f16, E>;

// Fragments A of mma.cuh of kSteps products each, which one load out of shared memory covers. Their logical rows and
// columns are elements and keys in an order that bytes dictate: a 4-byte word of them holds four elements of a key, or
// two of two keys.
template <typename E>
struct Fragments {
  static constexpr int kSteps = 2 / static_cast<int>(sizeof(E)), kWord = kPack<E>;

  // The first of two dimensions of a key that are columns 2 quad + 8 j and the next of a product.
  static __device__ __forceinline__ int dimension(int quad, int j) {
    return kQuantized<E> ? quad * 4 + j * 2 : j * 8 + quad * 2;
  }

  // The element of a value that is row group + 8 half of a product.
  static __device__ __forceinline__ int element(int group, int half) {
    return kQuantized<E> ? group * 2 + half : half * 8 + group;
  }

  // 16 keys, the first of which is `rows`, from element `at` on.
  template <int kStride>
  static __device__ __forceinline__ void keys(std::uint32_t (&to)[kSteps][4], const E (*rows)[kStride], int at,
                                              int lane) {
    const E* from = &rows[lane % 16][at + lane / 16 * kWord];
    if constexpr (!kQuantized<E>) {
      load_matrices(to[0], from);
    } else {
      std::uint32_t words[4];
      load_matrices(words, from);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          to_halves<E, true>(words[step * 2 + half], to[step][half], to[step][half + 2]);
    }
  }

  // Values of 16 keys, transposed.
  template <int kStride>
  static __device__ __forceinline__ void values(std::uint32_t (&to)[kSteps][4], const E (*rows)[kStride], int at,
                                                int lane) {
    if constexpr (!kQuantized<E>) {
      load_matrices_transposed(to[0], &rows[lane / 16 * 8 + lane % 8][at + lane / 8 % 2 * 8]);
    } else {
      std::uint32_t words[4];
      load_matrices_transposed(words, &rows[lane % 16][at + lane / 16 * kWord]);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          to_halves<E, false>(words[step * 2 + half], to[step][half * 2], to[step][half * 2 + 1]);
    }
  }
};

// Two adjacent elements of q.
template <typename E>
__device__ __forceinline__ std::uint32_t query_pair(const Attention& given, std::int64_t at) {
  const std::uint32_t bits = *reinterpret_cast<const std::uint32_t*>(static_cast<const std::uint16_t*>(given.q) + at);
  if (!kQuantized<E> || given.dtype == DType::float16) return bits;
  // A NaN fails both comparisons.
  const auto bounded = [](float x) { return x > 65504 ? 65504 : x < -65504 ? -65504 : x; };
  return pair<f16>(bounded(__uint_as_float(bits << 16)), bounded(__uint_as_float(bits & 0xffff0000U)));
}

// Stores two adjacent elements of the result.
template <typename E>
__device__ __forceinline__ void store_results(const Attention& given, std::int64_t at, float first, float second) {
  auto* to = reinterpret_cast<std::uint32_t*>(static_cast<std::uint16_t*>(given.out) + at);
  if constexpr (!kQuantized<E>) {
    *to = pair<E>(first, second);
  } else {
    first *= given.value_scale;
    second *= given.value_scale;
    *to = given.dtype == DType::float16 ? pair<f16>(first, second) : pair<bf16>(first, second);
  }
}

}  // namespace vllmlite::cuda
