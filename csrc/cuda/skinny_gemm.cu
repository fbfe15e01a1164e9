// Skinny products: at most 8 rows of x, as in decoding, so that all the time goes into reading w.
//
// Grid: at most two blocks a multiprocessor, which go over tiles of kRows rows of w (16, or 8 where that keeps more
// multiprocessors busy). Block: 8 warps, which share the columns of a tile: warp i has stages i, i + 8, ... of 64
// columns. Shared memory: for each warp a ring of kStages stages of its own, filled ahead by asynchronous copies,
// across tiles, and from before the kernel that writes x is done; and the warps' sums of a tile, twice, for them to be
// added. Rows of w are those of the tensor cores' first operand, rows of x the columns of the second, which each thread
// reads through the first-level cache: a thread holds the sums of rows lane / 4 and lane / 4 + 8 of w, and of rows 2
// (lane % 4) and the next of x.
#include <algorithm>

#include "cuda/linear.hpp"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

constexpr int kWarps = 8, kBlocksPerProcessor = 2;
constexpr int kStages = 4;             // few enough for a block of the next product to get in beside
constexpr int kColumns = 64;           // of w in a stage
constexpr int kChunks = kColumns / 8;  // of 16 bytes in a row of a stage
constexpr int kMostRows = 8;

// In rows of odd number the two halves are exchanged, so that neighbouring rows lie in different banks.
template <int kRows>
struct SkinnyShared {
  uint4 stages[kWarps][kStages][kRows][kChunks];
  float sums[2][kWarps][kMostRows][kRows + 1];
};

template <typename T, typename Out, int kRows>
static __global__ __launch_bounds__(kWarps * 32, kBlocksPerProcessor) void skinny_gemm_kernel(const T* x, const T* w,
                                                                                              const T* bias, Out* y,
                                                                                              int m, int n, int k) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char storage[];
  auto& shared = *reinterpret_cast<SkinnyShared<kRows>*>(storage);
  constexpr int kAhead = 4;  // stages for which x is loaded at a time
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4, quad = lane % 4;
  const int tiles = (n + kRows - 1) / kRows, stages = (k + kColumns - 1) / kColumns;
  const int own = (stages - warp + kWarps - 1) / kWarps;  // stages of a tile that are this warp's
  const auto first_column = [&](int i) { return (i * kWarps + warp) * kColumns; };

  int fetched_tile = static_cast<int>(blockIdx.x), fetched = 0;
  const auto fetch = [&](uint4(&stage)[kRows][kChunks]) {
    if (fetched_tile < tiles && own > 0) {
#pragma unroll
      for (int j = 0; j < kRows * kChunks / 32; ++j) {
        const int row = j * (32 / kChunks) + lane / kChunks, chunk = lane % kChunks;
        const int at = first_column(fetched) + chunk * 8;
        const T* from = w + static_cast<std::int64_t>(min(fetched_tile * kRows + row, n - 1)) * k + (at < k ? at : 0);
        copy_async(&stage[row][chunk ^ row % 2 * 4], from, at < k);
      }
      if (++fetched == own) {
        fetched = 0;
        fetched_tile += static_cast<int>(gridDim.x);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(shared.stages[warp][i]);
  let_next_begin();
  wait_for_previous();

  int index = 0, buffer = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x), buffer ^= 1) {
    float sums[4] = {};
    for (int begin = 0; begin < own; begin += kAhead) {
      uint4 b[kAhead][2];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = first_column(begin + i) + half * 32 + quad * 8;
          b[i][half] = group < m && at < k
                           ? *reinterpret_cast<const uint4*>(x + static_cast<std::int64_t>(group) * k + at)
                           : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (begin + i >= own) break;
        fetch(shared.stages[warp][index == 0 ? kStages - 1 : index - 1]);
        wait_for_copies<kStages - 1>();
        __syncwarp();
        const auto& stage = shared.stages[warp][index];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int chunk = (half * 4 + quad) ^ group % 2 * 4;
          const uint4 low = stage[group][chunk];
          const uint4 high = kRows == 16 ? stage[kRows / 2 + group % (kRows / 2)][chunk] : make_uint4(0, 0, 0, 0);
          const std::uint32_t first[] = {low.x, high.x, low.y, high.y}, second[] = {low.z, high.z, low.w, high.w};
          multiply<T>(sums, first, b[i][half].x, b[i][half].y);
          multiply<T>(sums, second, b[i][half].z, b[i][half].w);
        }
        __syncwarp();
        index = index + 1 == kStages ? 0 : index + 1;
      }
    }
    auto& partials = shared.sums[buffer];
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) partials[warp][quad * 2 + i % 2][group + i / 2 * 8] = sums[i];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kMostRows * kRows; i += kWarps * 32) {
      const int row = i / kRows, place = i % kRows, at = tile * kRows + place;
      if (row >= m || at >= n) continue;
      float sum = bias == nullptr ? 0 : to_float(bias[at]);
#pragma unroll
      for (int part = 0; part < kWarps; ++part) sum += partials[part][row][place];
      y[static_cast<std::int64_t>(row) * n + at] = from_float<Out>(sum);
    }
  }
#endif
}

bool takes_skinny_product(const Runtime& runtime, const Product& product) {
  return runtime.capability() >= 80 && product.m <= kMostRows && product.k % 8 == 0 && aligned(product.x, 16) &&
         aligned(product.w, 16);
}

template <typename T, typename Out, int kRows>
static void run(const Runtime& runtime, const Product& product) {
  using Shared = SkinnyShared<kRows>;
  const auto kernel = skinny_gemm_kernel<T, Out, kRows>;
  const unsigned blocks =
      std::min(blocks_for(product.n, kRows), static_cast<unsigned>(runtime.multiprocessors() * kBlocksPerProcessor));
  launch(runtime, kernel, blocks, kWarps * 32, sizeof(Shared), static_cast<const T*>(product.x),
         static_cast<const T*>(product.w), static_cast<const T*>(product.bias), static_cast<Out*>(product.y), product.m,
         product.n, product.k);
}

// How much of the device works if tiles have so many rows: those that are left over keep few multiprocessors busy.
static double share_at_work(const Runtime& runtime, int n, int rows) {
  const unsigned tiles = blocks_for(n, rows);
  const unsigned rounds = blocks_for(tiles, runtime.multiprocessors());
  return static_cast<double>(tiles) / (static_cast<double>(rounds) * runtime.multiprocessors());
}

template <typename T, typename Out>
static void run_sized(const Runtime& runtime, const Product& product) {
  if (share_at_work(runtime, product.n, 8) > 1.1 * share_at_work(runtime, product.n, 16))
    run<T, Out, 8>(runtime, product);
  else
    run<T, Out, 16>(runtime, product);
}

void multiply_skinny(const Runtime& runtime, const Product& product) {
  const bool wide_out = product.out_dtype == DType::float32;
  if (product.dtype == DType::float16)
    wide_out ? run_sized<f16, float>(runtime, product) : run_sized<f16, f16>(runtime, product);
  else
    wide_out ? run_sized<bf16, float>(runtime, product) : run_sized<bf16, bf16>(runtime, product);
}

}  // namespace vllmlite::cuda
