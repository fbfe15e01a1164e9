// The products of a warp's 16 rows of a weight in groups of integers with rows of x, a stage of kStageColumns columns
// at a time (layout: grouped.hpp). Rows of w are the rows of the tensor cores' first operand, rows of x the columns of
// the second: a thread holds the sums of rows lane / 4 and lane / 4 + 8 of w, and of rows 8 j + 2 (lane % 4) and the
// next of x, for each j < kM / 8.
//
// Integers minus their zero are exact in 16 bits. They are multiplied as they are, and the sum of a group is multiplied
// by the group's scale in float32.
#pragma once

#include "cuda/grouped_integers.cuh"

namespace vllmlite::cuda {

// Rows of x for a stage in shared memory, in rows of 64 columns whose words of 16 bytes are swizzled over eight rows.
template <int kM>
using StageOfX = uint4[kStageColumns / 64][kM][8];

// The place of 8 columns of a row of x, of which there are kStageColumns / 8 in a stage.
template <int kM>
__device__ __forceinline__ uint4& word_of_stage(StageOfX<kM>& x, int row, int chunk) {
  return x[chunk / 8][row][chunk % 8 ^ row % 8];
}

// Adds the products of a stage to `sums`. `scales` are those of the warp's rows, the next group's `stride` words on.
// `multiply_group` (first step, words, integers, products) computes the sums of a group's columns.
template <typename T, int kBits, int kGroups, int kSums, typename Multiply>
__device__ __forceinline__ void multiply_stage(const uint4 (&weight)[kBits / 2][32], const std::uint32_t* scales,
                                               int stride, float (&sums)[kSums], Multiply multiply_group) {
  constexpr int kSteps = kStageColumns / 16 / kGroups;
  const int lane = static_cast<int>(threadIdx.x % 32);
  std::uint32_t words[kBits * 2];
  load_words(weight, lane, words);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const auto [scale_a, scale_b] = *reinterpret_cast<const uint2*>(scales + group * stride + lane / 4 * 2);
    const Integers<T, kBits> integers(scale_a & 0xffU, scale_b & 0xffU);
    float products[kSums];
    multiply_group(group * kSteps, words, integers, products);
    const float first = float_of_bits(scale_a & 0xffffff00U), second = float_of_bits(scale_b & 0xffffff00U);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = fmaf(i % 4 < 2 ? first : second, products[i], sums[i]);
  }
}

// The sums of kSteps steps of 16 columns, by mma.sync.
template <typename T, int kBits, int kSteps, int kM>
__device__ __forceinline__ void multiply_steps(const StageOfX<kM>& x, int first_step,
                                               const std::uint32_t (&words)[kBits * 2],
                                               const Integers<T, kBits>& integers, float (&products)[kM / 2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float odd[4] = {};  // with 8 rows, two sums take turns, which need not wait for each other
#pragma unroll
  for (int i = 0; i < kM / 2; ++i) products[i] = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int step = first_step + i;
    std::uint32_t a[4], b[4];
    integers.fragment(words, step, a);
    const auto& part = x[step / 4];
    const int word = step % 4 * 2 + lane / 8 % 2;
    if constexpr (kM == 8) {
      load_matrices(b, &part[lane % 8][word ^ lane % 8]);
      multiply<T>(i % 2 == 0 ? reinterpret_cast<float (&)[4]>(products[0]) : odd, a, b[0], b[1]);
    } else {
#pragma unroll
      for (int j = 0; j < kM / 16; ++j) {
        load_matrices(b, &part[j * 16 + lane / 16 * 8 + lane % 8][word ^ lane % 8]);
        multiply<T>(reinterpret_cast<float (&)[4]>(products[j * 8]), a, b[0], b[1]);
        multiply<T>(reinterpret_cast<float (&)[4]>(products[j * 8 + 4]), a, b[2], b[3]);
      }
    }
  }
  if constexpr (kM == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[i] += odd[i];
  }
}

}  // namespace vllmlite::cuda
