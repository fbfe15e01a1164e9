// Batch-invariant 16-bit products: outputs are summed up in one order however many rows x has. The size of tiles
// depends on the rows, but no sum depends on that.
//
// Grid: (tiles of w, tiles of x). Block, shared memory and what a thread holds: see tile_product.cuh.
#include "cuda/linear.hpp"
#include "cuda/tile_product.cuh"

namespace vllmlite::cuda {

template <typename T, typename Out, typename S>
static __global__ __launch_bounds__(S::kThreads) void batch_invariant_kernel(const T* x, const T* w, const T* bias,
                                                                             Out* y, int m, int n, int k) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  const int m0 = static_cast<int>(blockIdx.y) * S::kM, n0 = static_cast<int>(blockIdx.x) * S::kN;
  let_next_begin();
  TileSums<S> sums{};
  multiply_tile<S>(
      *reinterpret_cast<TileShared<T, S>*>(shared), x, w, k, min(m - m0, S::kM), [&](int i) { return m0 + i; },
      [&](int i) { return min(n0 + i, n - 1); }, [] { wait_for_previous(); }, sums);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4, quad = lane % 4;
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < 2 * S::kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = m0 + S::first_x(warp) + i * 16 + e / 2 * 8 + group,
                  column = n0 + S::first_w(warp) + j * 8 + quad * 2 + e % 2;
        if (row < m && column < n)
          y[static_cast<std::int64_t>(row) * n + column] =
              from_float<Out>(bias == nullptr ? sums[i][j][e] : sums[i][j][e] + to_float(bias[column]));
      }
#endif
}

template <typename T, typename Out, typename S>
static void run(const Runtime& runtime, const Product& product) {
  const auto kernel = batch_invariant_kernel<T, Out, S>;
  launch(runtime, kernel, dim3(blocks_for(product.n, S::kN), blocks_for(product.m, S::kM)), S::kThreads,
         sizeof(TileShared<T, S>), static_cast<const T*>(product.x), static_cast<const T*>(product.w),
         static_cast<const T*>(product.bias), static_cast<Out*>(product.y), product.m, product.n, product.k);
}

template <typename T, typename Out>
static void run_sized(const Runtime& runtime, const Product& product) {
  if (product.m <= SmallTile::kM)
    run<T, Out, SmallTile>(runtime, product);
  else if (product.m <= MiddleTile::kM)
    run<T, Out, MiddleTile>(runtime, product);
  else
    run<T, Out, LargeTile>(runtime, product);
}

void multiply_batch_invariant(const Runtime& runtime, const Product& product) {
  const bool takes =
      runtime.capability() >= 80 && product.k % 8 == 0 && aligned(product.x, 16) && aligned(product.w, 16);
  if (!takes || product.dtype == DType::float32)
    multiply_by_dot_products(runtime, product);
  else
    with_results(product.dtype, product.out_dtype, [&](auto* type, auto* out) {
      run_sized<Pointee<decltype(type)>, Pointee<decltype(out)>>(runtime, product);
    });
}

}  // namespace vllmlite::cuda
