// 16-bit products whose outputs are summed up in one order however many rows x has: the columns one after another, 16
// at a time, in one tensor-core accumulator. Only the size of tiles depends on the rows, and no sum does on that.
#include "cuda/linear.hpp"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

constexpr int kColumns = 64;  // of x and w in a stage

// A block has kM rows of x and kN of w; of its kWarpsM x kWarpsN warps each has a part of the tile.
template <int kTileM, int kTileN, int kOfM, int kOfN, int kDeep>
struct Shape {
  static constexpr int kM = kTileM, kN = kTileN, kWarpsM = kOfM, kWarpsN = kOfN, kStages = kDeep;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;
  static constexpr int kRowTiles = kM / kWarpsM / 16, kColumnTiles = kN / kWarpsN / 16;  // of 16, a warp's
};

// Rows are padded by one access, so that eight of them lie in different banks.
template <typename T, typename S>
struct Room {
  static constexpr int kStride = kColumns + 8;
  T x[S::kStages][S::kM][kStride];
  T w[S::kStages][S::kN][kStride];
};

template <typename T, typename Out, typename S>
static __global__ __launch_bounds__(S::kThreads) void fixed_order_kernel(const T* x, const T* w, const T* bias, Out* y,
                                                                         int m, int n, int k) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  auto& room = *reinterpret_cast<Room<T, S>*>(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int m0 = static_cast<int>(blockIdx.y) * S::kM, n0 = static_cast<int>(blockIdx.x) * S::kN;
  const int steps = (k + kColumns - 1) / kColumns;
  const auto copy = [&](auto& to, const T* from, int first, int limit, int step) {
    constexpr int kWords = kColumns / 8;
    for (int i = thread; i < static_cast<int>(std::extent_v<std::remove_reference_t<decltype(to)>>) * kWords;
         i += S::kThreads) {
      const int row = i / kWords, at = step * kColumns + i % kWords * 8;
      const bool there = first + row < limit && at < k;
      copy_async(&to[row][i % kWords * 8], there ? from + static_cast<std::int64_t>(first + row) * k + at : from,
                 there);
    }
  };
  let_next_begin();
  // Weights are there already.
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i)
    if (i < steps) copy(room.w[i], w, n0, n, i);
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i < steps) copy(room.x[i], x, m0, m, i);
    commit_copies();  // with the first, all of w's
  }
  const int warp_m = warp % S::kWarpsM * S::kRowTiles * 16, warp_n = warp / S::kWarpsM * S::kColumnTiles * 16;
  float sums[S::kRowTiles][2 * S::kColumnTiles][4] = {};
  for (int step = 0, index = 0; step < steps; ++step, index = index + 1 == S::kStages ? 0 : index + 1) {
    wait_for_copies<S::kStages - 2>();
    __syncthreads();
    if (const int next = step + S::kStages - 1; next < steps) {
      const int to = index == 0 ? S::kStages - 1 : index - 1;
      copy(room.w[to], w, n0, n, next);
      copy(room.x[to], x, m0, m, next);
    }
    commit_copies();
#pragma unroll
    for (int part = 0; part < kColumns / 16; ++part) {
      std::uint32_t a[S::kRowTiles][4];
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i)
        load_matrices(a[i], &room.x[index][warp_m + i * 16 + lane % 16][part * 16 + lane / 16 * 8]);
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; ++j) {
        std::uint32_t b[4];
        load_matrices(b, &room.w[index][warp_n + j * 16 + lane / 16 * 8 + lane % 8][part * 16 + lane / 8 % 2 * 8]);
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i) {
          multiply<T>(sums[i][2 * j], a[i], b[0], b[1]);
          multiply<T>(sums[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
  const int group = lane / 4, quad = lane % 4;
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < 2 * S::kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = m0 + warp_m + i * 16 + e / 2 * 8 + group, column = n0 + warp_n + j * 8 + quad * 2 + e % 2;
        if (row < m && column < n)
          y[static_cast<std::int64_t>(row) * n + column] =
              narrow<Out>(bias == nullptr ? sums[i][j][e] : sums[i][j][e] + wide(bias[column]));
      }
#endif
}

template <typename T, typename Out, typename S>
static void run(const Runtime& runtime, const Product& product) {
  const auto kernel = fixed_order_kernel<T, Out, S>;
  VLLMLITE_CUDA_CHECK(cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                      static_cast<int>(sizeof(Room<T, S>)));
  launch(runtime, kernel, dim3(blocks_for(product.n, S::kN), blocks_for(product.m, S::kM)), S::kThreads,
         sizeof(Room<T, S>), static_cast<const T*>(product.x), static_cast<const T*>(product.w),
         static_cast<const T*>(product.bias), static_cast<Out*>(product.y), product.m, product.n, product.k);
}

template <typename T, typename Out>
static void run_sized(const Runtime& runtime, const Product& product) {
  if (product.m <= 16)
    run<T, Out, Shape<16, 32, 1, 2, 6>>(runtime, product);
  else if (product.m <= 64)
    run<T, Out, Shape<64, 64, 2, 2, 4>>(runtime, product);
  else
    run<T, Out, Shape<128, 128, 2, 4, 2>>(runtime, product);
}

void multiply_in_fixed_order(const Runtime& runtime, const Product& product) {
  const bool takes =
      runtime.capability() >= 80 && product.k % 8 == 0 && aligned(product.x, 16) && aligned(product.w, 16);
  const bool wide_out = product.out_dtype == DType::float32;
  if (!takes || product.dtype == DType::float32)
    multiply_in_order(runtime, product);
  else if (product.dtype == DType::float16)
    wide_out ? run_sized<f16, float>(runtime, product) : run_sized<f16, f16>(runtime, product);
  else
    wide_out ? run_sized<bf16, float>(runtime, product) : run_sized<bf16, bf16>(runtime, product);
}

}  // namespace vllmlite::cuda
