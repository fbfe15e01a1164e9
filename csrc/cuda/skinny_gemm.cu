// Skinny products: at most 8 rows of x, as in decoding, so that all the time goes into reading w.
//
// Grid: at most two blocks a multiprocessor, which go over tiles of kRows rows of w (16, or 8 where that keeps more
// multiprocessors busy). Block: 8 warps, which share the columns of a tile: warp i has stages i, i + 8, ... of 128
// bytes of columns. Shared memory: for each warp a ring of kStages stages of its own, filled ahead by asynchronous
// copies, across tiles, and from before the kernel that writes x is done; and the warps' sums of a tile, twice, for
// them to be added. Rows of w are those of the tensor cores' first operand, rows of x the columns of the second, which
// each thread reads through the first-level cache: a thread holds the sums of rows lane / 4 and lane / 4 + 8 of w, and
// of rows 2 (lane % 4) and the next of x.
//
// 8-bit elements have scales: with kBlocks the sum of a stage is multiplied by those of its block of 128 columns, else
// the result by those of the rows.
#include <algorithm>

#include "cuda/bytes.cuh"
#include "cuda/linear.hpp"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

constexpr int kWarps = 8, kBlocksPerProcessor = 2;
constexpr int kStages = 4;  // few enough for a block of the next product to get in beside
constexpr int kChunks = 8;  // of 16 bytes in a row of a stage
constexpr int kMostRows = 8;

// Odd rows have their two halves exchanged, so that adjacent rows are in different banks.
template <int kRows>
struct SkinnyShared {
  uint4 stages[kWarps][kStages][kRows][kChunks];
  union {
    float sums[2][kWarps][kMostRows][kRows + 1];
    int integers[2][kWarps][kMostRows][kRows + 1];
  };
};

// In is T, or of 8 bits, whose scales `scales` has; rows of y are `stride` apart.
template <typename In, typename T, typename Out, int kRows, bool kBlocks>
static __global__ __launch_bounds__(kWarps * 32,
                                    kBlocksPerProcessor) void skinny_gemm_kernel(const In* x, const In* w,
                                                                                 const T* bias, Out* y, int m, int n,
                                                                                 int k, int stride, ByteScales scales) {
#if __CUDA_ARCH__ >= 800
  constexpr bool kBytes = sizeof(In) == 1, kIntegers = std::is_same_v<In, std::int8_t>, kScaled = kBytes && !kIntegers;
  using Sum = std::conditional_t<kIntegers, int, float>;
  constexpr int kOfChunk = kPack<In>, kColumns = kChunks * kOfChunk;  // of w in a stage
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
        const int at = first_column(fetched) + chunk * kOfChunk;
        const In* from = w + static_cast<std::int64_t>(min(fetched_tile * kRows + row, n - 1)) * k + (at < k ? at : 0);
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
  wait_for_previous();
  let_next_begin();  // not earlier: the next kernel may rely on x

  int index = 0, buffer = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x), buffer ^= 1) {
    Sum sums[4] = {};
    for (int begin = 0; begin < own; begin += kAhead) {
      uint4 b[kAhead][2];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = first_column(begin + i) + (half * 4 + quad) * kOfChunk;
          b[i][half] = group < m && at < k
                           ? *reinterpret_cast<const uint4*>(x + static_cast<std::int64_t>(group) * k + at)
                           : make_uint4(0, 0, 0, 0);
        }
      [[maybe_unused]] float factors[kAhead][2];  // of stages, for the two rows of x
      if constexpr (kBlocks) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int block = min((begin + i) * kWarps + warp, stages - 1);
          const float of_w = scales.w[tile * kRows / kFp8Block * stages + block];
          const float* of_x = scales.x + static_cast<std::int64_t>(block) * scales.stride;
#pragma unroll
          for (int j = 0; j < 2; ++j) factors[i][j] = of_x[min(quad * 2 + j, m - 1)] * of_w;
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (begin + i >= own) break;
        fetch(shared.stages[warp][index == 0 ? kStages - 1 : index - 1]);
        wait_for_copies<kStages - 1>();
        __syncwarp();
        const auto& stage = shared.stages[warp][index];
        Sum of_stage[4] = {};  // of 8-bit floats, added in float32
        auto& to = kScaled ? of_stage : sums;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int chunk = (half * 4 + quad) ^ group % 2 * 4;
          const uint4 low = stage[group][chunk];
          const uint4 high = kRows == 16 ? stage[kRows / 2 + group % (kRows / 2)][chunk] : make_uint4(0, 0, 0, 0);
          const std::uint32_t first[] = {low.x, high.x, low.y, high.y}, second[] = {low.z, high.z, low.w, high.w};
          multiply<In>(to, first, b[i][half].x, b[i][half].y);
          multiply<In>(to, second, b[i][half].z, b[i][half].w);
        }
        if constexpr (kScaled) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sums[j] = kBlocks ? fmaf(of_stage[j], factors[i][j % 2], sums[j]) : sums[j] + of_stage[j];
        }
        __syncwarp();
        index = index + 1 == kStages ? 0 : index + 1;
      }
    }
    auto& partials = [&]() -> auto& {
      if constexpr (kIntegers)
        return shared.integers[buffer];
      else
        return shared.sums[buffer];
    }();
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) partials[warp][quad * 2 + i % 2][group + i / 2 * 8] = sums[i];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kMostRows * kRows; i += kWarps * 32) {
      const int row = i / kRows, place = i % kRows, at = tile * kRows + place;
      if (row >= m || at >= n) continue;
      const float added = bias == nullptr ? 0 : to_float(bias[at]);
      Sum sum = 0;
      if constexpr (!kBytes) sum = added;
#pragma unroll
      for (int part = 0; part < kWarps; ++part) sum += partials[part][row][place];
      float result;
      if constexpr (kBytes)
        result = scaled<kBlocks>(sum, scales, row, at, added);
      else
        result = sum;
      y[static_cast<std::int64_t>(row) * stride + at] = from_float<Out>(result);
    }
  }
#endif
}

bool takes_skinny_product(const Runtime& runtime, const Product& product) {
  return runtime.capability() >= 80 && product.m <= kMostRows && product.k % 8 == 0 && aligned(product.x, 16) &&
         aligned(product.w, 16);
}

// The fraction of the device that is busy with tiles of this many rows, given that the last tiles occupy only some of
// the multiprocessors.
static double share_at_work(const Runtime& runtime, int n, int rows) {
  const unsigned tiles = blocks_for(n, rows);
  const unsigned rounds = blocks_for(tiles, runtime.multiprocessors());
  return static_cast<double>(tiles) / (static_cast<double>(rounds) * runtime.multiprocessors());
}

template <typename In, typename T, typename Out, bool kBlocks>
static void run(const Runtime& runtime, const Product& product, int stride, const ByteScales& scales) {
  const auto go = [&](auto* kernel, int rows, std::size_t shared) {
    const unsigned blocks =
        std::min(blocks_for(product.n, rows), static_cast<unsigned>(runtime.multiprocessors() * kBlocksPerProcessor));
    launch(runtime, kernel, blocks, kWarps * 32, shared, static_cast<const In*>(product.x),
           static_cast<const In*>(product.w), static_cast<const T*>(product.bias), static_cast<Out*>(product.y),
           product.m, product.n, product.k, stride, scales);
  };
  if (share_at_work(runtime, product.n, 8) > 1.1 * share_at_work(runtime, product.n, 16))
    go(skinny_gemm_kernel<In, T, Out, 8, kBlocks>, 8, sizeof(SkinnyShared<8>));
  else
    go(skinny_gemm_kernel<In, T, Out, 16, kBlocks>, 16, sizeof(SkinnyShared<16>));
}

void multiply_skinny(const Runtime& runtime, const Product& product) {
  with_results(product.dtype, product.out_dtype, [&](auto* type, auto* out) {
    using T = Pointee<decltype(type)>;
    run<T, T, Pointee<decltype(out)>, false>(runtime, product, product.n, {});
  });
}

bool takes_skinny_bytes(const Runtime& runtime, const ByteProduct& product) {
  return runtime.capability() >= 80 && product.m <= kMostRows;
}

void multiply_skinny_bytes(const Runtime& runtime, const ByteProduct& product) {
  with_results(product.dtype, product.out_dtype, [&](auto* type, auto* out) {
    using T = Pointee<decltype(type)>;
    using Out = Pointee<decltype(out)>;
    if (product.integers)
      run<std::int8_t, T, Out, false>(runtime, product, product.stride, product.scales);
    else if (product.blocks)
      run<e4m3, T, Out, true>(runtime, product, product.stride, product.scales);
    else
      run<e4m3, T, Out, false>(runtime, product, product.stride, product.scales);
  });
}

}  // namespace vllmlite::cuda
