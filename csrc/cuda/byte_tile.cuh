// A tile of a product of 8-bit elements (bytes.hpp), by tile_product.cuh.
#pragma once

#include "cuda/bytes.cuh"
#include "cuda/tile_product.cuh"

namespace vllmlite::cuda {

// Multiplies `rows` rows of x with S::kN of the n rows of w, from n0 on; k is padded. `row_of_x` and `row_of_y` say
// which rows of x and y are those of the tile. See multiply_tile for `ready`; rows of y are `stride` apart.
template <typename S, bool kBlocks, typename In, typename T, typename Out, typename RowOfX, typename RowOfY,
          typename Ready>
__device__ __forceinline__ void multiply_byte_tile(TileShared<In, S>& shared, const In* x, const In* w, const T* bias,
                                                   Out* y, int rows, int n0, int n, int k, int stride,
                                                   const ByteScales& scales, RowOfX row_of_x, RowOfY row_of_y,
                                                   Ready ready) {
  static_assert(kFp8Block % S::kN == 0);
  const int blocks = (k + kFp8Block - 1) / kFp8Block;
  TileSums<S, In> sums{};
  multiply_tile<S>(
      shared, x, w, k, rows, row_of_x, [&](int i) { return min(n0 + i, n - 1); }, ready, sums,
      [&](int block, int row) -> float {
        if constexpr (!kBlocks) return 1;
        return scales.x[static_cast<std::int64_t>(block) * scales.stride + row_of_x(min(row, rows - 1))] *
               scales.w[n0 / kFp8Block * blocks + block];
      });
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = S::first_x(warp) + i * 16 + half * 8 + lane / 4;
      if (row >= rows) continue;
      const int of_x = row_of_x(row);
      Out* to = y + static_cast<std::int64_t>(row_of_y(row)) * stride;
#pragma unroll
      for (int j = 0; j < 2 * S::kColumnTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = n0 + S::first_w(warp) + j * 8 + lane % 4 * 2 + e;
          if (column < n)
            to[column] = from_float<Out>(scaled<kBlocks>(sums[i][j][half * 2 + e], scales, of_x, column,
                                                         bias == nullptr ? 0 : to_float(bias[column])));
        }
    }
}

// Calls `function` with a value of the smallest tile shape that takes `rows` rows, or of the largest that there is
// shared memory for.
template <typename In, typename Function>
void with_tile(const Runtime& runtime, int rows, Function function) {
  const auto takes = [&](std::size_t bytes) { return bytes <= static_cast<std::size_t>(runtime.shared_memory()); };
  if (rows <= SmallTile::kM || !takes(sizeof(TileShared<In, MiddleTile>)))
    function(SmallTile());
  else if (rows <= MiddleTile::kM || !takes(sizeof(TileShared<In, LargeTile>)))
    function(MiddleTile());
  else
    function(LargeTile());
}

}  // namespace vllmlite::cuda
