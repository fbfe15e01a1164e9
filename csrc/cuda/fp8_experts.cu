// The products of a mixture's experts whose weights are 8-bit floats, and activations quantised to such.
//
// Grid: (groups of pairs, tiles of w). Block, shared memory and what a thread holds: see tile_product.cuh.
#include "cuda/experts.cuh"
#include "cuda/fp8_tile.cuh"

namespace vllmlite::cuda {

template <typename T, typename S, bool kBlocks>
static __global__ __launch_bounds__(S::kThreads) void fp8_experts_kernel(const __grid_constant__ ExpertProduct given) {
#if __CUDA_ARCH__ >= 890
  extern __shared__ __align__(16) char shared[];
  let_next_begin();
  wait_for_previous();
  const Group group = given.mixture.groups[blockIdx.x];
  if (group.expert < 0) return;
  multiply_fp8_tile<S, kBlocks, T>(
      *reinterpret_cast<TileShared<e4m3, S>*>(shared), static_cast<const e4m3*>(given.x),
      static_cast<const e4m3*>(given.w[group.expert]), nullptr, static_cast<T*>(given.y), group.count,
      static_cast<int>(blockIdx.y) * S::kN, given.n, given.k, given.n, given.x_scales.x, given.x_scales.stride,
      static_cast<const float*>(given.w_scales[group.expert]), [&](int i) { return row_of_x(given, group.first + i); },
      [&](int i) { return row_of_y(given, group.first + i); }, [] {});
#endif
}

template <typename T, bool kBlocks>
static void run_sized(const Runtime& runtime, const ExpertProduct& product) {
  const auto go = [&](auto shape) {
    using S = decltype(shape);
    launch(runtime, fp8_experts_kernel<T, S, kBlocks>,
           dim3(static_cast<unsigned>(product.mixture.num_groups), blocks_for(product.n, S::kN)), S::kThreads,
           sizeof(TileShared<e4m3, S>), product);
  };
  if (product.mixture.rows_of_group == SmallTile::kM)
    go(SmallTile());
  else if (product.mixture.rows_of_group == MiddleTile::kM)
    go(MiddleTile());
  else
    go(LargeTile());
}

void multiply_fp8_experts(const Runtime& runtime, const ExpertProduct& product, bool blocks) {
  const auto go = [&](auto* type) {
    using T = Pointee<decltype(type)>;
    blocks ? run_sized<T, true>(runtime, product) : run_sized<T, false>(runtime, product);
  };
  runtime.dtype() == DType::float16 ? go(static_cast<f16*>(nullptr)) : go(static_cast<bf16*>(nullptr));
}

}  // namespace vllmlite::cuda
