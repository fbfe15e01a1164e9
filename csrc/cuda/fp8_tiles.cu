// Products of 8-bit floats by tiles: on chips without wgmma, for float32 results, and batch-invariant, since outputs
// are summed up in one order however many rows x has.
//
// Grid: (tiles of w, tiles of x). Block, shared memory and what a thread holds: see tile_product.cuh.
#include "cuda/fp8_tile.cuh"

namespace vllmlite::cuda {

template <typename T, typename Out, typename S, bool kBlocks>
static __global__ __launch_bounds__(S::kThreads) void fp8_tile_kernel(const e4m3* x, const e4m3* w, const T* bias,
                                                                      Out* y, int m, int n, int k, int stride,
                                                                      Fp8Scales scales) {
#if __CUDA_ARCH__ >= 890
  extern __shared__ __align__(16) char shared[];
  const int m0 = static_cast<int>(blockIdx.y) * S::kM, n0 = static_cast<int>(blockIdx.x) * S::kN;
  const auto row = [&](int i) { return m0 + i; };
  let_next_begin();
  multiply_fp8_tile<S, kBlocks>(*reinterpret_cast<TileShared<e4m3, S>*>(shared), x, w, bias, y, min(m - m0, S::kM), n0,
                                n, k, stride, scales.x, scales.stride, scales.w, row, row, [] { wait_for_previous(); });
#endif
}

template <typename T, typename Out, typename S, bool kBlocks>
static void run(const Runtime& runtime, const Fp8Product& product) {
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
