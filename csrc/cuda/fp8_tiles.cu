// Products of 8-bit floats by tiles: on chips without wgmma, for float32 results, and batch-invariant, since outputs
// are summed up in one order however many rows x has.
//
// Grid: (tiles of w, tiles of x). Block, shared memory and what a thread holds: see tile_product.cuh.
#include "cuda/fp8.hpp"
#include "cuda/tile_product.cuh"

namespace vllmlite::cuda {

template <typename T, typename Out, typename S, bool kBlocks>
static __global__ __launch_bounds__(S::kThreads) void fp8_tile_kernel(const e4m3* x, const e4m3* w, const T* bias,
                                                                      Out* y, int m, int n, int k, int stride,
                                                                      Fp8Scales scales) {
#if __CUDA_ARCH__ >= 890
  extern __shared__ __align__(16) char shared[];
  const int m0 = static_cast<int>(blockIdx.y) * S::kM, n0 = static_cast<int>(blockIdx.x) * S::kN;
  const int blocks = (k + kFp8Block - 1) / kFp8Block;
  let_next_begin();
  TileSums<S> sums{};
  multiply_tile<S>(
      *reinterpret_cast<TileShared<e4m3, S>*>(shared), x, w, k, min(m - m0, S::kM), [&](int i) { return m0 + i; },
      [&](int i) { return min(n0 + i, n - 1); }, [] { wait_for_previous(); }, sums,
      [&](int block, int row) -> float {
        if constexpr (!kBlocks) return 1;
        return scales.x[static_cast<std::int64_t>(block) * scales.stride + min(m0 + row, m - 1)] *
               scales.w[n0 / kFp8Block * blocks + block];
      });
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m0 + S::first_x(warp) + i * 16 + half * 8 + lane / 4;
      if (row >= m) continue;
      const float of_row = kBlocks ? 1 : scales.x[row];
#pragma unroll
      for (int j = 0; j < 2 * S::kColumnTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = n0 + S::first_w(warp) + j * 8 + lane % 4 * 2 + e;
          if (column >= n) continue;
          const float factor = kBlocks ? 1 : of_row * scales.w[column];
          y[static_cast<std::int64_t>(row) * stride + column] =
              from_float<Out>(fmaf(sums[i][j][half * 2 + e], factor, bias == nullptr ? 0 : to_float(bias[column])));
        }
    }
#endif
}

template <typename T, typename Out, typename S, bool kBlocks>
static void run(const Runtime& runtime, const Fp8Product& product) {
  static_assert(kFp8Block % S::kN == 0);
  launch(runtime, fp8_tile_kernel<T, Out, S, kBlocks>, dim3(blocks_for(product.n, S::kN), blocks_for(product.m, S::kM)),
         S::kThreads, sizeof(TileShared<e4m3, S>), static_cast<const e4m3*>(product.x),
         static_cast<const e4m3*>(product.w), static_cast<const T*>(product.bias), static_cast<Out*>(product.y),
         product.m, product.n, product.k, product.stride, product.scales);
}

template <typename T, typename Out, bool kBlocks>
static void run_sized(const Runtime& runtime, const Fp8Product& product) {
  if (product.m <= SmallTile::kM)
    run<T, Out, SmallTile, kBlocks>(runtime, product);
  else if (product.m <= MiddleTile::kM)
    run<T, Out, MiddleTile, kBlocks>(runtime, product);
  else
    run<T, Out, LargeTile, kBlocks>(runtime, product);
}

void multiply_fp8_tiles(const Runtime& runtime, const Fp8Product& product) {
  with_results(product.dtype, product.out_dtype, [&](auto* type, auto* out) {
    using T = Pointee<decltype(type)>;
    using Out = Pointee<decltype(out)>;
    product.blocks ? run_sized<T, Out, true>(runtime, product) : run_sized<T, Out, false>(runtime, product);
  });
}

}  // namespace vllmlite::cuda
