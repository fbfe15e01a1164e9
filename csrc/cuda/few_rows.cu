// Decoding's products: few rows of x, so that all the time goes into reading w. A block has 16 rows of w, of which each
// warp reads its share of the columns straight into the fragments of the tensor cores; those of x come out of the
// first-level cache. A step's worth of w is asked for before the kernel that writes x is done.
#include "cuda/linear.hpp"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

constexpr int kWarps = 8, kUnroll = 8;
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
static __global__ __launch_bounds__(kWarps * 32, 2) void few_rows_kernel(const T* __restrict__ x,
                                                                         const T* __restrict__ w,
                                                                         const T* __restrict__ bias,
                                                                         Out* __restrict__ y, int m, int n, int k) {
#if __CUDA_ARCH__ >= 800
  __shared__ float room[kWarps][kTiles * 8][17];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4, quad = lane % 4;
  const int n0 = static_cast<int>(blockIdx.x) * 16;
  const T* low = w + static_cast<std::int64_t>(min(n0 + group, n - 1)) * k;
  const T* high = w + static_cast<std::int64_t>(min(n0 + group + 8, n - 1)) * k;
  uint4 a_low[kUnroll], a_high[kUnroll];
  const uint4 zero = make_uint4(0, 0, 0, 0);
  const auto column = [&](int step, int u) { return ((step * kUnroll + u) * kWarps + warp) * kColumns + quad * 8; };
  const auto load = [&](int step) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = column(step, u);
      a_low[u] = at < k ? load_once(low + at) : zero;
      a_high[u] = at < k ? load_once(high + at) : zero;
    }
  };
  load(0);
  wait_for_previous();
  let_next_begin();
  float sums[kTiles][4] = {};
  const int steps = (k + kUnroll * kWarps * kColumns - 1) / (kUnroll * kWarps * kColumns);
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = column(step, u);
      const std::uint32_t first[] = {a_low[u].x, a_high[u].x, a_low[u].y, a_high[u].y};
      const std::uint32_t second[] = {a_low[u].z, a_high[u].z, a_low[u].w, a_high[u].w};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int row = tile * 8 + group;
        const uint4 b =
            at < k && row < m ? *reinterpret_cast<const uint4*>(x + static_cast<std::int64_t>(row) * k + at) : zero;
        multiply<T>(sums[tile], first, b.x, b.y);
        multiply<T>(sums[tile], second, b.z, b.w);
      }
    }
    if (step + 1 < steps) load(step + 1);
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    room[warp][tile * 8 + quad * 2][group] = sums[tile][0];
    room[warp][tile * 8 + quad * 2 + 1][group] = sums[tile][1];
    room[warp][tile * 8 + quad * 2][group + 8] = sums[tile][2];
    room[warp][tile * 8 + quad * 2 + 1][group + 8] = sums[tile][3];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTiles * 8 * 16; i += kWarps * 32) {
    const int row = i / 16, column_of_y = i % 16;
    if (row >= m || n0 + column_of_y >= n) continue;
    float sum = bias == nullptr ? 0 : wide(bias[n0 + column_of_y]);
#pragma unroll
    for (int part = 0; part < kWarps; ++part) sum += room[part][row][column_of_y];
    y[static_cast<std::int64_t>(row) * n + n0 + column_of_y] = narrow<Out>(sum);
  }
#endif
}

bool takes_few_rows(const Runtime& runtime, const Product& product) {
  return runtime.capability() >= 80 && product.m <= kMostRows && product.k % 8 == 0 && aligned(product.x, 16) &&
         aligned(product.w, 16);
}

template <typename T, typename Out>
static void run(const Runtime& runtime, const Product& product) {
  launch(runtime, product.m <= 8 ? few_rows_kernel<T, Out, 1> : few_rows_kernel<T, Out, 2>, blocks_for(product.n, 16),
         kWarps * 32, 0, static_cast<const T*>(product.x), static_cast<const T*>(product.w),
         static_cast<const T*>(product.bias), static_cast<Out*>(product.y), product.m, product.n, product.k);
}

void multiply_few_rows(const Runtime& runtime, const Product& product) {
  const bool wide_out = product.out_dtype == DType::float32;
  if (product.dtype == DType::float16)
    wide_out ? run<f16, float>(runtime, product) : run<f16, f16>(runtime, product);
  else
    wide_out ? run<bf16, float>(runtime, product) : run<bf16, bf16>(runtime, product);
}

}  // namespace vllmlite::cuda
