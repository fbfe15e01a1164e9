// Decoding's products: few rows of x, so that all the time goes into reading w. A block goes over tiles of rows of w,
// of which each warp has a share of the columns, with stages of its own in shared memory that are filled ahead in the
// background, across tiles, and from before the kernel that writes x is done. The rows of w are those of the tensor
// cores' first operand; x comes out of the first-level cache. What stands around a product in a layer is done here too:
// the norm of x, where who wrote x summed up its squares, and the residual or the gate of what comes out.
#include <algorithm>

#include "cuda/activation.cuh"
#include "cuda/linear.hpp"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

constexpr int kWarps = 8, kBlocksPerProcessor = 2;
constexpr int kFewStages = 5, kManyStages = 11;  // where as many blocks share a multiprocessor, and where one has it
constexpr int kColumns = 64;                     // of w in a stage
constexpr int kChunks = kColumns / 8;            // of 16 bytes in a row of a stage
constexpr int kMostRows = 8;

// In rows of odd number the two halves are exchanged, so that neighbouring rows lie in different banks.
template <int kRows, int kStages>
struct Room {
  uint4 stages[kWarps][kStages][kRows][kChunks];
  float sums[2][kWarps][kMostRows][kRows + 1];
  float factors[kMostRows];
};

// What is done with sums: they are written; or added to the residual, whose squares are summed up; or rows of w that
// make gates go together with those that are gated.
enum class End { write, add, gate };

// A row of x as its norm makes it.
template <typename T>
__device__ __forceinline__ uint4 normed(uint4 x, uint4 scale, float factor) {
  auto& values = reinterpret_cast<T(&)[8]>(x);
  const auto& scales = reinterpret_cast<const T(&)[8]>(scale);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = narrow<T>(wide(values[i]) * factor * wide(scales[i]));
  return x;
}

template <typename T, typename Out, int kRows, int kStages, bool kNormed, End kEnd>
static __global__ __launch_bounds__(kWarps * 32, kStages == kFewStages ? kBlocksPerProcessor : 1) void few_rows_kernel(
    const __grid_constant__ FewRows given) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  auto& room = *reinterpret_cast<Room<kRows, kStages>*>(shared);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4, quad = lane % 4;
  const int m = given.m, n = given.n, k = given.k;
  const T* x = static_cast<const T*>(given.x);
  const T* w = static_cast<const T*>(given.w);
  constexpr int kOutputs = kEnd == End::gate ? kRows / 2 : kRows;  // of a tile
  const int outputs = kEnd == End::gate ? n / 2 : n;
  const int tiles = (outputs + kOutputs - 1) / kOutputs, stages = (k + kColumns - 1) / kColumns;
  const int own = (stages - warp + kWarps - 1) / kWarps;  // stages of a tile that are this warp's
  const auto first_column = [&](int i) { return (i * kWarps + warp) * kColumns; };

  int fetched_tile = static_cast<int>(blockIdx.x), fetched = 0;
  const auto fetch = [&](uint4(&stage)[kRows][kChunks]) {
    if (fetched_tile < tiles && own > 0) {
#pragma unroll
      for (int j = 0; j < kRows * kChunks / 32; ++j) {
        const int row = j * (32 / kChunks) + lane / kChunks, chunk = lane % kChunks;
        const int at = first_column(fetched) + chunk * 8;
        // Gates are the first half of a tile and of w, what they gate the second.
        const int from_row = min(fetched_tile * kOutputs + row % kOutputs, outputs - 1) + row / kOutputs * outputs;
        const T* from = w + static_cast<std::int64_t>(from_row) * k + (at < k ? at : 0);
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
  for (int i = 0; i < kStages - 1; ++i) fetch(room.stages[warp][i]);
  let_next_begin();
  wait_for_previous();

  float factor = 1;
  if constexpr (kNormed) {
    float sum = 0;
    if (warp < m)
      for (int i = lane; i < given.num_squares; i += 32) sum += __ldcg(given.squares + warp * given.num_squares + i);
    sum = warp_sum(sum);
    if (lane == 0) room.factors[warp] = rsqrtf(sum / static_cast<float>(k) + given.eps);
    __syncthreads();
    factor = room.factors[group];
  }
  float squares = 0;  // of a row's sums that this thread has seen

  int index = 0, buffer = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x), buffer ^= 1) {
    float sums[4] = {};
    for (int i = 0; i < own; ++i) {
      fetch(room.stages[warp][index == 0 ? kStages - 1 : index - 1]);
      uint4 b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = first_column(i) + half * 32 + quad * 8;
        const bool there = group < m && at < k;
        b[half] = there ? *reinterpret_cast<const uint4*>(x + static_cast<std::int64_t>(group) * k + at)
                        : make_uint4(0, 0, 0, 0);
        if constexpr (kNormed)
          if (there)
            b[half] = normed<T>(b[half], *reinterpret_cast<const uint4*>(static_cast<const T*>(given.norm) + at), factor);
      }
      wait_for_copies<kStages - 1>();
      __syncwarp();
      const auto& stage = room.stages[warp][index];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = (half * 4 + quad) ^ group % 2 * 4;
        const uint4 low = stage[group][chunk];
        const uint4 high = kRows == 16 ? stage[kRows / 2 + group % (kRows / 2)][chunk] : make_uint4(0, 0, 0, 0);
        const std::uint32_t first[] = {low.x, high.x, low.y, high.y}, second[] = {low.z, high.z, low.w, high.w};
        multiply<T>(sums, first, b[half].x, b[half].y);
        multiply<T>(sums, second, b[half].z, b[half].w);
      }
      __syncwarp();
      index = index + 1 == kStages ? 0 : index + 1;
    }
    auto& shares = room.sums[buffer];
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) shares[warp][quad * 2 + i % 2][group + i / 2 * 8] = sums[i];
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x) / kOutputs, place = static_cast<int>(threadIdx.x) % kOutputs;
    const int at = tile * kOutputs + place;
    if (row >= m || at >= outputs) continue;
    const auto sum_of = [&](int from_place, int from_row) {
      float sum = given.bias == nullptr ? 0 : wide(static_cast<const T*>(given.bias)[from_row]);
#pragma unroll
      for (int part = 0; part < kWarps; ++part) sum += shares[part][row][from_place];
      return sum;
    };
    Out* to = static_cast<Out*>(given.y) + static_cast<std::int64_t>(row) * outputs + at;
    // What would be written in between is rounded as if it were.
    if constexpr (kEnd == End::write) {
      *to = narrow<Out>(sum_of(place, at));
    } else if constexpr (kEnd == End::add) {
      *to = narrow<Out>(wide(narrow<Out>(sum_of(place, at))) + wide(*to));
      squares = fmaf(wide(*to), wide(*to), squares);
    } else {
      const float gate = wide(narrow<Out>(sum_of(place, at)));
      const float gated = wide(narrow<Out>(sum_of(place + kOutputs, at + outputs)));
      *to = narrow<Out>(gate_of(given.gate, gate) * gated);
    }
  }
  if constexpr (kEnd == End::add) {
#pragma unroll
    for (int offset = kRows / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAll, squares, offset);
    const int row = static_cast<int>(threadIdx.x) / kRows;
    if (row < m && threadIdx.x % kRows == 0) given.squares_out[row * gridDim.x + blockIdx.x] = squares;
  }
#endif
}

bool takes_few_rows(const Runtime& runtime, const Product& product) {
  return runtime.capability() >= 80 && product.dtype != DType::float32 && product.m <= kMostRows &&
         product.k % 8 == 0 && aligned(product.x, 16) && aligned(product.w, 16);
}

// How much of the device works if tiles have so many rows: those that are left over keep few multiprocessors busy.
static double share_at_work(const Runtime& runtime, int n, int rows) {
  const unsigned tiles = blocks_for(n, rows);
  const unsigned rounds = blocks_for(tiles, runtime.multiprocessors());
  return static_cast<double>(tiles) / (static_cast<double>(rounds) * runtime.multiprocessors());
}

// Rows of w in a tile, and stages of a warp.
struct Shape {
  int rows, stages;
};

static Shape shape_of(const Runtime& runtime, int n, bool gated) {
  const bool one_each = static_cast<int>(blocks_for(n, 16)) <= runtime.multiprocessors() &&
                        runtime.shared_memory() >= static_cast<int>(sizeof(Room<16, kManyStages>));
  if (one_each) return {16, kManyStages};
  const bool low = !gated && share_at_work(runtime, n, 8) > 1.1 * share_at_work(runtime, n, 16);
  return {low ? 8 : 16, kFewStages};
}

static int blocks_of(const Runtime& runtime, int n, int rows) {
  return std::min(static_cast<int>(blocks_for(n, rows)), runtime.multiprocessors() * kBlocksPerProcessor);
}

int squares_of_few_rows(const Runtime& runtime, int n) {
  return blocks_of(runtime, n, shape_of(runtime, n, false).rows);
}

template <typename T, typename Out, bool kNormed, End kEnd>
static void run(const Runtime& runtime, const FewRows& given) {
  const auto start = [&]<int kRows, int kStages>() {
    using Shared = Room<kRows, kStages>;
    const auto kernel = few_rows_kernel<T, Out, kRows, kStages, kNormed, kEnd>;
    VLLMLITE_CUDA_CHECK(cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                        static_cast<int>(sizeof(Shared)));
    const auto blocks = static_cast<unsigned>(blocks_of(runtime, given.n, kRows));
    launch(runtime, kernel, blocks, kWarps * 32, sizeof(Shared), given);
  };
  const Shape shape = shape_of(runtime, given.n, kEnd == End::gate);
  if (shape.stages == kManyStages)
    start.template operator()<16, kManyStages>();
  else if (shape.rows == 16)
    start.template operator()<16, kFewStages>();
  else if constexpr (kEnd != End::gate)
    start.template operator()<8, kFewStages>();
}

template <typename T>
static void run_typed(const Runtime& runtime, const FewRows& given, DType out) {
  if (given.gates)
    run<T, T, true, End::gate>(runtime, given);
  else if (given.squares_out != nullptr)
    run<T, T, false, End::add>(runtime, given);
  else if (given.norm != nullptr)
    run<T, T, true, End::write>(runtime, given);
  else if (out == DType::float32)
    run<T, float, false, End::write>(runtime, given);
  else
    run<T, T, false, End::write>(runtime, given);
}

void multiply_few_rows(const Runtime& runtime, const FewRows& given, DType dtype, DType out) {
  dtype == DType::float16 ? run_typed<f16>(runtime, given, out) : run_typed<bf16>(runtime, given, out);
}

}  // namespace vllmlite::cuda
