// The products of a mixture's experts whose weights are 8-bit elements, and activations quantised to such.
//
// Grid: (groups of pairs, tiles of w). Block, shared memory and what a thread holds: see tile_product.cuh.
#include "cuda/byte_tile.cuh"
#include "cuda/experts.cuh"

namespace vllmlite::cuda {

template <typename In, typename T, typename S, bool kBlocks>
static __global__ __launch_bounds__(S::kThreads) void byte_experts_kernel(const __grid_constant__ ExpertProduct given) {
  extern __shared__ __align__(16) char shared[];
  let_next_begin();
  wait_for_previous();
  const Group group = given.mixture.groups[blockIdx.x];
  if (group.expert < 0) return;
  ByteScales scales = given.x_scales;
  scales.w = static_cast<const float*>(given.w_scales[group.expert]);
  if constexpr (std::is_same_v<In, std::int8_t>)
    scales.w_zeros = static_cast<const ByteZero*>(given.w_zeros[group.expert]);
  multiply_byte_tile<S, kBlocks>(
      *reinterpret_cast<TileShared<In, S>*>(shared), static_cast<const In*>(given.x),
      static_cast<const In*>(given.w[group.expert]), static_cast<const T*>(nullptr), static_cast<T*>(given.y),
      group.count, static_cast<int>(blockIdx.y) * S::kN, given.n, given.k, given.n, scales,
      [&](int i) { return row_of_x(given, group.first + i); }, [&](int i) { return row_of_y(given, group.first + i); },
      [] {});
}

template <typename In, typename T, bool kBlocks>
static void run(const Runtime& runtime, const ExpertProduct& product) {
  with_tile<In>(runtime, product.mixture.rows_of_group, [&](auto shape) {
    using S = decltype(shape);
    launch(runtime, byte_experts_kernel<In, T, S, kBlocks>,
           dim3(static_cast<unsigned>(product.mixture.num_groups), blocks_for(product.n, S::kN)), S::kThreads,
           sizeof(TileShared<In, S>), product);
  });
}

int pairs_of_byte_group(const Runtime& runtime, std::int64_t pairs_of_expert) {
  int pairs = 0;
  with_tile<e4m3>(runtime, static_cast<int>(pairs_of_expert), [&](auto shape) { pairs = decltype(shape)::kM; });
  return pairs;
}

void multiply_byte_experts(const Runtime& runtime, const ExpertProduct& product, const ByteInputs& inputs) {
  const auto go = [&](auto* type) {
    using T = Pointee<decltype(type)>;
    if (inputs.integers)
      run<std::int8_t, T, false>(runtime, product);
    else
      inputs.blocks ? run<e4m3, T, true>(runtime, product) : run<e4m3, T, false>(runtime, product);
  };
  runtime.dtype() == DType::float16 ? go(static_cast<f16*>(nullptr)) : go(static_cast<bf16*>(nullptr));
}

}  // namespace vllmlite::cuda
