// A tile of a product x @ w.T of 16-bit or 8-bit floats, or of 8-bit integers, on tensor cores, each output summed up
// in one order whatever the tile's shape is: the columns one after another, 32 bytes of them at a time, in one
// accumulator. The sum of a stage's columns of 8-bit floats is scaled before it is added.
//
// Block: kWarpsM x kWarpsN warps, of which warp i has kM / kWarpsM rows of x, part i % kWarpsM, and kN / kWarpsN rows
// of w, part i / kWarpsM. Shared memory: a ring of kStages stages of 128 bytes of columns, kM rows of x and kN of w,
// padded by 16 bytes a row so that eight rows lie in different banks; asynchronous copies fill it ahead, and the block
// synchronises once a stage. A thread holds the sums of the fragments of mma.cuh: rows of x are those of the first
// operand.
#pragma once

#include "cuda/mma.cuh"

namespace vllmlite::cuda {

// kM, kN: rows of x and of w in a tile.
template <int kTileM, int kTileN, int kOfM, int kOfN, int kDeep>
struct TileShape {
  static constexpr int kM = kTileM, kN = kTileN, kWarpsM = kOfM, kWarpsN = kOfN, kStages = kDeep;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;
  static constexpr int kRowTiles = kM / kWarpsM / 16, kColumnTiles = kN / kWarpsN / 16;  // of 16, a warp's

  // The first row of x, and of w, that a warp has.
  static __device__ __forceinline__ int first_x(int warp) { return warp % kWarpsM * kRowTiles * 16; }
  static __device__ __forceinline__ int first_w(int warp) { return warp / kWarpsM * kColumnTiles * 16; }
};

using SmallTile = TileShape<16, 32, 1, 2, 6>;
using MiddleTile = TileShape<64, 64, 2, 2, 4>;
using LargeTile = TileShape<128, 128, 2, 4, 2>;

template <typename T, typename S>
struct TileShared {
  static constexpr int kColumns = 128 / static_cast<int>(sizeof(T));  // of x and w in a stage
  static constexpr int kStride = kColumns + kPack<T>;
  T x[S::kStages][S::kM][kStride];
  T w[S::kStages][S::kN][kStride];
};

// A warp's part of the sums of products of T, as fragments of mma.cuh.
template <typename S, typename T = float>
using TileSums = std::conditional_t<std::is_same_v<T, std::int8_t>, int, float>[S::kRowTiles][2 * S::kColumnTiles][4];

// The scale of the sums of 16-bit numbers.
struct Unscaled {
  __device__ __forceinline__ float operator()(int, int) const { return 1; }
};

// Adds the products of `k` columns, a multiple of a 16-byte word's, to `sums`. `x_row` and `w_row` say which rows of x
// and w are those of the tile, of which x has `rows`. Weights are asked for, then `ready` is called, then x is read.
// The sum of a stage of 8-bit floats is multiplied by `scale` (stage, row of x in the tile).
template <typename S, typename T, typename RowOfX, typename RowOfW, typename Ready, typename Scale = Unscaled>
__device__ __forceinline__ void multiply_tile(TileShared<T, S>& shared, const T* x, const T* w, int k, int rows,
                                              RowOfX x_row, RowOfW w_row, Ready ready, TileSums<S, T>& sums,
                                              Scale scale = {}) {
  constexpr int kColumns = TileShared<T, S>::kColumns, kOfWord = kPack<T>;
  constexpr int kWords = 8, kStep = S::kThreads / kWords;
  constexpr int kCopiesOfX = S::kM / kStep, kCopiesOfW = S::kN / kStep;
  static_assert(S::kM % kStep == 0 && S::kN % kStep == 0);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row = thread / kWords, word = thread % kWords, steps = (k + kColumns - 1) / kColumns;
  int of_x[kCopiesOfX], of_w[kCopiesOfW];  // the rows that this thread copies
  const auto copy_w = [&](int stage, int step) {
    const int at = step * kColumns + word * kOfWord;
#pragma unroll
    for (int i = 0; i < kCopiesOfW; ++i)
      copy_async(&shared.w[stage][row + i * kStep][word * kOfWord],
                 w + static_cast<std::int64_t>(of_w[i]) * k + (at < k ? at : 0), at < k);
  };
  const auto copy_x = [&](int stage, int step) {
    const int at = step * kColumns + word * kOfWord;
#pragma unroll
    for (int i = 0; i < kCopiesOfX; ++i)
      copy_async(&shared.x[stage][row + i * kStep][word * kOfWord],
                 x + static_cast<std::int64_t>(of_x[i]) * k + (at < k ? at : 0), at < k && row + i * kStep < rows);
  };
#pragma unroll
  for (int i = 0; i < kCopiesOfW; ++i) of_w[i] = w_row(row + i * kStep);
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i)
    if (i < steps) copy_w(i, i);
  ready();
#pragma unroll
  for (int i = 0; i < kCopiesOfX; ++i) of_x[i] = x_row(min(row + i * kStep, rows - 1));
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i < steps) copy_x(i, i);
    commit_copies();  // with the first, all of w's
  }
  const int warp_m = S::first_x(warp), warp_n = S::first_w(warp);
  for (int step = 0, index = 0; step < steps; ++step, index = index + 1 == S::kStages ? 0 : index + 1) {
    wait_for_copies<S::kStages - 2>();
    __syncthreads();
    if (const int next = step + S::kStages - 1; next < steps) {
      const int to = index == 0 ? S::kStages - 1 : index - 1;
      copy_w(to, next);
      copy_x(to, next);
    }
    commit_copies();
    constexpr bool kScaled = std::is_same_v<T, e4m3>;
    TileSums<S, T> own;  // of a stage that is scaled
    if constexpr (kScaled) {
#pragma unroll
      for (auto& row_sums : own)
#pragma unroll
        for (auto& four : row_sums)
#pragma unroll
          for (float& sum : four) sum = 0;
    }
    auto& to = kScaled ? own : sums;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      std::uint32_t a[S::kRowTiles][4];
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i)
        load_matrices(a[i], &shared.x[index][warp_m + i * 16 + lane % 16][(part * 2 + lane / 16) * kOfWord]);
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; ++j) {
        std::uint32_t b[4];
        load_matrices(
            b, &shared.w[index][warp_n + j * 16 + lane / 16 * 8 + lane % 8][(part * 2 + lane / 8 % 2) * kOfWord]);
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i) {
          multiply<T>(to[i][2 * j], a[i], b[0], b[1]);
          multiply<T>(to[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
    if constexpr (kScaled) {
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float factor = scale(step, warp_m + i * 16 + half * 8 + lane / 4);
#pragma unroll
          for (int j = 0; j < 2 * S::kColumnTiles; ++j)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) sums[i][j][e] = fmaf(own[i][j][e], factor, sums[i][j][e]);
        }
    }
  }
}

}  // namespace vllmlite::cuda
