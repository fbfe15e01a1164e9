// The products of a mixture of experts. A thread block computes some outputs of one expert for a group of (token,
// expert) pairs. Only the chosen experts are read, and the order of additions does not depend on how pairs are grouped.
#include "cuda/activation.cuh"
#include "cuda/experts.cuh"
#include "cuda/tile_product.cuh"

namespace vllmlite::cuda {

// ---- On tensor cores

// Multiplies a group's rows of x with a tile of its expert's rows of w. Grid: (groups of pairs, tiles of rows of w).
// With a gate, each 16 rows of w in a tile are 8 rows of the gate and the 8 rows of the up projection for the same
// outputs, so that one thread has both sums of an output.
template <typename T, typename S, bool kGated>
static __global__ __launch_bounds__(S::kThreads) void tile_kernel(const __grid_constant__ ExpertProduct given) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  let_next_begin();
  wait_for_previous();
  const Group group = given.mixture.groups[blockIdx.x];
  if (group.expert < 0) return;
  constexpr int kOfTile = kGated ? S::kN / 2 : S::kN;
  const int n0 = static_cast<int>(blockIdx.y) * kOfTile, n = given.n;
  const auto w_row = [&](int i) {
    if constexpr (kGated) {
      const int column = min(n0 + i / 16 * 8 + i % 8, n - 1);
      return i % 16 < 8 ? column : n + column;
    } else {
      return min(n0 + i, n - 1);
    }
  };
  TileSums<S> sums{};
  multiply_tile<S>(
      *reinterpret_cast<TileShared<T, S>*>(shared), static_cast<const T*>(given.x),
      static_cast<const T*>(given.w[group.expert]), given.k, group.count,
      [&](int i) { return row_of_x(given, group.first + i); }, w_row, [] {}, sums);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = S::first_x(warp) + i * 16 + half * 8 + lane / 4;
      if (row >= group.count) continue;
      T* y = static_cast<T*>(given.y) + static_cast<std::int64_t>(row_of_y(given, group.first + row)) * n;
#pragma unroll
      for (int j = 0; j < (kGated ? 1 : 2) * S::kColumnTiles; ++j) {
        const int column = n0 + S::first_w(warp) / (kGated ? 2 : 1) + j * 8 + lane % 4 * 2;
        if (column >= n) continue;
        float values[2];
#pragma unroll
        for (int e = 0; e < 2; ++e)
          values[e] = kGated
                          ? activated(sums[i][2 * j][half * 2 + e], given.activation) * sums[i][2 * j + 1][half * 2 + e]
                          : sums[i][j][half * 2 + e];
        *reinterpret_cast<std::uint32_t*>(y + column) = pair<T>(values[0], values[1]);
      }
    }
#endif
}

template <typename T, typename S, bool kGated>
static void run_tiles(const Runtime& runtime, const ExpertProduct& product) {
  const auto kernel = tile_kernel<T, S, kGated>;
  const dim3 grid(static_cast<unsigned>(product.mixture.num_groups), blocks_for(product.n, kGated ? S::kN / 2 : S::kN));
  launch(runtime, kernel, grid, S::kThreads, sizeof(TileShared<T, S>), product);
}

// ---- Dot products: for float32, and for shapes that the tensor-core kernel does not support
// Grid: (groups of pairs, blocks of rows of w). Block: 8 warps. Each warp has 4 rows of w (with a gate: 2 of the gate
// and 2 of the up projection) and the group's kRowsOfX rows of x; its lanes divide the columns and add their sums at
// the end.

constexpr int kWarps = 8, kRows = 4, kRowsOfX = 8;

template <typename T, int kSize, bool kGated>
static __global__ void dot_product_kernel(const __grid_constant__ ExpertProduct given) {
  using P = Pack<T, kSize>;
  constexpr int kOut = kGated ? kRows / 2 : kRows;
  let_next_begin();
  wait_for_previous();
  const Group group = given.mixture.groups[blockIdx.x];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int n = given.n, k = given.k, n0 = (static_cast<int>(blockIdx.y) * kWarps + warp) * kOut;
  if (group.expert < 0 || n0 >= n) return;
  const T* w = static_cast<const T*>(given.w[group.expert]);
  const T *rows[kRows], *columns[kRowsOfX];
#pragma unroll
  for (int i = 0; i < kRows; ++i) rows[i] = w + static_cast<std::int64_t>(min(n0 + i % kOut, n - 1) + i / kOut * n) * k;
#pragma unroll
  for (int j = 0; j < kRowsOfX; ++j)
    columns[j] = static_cast<const T*>(given.x) +
                 static_cast<std::int64_t>(row_of_x(given, group.first + min(j, group.count - 1))) * k;
  float sums[kRows][kRowsOfX] = {};
  for (int at = lane * kSize; at < k; at += 32 * kSize) {
    P a[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) a[i] = *reinterpret_cast<const P*>(rows[i] + at);
#pragma unroll
    for (int j = 0; j < kRowsOfX; ++j) {
      if (j >= group.count) break;
      const P b = *reinterpret_cast<const P*>(columns[j] + at);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[i][j] = fmaf(to_float(a[i].at[e]), to_float(b.at[e]), sums[i][j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kRowsOfX; ++j) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) sums[i][j] = warp_sum(sums[i][j]);
    if (lane != 0 || j >= group.count) continue;
    T* y = static_cast<T*>(given.y) + static_cast<std::int64_t>(row_of_y(given, group.first + j)) * n;
#pragma unroll
    for (int i = 0; i < kOut; ++i)
      if (n0 + i < n)
        y[n0 + i] =
            from_float<T>(kGated ? activated(sums[i][j], given.activation) * sums[kRows / 2 + i][j] : sums[i][j]);
  }
}

template <typename T, bool kGated>
static void run_dot_products(const Runtime& runtime, const ExpertProduct& product) {
  const dim3 grid(static_cast<unsigned>(product.mixture.num_groups),
                  blocks_for(product.n, kWarps * (kGated ? kRows / 2 : kRows)));
  const auto kernel =
      product.k % kPack<T> == 0 ? dot_product_kernel<T, kPack<T>, kGated> : dot_product_kernel<T, 1, kGated>;
  launch(runtime, kernel, grid, kWarps * 32, 0, product);
}

// ---- Choice of the kernel

int rows_of_group(const Runtime& runtime, const Experts& experts, std::int64_t pairs) {
  const std::int64_t each = pairs / experts.count;
  if (std::holds_alternative<GroupedRows>(experts.gate_up.first)) return pairs_of_group(runtime, each);
  if (std::holds_alternative<ByteRows>(experts.gate_up.first)) return pairs_of_byte_group(runtime, each);
  const bool tiles = runtime.capability() >= 80 && experts.dtype != DType::float32 && experts.hidden % 8 == 0 &&
                     experts.inner % 8 == 0;
  if (!tiles) return kRowsOfX;
  return each <= SmallTile::kM ? SmallTile::kM : each <= MiddleTile::kM ? MiddleTile::kM : LargeTile::kM;
}

template <bool kGated>
static void run(const Runtime& runtime, const ExpertProduct& product, DType dtype) {
  with_float(dtype, [&](auto* pointer) {
    using T = Pointee<decltype(pointer)>;
    if constexpr (!std::is_same_v<T, float>) {
      if (product.mixture.rows_of_group == SmallTile::kM) return run_tiles<T, SmallTile, kGated>(runtime, product);
      if (product.mixture.rows_of_group == MiddleTile::kM) return run_tiles<T, MiddleTile, kGated>(runtime, product);
      if (product.mixture.rows_of_group == LargeTile::kM) return run_tiles<T, LargeTile, kGated>(runtime, product);
    }
    run_dot_products<T, kGated>(runtime, product);
  });
}

void multiply_gated(const Runtime& runtime, const ExpertProduct& product, DType dtype) {
  run<true>(runtime, product, dtype);
}

void multiply_experts(const Runtime& runtime, const ExpertProduct& product, DType dtype) {
  run<false>(runtime, product, dtype);
}

}  // namespace vllmlite::cuda
