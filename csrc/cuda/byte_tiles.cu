// Products of 8-bit elements by tiles: on chips without wgmma, for float32 results, of integers, and batch-invariant,
// since outputs are summed up in one order however many rows x has.
//
// Grid: (tiles of w, tiles of x). Block, shared memory and what a thread holds: see tile_product.cuh.
#include "cuda/byte_tile.cuh"

namespace vllmlite::cuda {

template <typename In, typename T, typename Out, typename S, bool kBlocks>
static __global__ __launch_bounds__(S::kThreads) void byte_tile_kernel(const In* x, const In* w, const T* bias, Out* y,
                                                                       int m, int n, int k, int stride,
                                                                       const __grid_constant__ ByteScales scales) {
  extern __shared__ __align__(16) char shared[];
  const int m0 = static_cast<int>(blockIdx.y) * S::kM, n0 = static_cast<int>(blockIdx.x) * S::kN;
  const auto row = [&](int i) { return m0 + i; };
  let_next_begin();
  multiply_byte_tile<S, kBlocks>(*reinterpret_cast<TileShared<In, S>*>(shared), x, w, bias, y, min(m - m0, S::kM), n0,
                                 n, k, stride, scales, row, row, [] { wait_for_previous(); });
}

template <typename In, typename T, typename Out, bool kBlocks>
static void run(const Runtime& runtime, const ByteProduct& product) {
  with_tile<In>(runtime, product.m, [&](auto shape) {
    using S = decltype(shape);
    launch(runtime, byte_tile_kernel<In, T, Out, S, kBlocks>,
           dim3(blocks_for(product.n, S::kN), blocks_for(product.m, S::kM)), S::kThreads, sizeof(TileShared<In, S>),
           static_cast<const In*>(product.x), static_cast<const In*>(product.w), static_cast<const T*>(product.bias),
           static_cast<Out*>(product.y), product.m, product.n, product.k, product.stride, product.scales);
  });
}

void multiply_byte_tiles(const Runtime& runtime, const ByteProduct& product) {
  with_results(product.dtype, product.out_dtype, [&](auto* type, auto* out) {
    using T = Pointee<decltype(type)>;
    using Out = Pointee<decltype(out)>;
    if (product.integers)
      run<std::int8_t, T, Out, false>(runtime, product);
    else
      product.blocks ? run<e4m3, T, Out, true>(runtime, product) : run<e4m3, T, Out, false>(runtime, product);
  });
}

}  // namespace vllmlite::cuda
