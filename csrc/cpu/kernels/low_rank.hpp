// The second half of an adapter's low-rank product, added to the result of a linear layer.
//
// Each element of y starts an accumulator of its own, to which the products of all ranks are added in ascending order,
// so a row's result does not depend on the rows beside it.
#pragma once

#include "cpu/kernels/simd.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

// Rows and vectors of y in a register tile.
inline constexpr int kExpandRows = kManyRegisters ? 4 : 2;
inline constexpr int kExpandVectors = 4;
static_assert(kLowRankColumns % (kExpandVectors * kLanes) == 0);

template <typename T, int M>
VLLMLITE_INLINE void expand_tile(const LowRankExpand& block, const float* low, const typename T::Item* b, float* y,
                                 std::ptrdiff_t y_stride) {
  F acc[M][kExpandVectors];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kExpandVectors; ++v) acc[m][v] = load<F>(y + m * y_stride + v * kLanes);
  for (int r = 0; r < block.rank; ++r, b += kLowRankColumns) {
    F bv[kExpandVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kExpandVectors; ++v) bv[v] = T::load(b + v * kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const F factor = set(low[m * block.low_stride + r] * block.scale);
#pragma GCC unroll 4
      for (int v = 0; v < kExpandVectors; ++v) acc[m][v] = fma(factor, bv[v], acc[m][v]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kExpandVectors; ++v) store(y + m * y_stride + v * kLanes, acc[m][v]);
}

// Adds to kLowRankColumns columns of the rows of y.
template <typename T>
void expand_columns(const LowRankExpand& block, const typename T::Item* b, float* y, std::ptrdiff_t y_stride) {
  for (int column = 0; column < kLowRankColumns; column += kExpandVectors * kLanes) {
    int m = 0;
    for (; m + kExpandRows <= block.m; m += kExpandRows)
      expand_tile<T, kExpandRows>(block, block.low + m * block.low_stride, b + column, y + m * y_stride + column,
                                  y_stride);
    for (; m < block.m; ++m)
      expand_tile<T, 1>(block, block.low + m * block.low_stride, b + column, y + m * y_stride + column, y_stride);
  }
}

template <typename T>
void expand_low_rank(const LowRankExpand& block) {
  const auto* b = static_cast<const typename T::Item*>(block.b);
  const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(block.rank) * kLowRankColumns;
  int n = 0;
  for (; n + kLowRankColumns <= block.n; n += kLowRankColumns, b += size)
    expand_columns<T>(block, b, block.y + n, block.y_stride);
  if (n == block.n) return;
  const std::size_t bytes = static_cast<std::size_t>(block.n - n) * sizeof(float);
  float padded[kLowRankColumns] = {};
  for (int m = 0; m < block.m; ++m) {
    LowRankExpand row = block;
    row.low += m * block.low_stride;
    row.m = 1;
    float* const y = block.y + m * block.y_stride + n;
    __builtin_memcpy(padded, y, bytes);
    expand_columns<T>(row, b, padded, 0);
    __builtin_memcpy(y, padded, bytes);
  }
}

}  // namespace vllmlite::cpu::VLLMLITE_ISA
