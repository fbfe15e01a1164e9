// Decoding's products: few rows of x, so that all the time goes into reading w. A block goes over tiles of 16 rows of
// w, of which each warp reads its share of the columns straight into the fragments of the tensor cores; those of x come
// out of the first-level cache. What is multiplied is replaced at once by what comes next, so that reading never
// pauses, and it begins before the kernel that writes x is done.
#include <algorithm>

#include "cuda/linear.hpp"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

constexpr int kWarps = 4, kUnroll = 8, kBlocksPerProcessor = 4;
constexpr int kRows = 16;     // of w in a tile
constexpr int kColumns = 32;  // of w that a warp multiplies at a time: 8 by each lane of a quad
constexpr int kMostRows = 16;

__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

template <typename T, typename Out, int kTiles>
static __global__ __launch_bounds__(kWarps * 32, kBlocksPerProcessor) void few_rows_kernel(const T* x, const T* w,
                                                                                           const T* bias, Out* y, int m,
                                                                                           int n, int k) {
#if __CUDA_ARCH__ >= 800
  __shared__ float room[2][kWarps][kTiles * 8][kRows + 1];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4, quad = lane % 4;
  const int tiles = (n + kRows - 1) / kRows,
            steps = (k + kUnroll * kWarps * kColumns - 1) / (kUnroll * kWarps * kColumns);
  const uint4 zero = make_uint4(0, 0, 0, 0);
  const auto column = [&](int step, int u) { return ((step * kUnroll + u) * kWarps + warp) * kColumns + quad * 8; };

  int tile = static_cast<int>(blockIdx.x), step = 0;
  uint4 a_low[kUnroll], a_high[kUnroll];
  const T *low = nullptr, *high = nullptr;
  const auto enter = [&](int which) {
    low = w + static_cast<std::int64_t>(min(which * kRows + group, n - 1)) * k;
    high = w + static_cast<std::int64_t>(min(which * kRows + group + 8, n - 1)) * k;
  };
  const auto load = [&](int of_step, int u) {
    const int at = column(of_step, u);
    a_low[u] = at < k ? load_once(low + at) : zero;
    a_high[u] = at < k ? load_once(high + at) : zero;
  };
  enter(tile);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) load(0, u);
  wait_for_previous();
  let_next_begin();

  float sums[kTiles][4] = {};
  for (int buffer = 0;;) {
    const bool ends = step + 1 == steps;
    const int next_tile = ends ? tile + static_cast<int>(gridDim.x) : tile, next_step = ends ? 0 : step + 1;
    const bool more = next_tile < tiles;
    if (ends && more) enter(next_tile);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = column(step, u);
      const std::uint32_t first[] = {a_low[u].x, a_high[u].x, a_low[u].y, a_high[u].y};
      const std::uint32_t second[] = {a_low[u].z, a_high[u].z, a_low[u].w, a_high[u].w};
#pragma unroll
      for (int part = 0; part < kTiles; ++part) {
        const int row = part * 8 + group;
        const uint4 b =
            at < k && row < m ? *reinterpret_cast<const uint4*>(x + static_cast<std::int64_t>(row) * k + at) : zero;
        multiply<T>(sums[part], first, b.x, b.y);
        multiply<T>(sums[part], second, b.z, b.w);
      }
      if (more) load(next_step, u);
    }
    if (ends) {
      auto& own = room[buffer][warp];
#pragma unroll
      for (int part = 0; part < kTiles; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          own[part * 8 + quad * 2 + i % 2][group + i / 2 * 8] = sums[part][i];
          sums[part][i] = 0;
        }
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kTiles * 8 * kRows; i += kWarps * 32) {
        const int row = i / kRows, place = i % kRows, at = tile * kRows + place;
        if (row >= m || at >= n) continue;
        float sum = bias == nullptr ? 0 : wide(bias[at]);
#pragma unroll
        for (int part = 0; part < kWarps; ++part) sum += room[buffer][part][row][place];
        y[static_cast<std::int64_t>(row) * n + at] = narrow<Out>(sum);
      }
      buffer ^= 1;
    }
    if (!more) return;
    tile = next_tile;
    step = next_step;
  }
#endif
}

bool takes_few_rows(const Runtime& runtime, const Product& product) {
  return runtime.capability() >= 80 && product.m <= kMostRows && product.k % 8 == 0 && aligned(product.x, 16) &&
         aligned(product.w, 16);
}

template <typename T, typename Out>
static void run(const Runtime& runtime, const Product& product) {
  const unsigned blocks =
      std::min(blocks_for(product.n, kRows), static_cast<unsigned>(runtime.multiprocessors() * kBlocksPerProcessor));
  launch(runtime, product.m <= 8 ? few_rows_kernel<T, Out, 1> : few_rows_kernel<T, Out, 2>, blocks, kWarps * 32, 0,
         static_cast<const T*>(product.x), static_cast<const T*>(product.w), static_cast<const T*>(product.bias),
         static_cast<Out*>(product.y), product.m, product.n, product.k);
}

void multiply_few_rows(const Runtime& runtime, const Product& product) {
  const bool wide_out = product.out_dtype == DType::float32;
  if (product.dtype == DType::float16)
    wide_out ? run<f16, float>(runtime, product) : run<f16, f16>(runtime, product);
  else
    wide_out ? run<bf16, float>(runtime, product) : run<bf16, bf16>(runtime, product);
}

}  // namespace vllmlite::cuda
