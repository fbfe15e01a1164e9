// Changes of linear layers by adapters: low-rank products of some rows, added to the layer's results.
//
// A chunk is a few tokens with one adapter. Every element is summed by one warp, or by the warps of one thread block,
// in an order that does not depend on the other tokens. Both kernels read the adapter's weights before they wait for
// the kernel before them: weights and chunks are from before the step's fence.
#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

constexpr int kRanks = 4;  // ranks that a thread block or a thread computes at once; ranks are padded to a multiple

// What an adapter changes of a weight, as kernels read it.
struct LowRankView {
  struct Part {
    std::int32_t first_column, columns;  // of the results
    std::int32_t first_rank, rank;       // its rows of a
    float scale;
    const void* b;  // [rank, columns]
  };

  static constexpr int kMostParts = 3;

  const void* a;              // [ranks, k]
  std::int32_t ranks, parts;  // 0: nothing
  Part part[kMostParts];
};

// ---- The first factor: low = x @ a.T
// Grid: (tiles of kRanks ranks, chunks); a block takes every gridDim.x-th tile. Its warps divide the columns of x, and
// add their sums in shared memory.

constexpr int kWarps = 8;
constexpr int kStepsAhead = 4;  // steps along k whose rows of a are read before x is there

template <typename T, int kSize>
static __global__ __launch_bounds__(kWarps * 32) void shrink_kernel(const T* x, const LowRankView* views,
                                                                    const AdapterChunk* chunks, float* low, int k,
                                                                    int width) {
  using P = Pack<T, kSize>;
  __shared__ float partials[kWarps][kRanks * kChunkTokens];
  const AdapterChunk chunk = chunks[blockIdx.y];
  const LowRankView& view = views[chunk.adapter];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int ranks = view.ranks;
  const auto begin = [&](int step) { return (step * kWarps + warp) * 32 * kSize; };
  const auto load = [&](P(&to)[kRanks], int rank, int at) {
#pragma unroll
    for (int r = 0; r < kRanks; ++r)
      to[r] = *reinterpret_cast<const P*>(static_cast<const T*>(view.a) + static_cast<std::int64_t>(rank + r) * k + at);
  };
  P ahead[kStepsAhead][kRanks];
  const auto load_ahead = [&](int rank) {
#pragma unroll
    for (int step = 0; step < kStepsAhead; ++step) {
      const int at = begin(step) + lane * kSize;
      if (at < k) load(ahead[step], rank, at);
    }
  };
  int rank = static_cast<int>(blockIdx.x) * kRanks;
  if (rank < ranks) load_ahead(rank);
  let_next_begin();
  wait_for_previous();
  while (rank < ranks) {
    float sums[kRanks][kChunkTokens] = {};
    const auto add = [&](const P(&a)[kRanks], int at) {
#pragma unroll
      for (int j = 0; j < kChunkTokens; ++j) {
        if (j >= chunk.count) break;
        const P b = *reinterpret_cast<const P*>(x + static_cast<std::int64_t>(chunk.tokens[j]) * k + at);
#pragma unroll
        for (int r = 0; r < kRanks; ++r)
#pragma unroll
          for (int e = 0; e < kSize; ++e) sums[r][j] = fmaf(to_float(a[r].at[e]), to_float(b.at[e]), sums[r][j]);
      }
    };
#pragma unroll
    for (int step = 0; step < kStepsAhead; ++step) {
      const int at = begin(step) + lane * kSize;
      if (at < k) add(ahead[step], at);
    }
#pragma unroll 2
    for (int step = kStepsAhead; begin(step) < k; ++step) {
      const int at = begin(step) + lane * kSize;
      if (at >= k) break;
      P a[kRanks];
      load(a, rank, at);
      add(a, at);
    }
#pragma unroll
    for (int j = 0; j < kChunkTokens; ++j) {
      if (j >= chunk.count) break;
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        const float sum = warp_sum(sums[r][j]);
        if (lane == 0) partials[warp][j * kRanks + r] = sum;
      }
    }
    __syncthreads();
    const int i = static_cast<int>(threadIdx.x);
    if (i < chunk.count * kRanks) {
      float sum = 0;
#pragma unroll
      for (int part = 0; part < kWarps; ++part) sum += partials[part][i];
      low[static_cast<std::int64_t>(chunks[blockIdx.y].tokens[i / kRanks]) * width + rank + i % kRanks] = sum;
    }
    rank += static_cast<int>(gridDim.x) * kRanks;
    if (rank >= ranks) break;
    __syncthreads();
    load_ahead(rank);
  }
}

// ---- The second factor: y += scale * low @ b.T
// Grid: (blocks of columns, chunks). Each thread has a pack of columns of all tokens of the chunk.

constexpr int kColumnThreads = 64;
constexpr int kRanksAhead = 16;  // ranks whose rows of b are read before `low` is there

template <typename T, int kSize>
static __global__ __launch_bounds__(kColumnThreads) void expand_kernel(T* y, const float* low, const LowRankView* views,
                                                                       const AdapterChunk* chunks, int out, int width) {
  using P = Pack<T, kSize>;
  const AdapterChunk chunk = chunks[blockIdx.y];
  const LowRankView& view = views[chunk.adapter];
  const int column = static_cast<int>(blockIdx.x * kColumnThreads + threadIdx.x) * kSize;
  LowRankView::Part part{};
  for (int i = 0; i < view.parts; ++i)
    if (column >= view.part[i].first_column && column < view.part[i].first_column + view.part[i].columns)
      part = view.part[i];
  const T* b = static_cast<const T*>(part.b) + (column - part.first_column);
  P ahead[kRanksAhead];
#pragma unroll
  for (int r = 0; r < kRanksAhead; ++r)
    if (r < part.rank) ahead[r] = *reinterpret_cast<const P*>(b + static_cast<std::int64_t>(r) * part.columns);
  let_next_begin();
  wait_for_previous();
  if (part.rank == 0) return;
  float sums[kChunkTokens][kSize] = {};
  const auto add = [&](const P* rows, int rank) {
#pragma unroll
    for (int j = 0; j < kChunkTokens; ++j) {
      if (j >= chunk.count) break;
      const float4 four = *reinterpret_cast<const float4*>(low + static_cast<std::int64_t>(chunk.tokens[j]) * width +
                                                           part.first_rank + rank);
      const float factors[kRanks] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[j][e] = fmaf(factors[r], to_float(rows[r].at[e]), sums[j][e]);
    }
  };
#pragma unroll
  for (int r = 0; r < kRanksAhead; r += kRanks)
    if (r < part.rank) add(ahead + r, r);
  for (int rank = kRanksAhead; rank < part.rank; rank += kRanks) {
    P rows[kRanks];
#pragma unroll
    for (int r = 0; r < kRanks; ++r)
      rows[r] = *reinterpret_cast<const P*>(b + static_cast<std::int64_t>(rank + r) * part.columns);
    add(rows, rank);
  }
#pragma unroll
  for (int j = 0; j < kChunkTokens; ++j) {
    if (j >= chunk.count) break;
    P& values = *reinterpret_cast<P*>(y + static_cast<std::int64_t>(chunk.tokens[j]) * out + column);
    P result = values;
#pragma unroll
    for (int e = 0; e < kSize; ++e) result.at[e] = from_float<T>(fmaf(part.scale, sums[j][e], to_float(result.at[e])));
    values = result;
  }
}

// ---- Resident adapters

// Transposes b [columns, rank] to [padded rank, columns], padded with zeros. A thread for each element of the result.
template <typename T>
static __global__ void transpose_kernel(const T* b, T* to, int columns, int rank, std::int64_t size) {
  wait_for_previous();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const std::int64_t r = i / columns, column = i % columns;
  to[i] = r < rank ? b[column * rank + r] : from_float<T>(0);
}

static std::int64_t padded(std::int64_t rank) { return (rank + kRanks - 1) / kRanks * kRanks; }

LowRankTable::LowRankTable(Runtime& the_runtime, std::vector<std::int64_t> rows_of_parts, std::int64_t the_columns,
                           int adapters, int rank)
    : runtime(the_runtime),
      rows(std::move(rows_of_parts)),
      columns(the_columns),
      max_rank(rank),
      owned(static_cast<std::size_t>(adapters) + 1) {
  if (rows.empty() || rows.size() > LowRankView::kMostParts)
    throw std::invalid_argument("a weight has 1 to 3 parts that adapters change");
  for (const std::int64_t part : rows) out += part;
  const DeviceGuard guard(runtime.device());
  views = runtime.make({adapters + 1, static_cast<std::int64_t>(sizeof(LowRankView))}, DType::uint8);
  VLLMLITE_CUDA_CHECK(cudaMemsetAsync, views.data, 0, views.bytes(), runtime.stream());
}

void LowRankTable::set(int index, const std::vector<Tensor>& inputs, const std::vector<LowRankOutput>& outputs) {
  if (index < 1 || static_cast<std::size_t>(index) >= owned.size())
    throw std::out_of_range("adapter " + std::to_string(index) + " of " + std::to_string(owned.size() - 1));
  const DeviceGuard guard(runtime.device());
  auto* const place = static_cast<LowRankView*>(views.data) + index;
  std::vector<Tensor>& own = owned[static_cast<std::size_t>(index)];
  LowRankView view{};
  runtime.upload(place, &view, sizeof view);
  own.clear();
  if (outputs.empty()) return;
  std::vector<std::int64_t> first{0};
  for (const Tensor& a : inputs) {
    check_rank(a, 2, "an adapter's a");
    check_dtype(a, runtime.dtype(), "an adapter's a");
    if (a.shape[1] != columns || a.shape[0] > max_rank)
      throw std::invalid_argument("an adapter's a must be [rank up to " + std::to_string(max_rank) + ", " +
                                  std::to_string(columns) + "], not " + describe(a));
    first.push_back(first.back() + padded(a.shape[0]));
  }
  std::vector<Tensor> made{runtime.make({first.back(), columns}, runtime.dtype())};
  view.a = made[0].data;
  view.ranks = static_cast<std::int32_t>(first.back());
  VLLMLITE_CUDA_CHECK(cudaMemsetAsync, made[0].data, 0, made[0].bytes(), runtime.stream());
  for (std::size_t i = 0; i < inputs.size(); ++i)
    VLLMLITE_CUDA_CHECK(
        cudaMemcpyAsync,
        static_cast<char*>(made[0].data) + static_cast<std::size_t>(first[i] * columns) * item_size(runtime.dtype()),
        inputs[i].data, inputs[i].bytes(), cudaMemcpyDeviceToDevice, runtime.stream());
  for (const LowRankOutput& output : outputs) {
    const std::int64_t rank = inputs.at(output.input).shape[0], own_rows = rows.at(output.part);
    check_shape(output.b, {own_rows, rank}, "an adapter's b");
    check_dtype(output.b, runtime.dtype(), "an adapter's b");
    const Tensor b = runtime.make({padded(rank), own_rows}, runtime.dtype());
    constexpr unsigned kThreads = 256;
    with_float(b.dtype, [&](auto* pointer) {
      using T = Pointee<decltype(pointer)>;
      launch(runtime, transpose_kernel<T>, blocks_for(b.size(), kThreads), kThreads, 0,
             static_cast<const T*>(output.b.data), static_cast<T*>(b.data), static_cast<int>(own_rows),
             static_cast<int>(rank), b.size());
    });
    std::int64_t column = 0;
    for (std::size_t part = 0; part < output.part; ++part) column += rows[part];
    view.part[view.parts++] = {static_cast<std::int32_t>(column),
                               static_cast<std::int32_t>(own_rows),
                               static_cast<std::int32_t>(first[output.input]),
                               static_cast<std::int32_t>(padded(rank)),
                               output.scale,
                               b.data};
    made.push_back(b);
  }
  runtime.upload(place, &view, sizeof view);
  own = std::move(made);
}

// ---- The op

static constexpr unsigned kMostTiles = 64;  // blocks for a chunk's ranks

Tensor lora_linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight, const LowRankTable& table,
                   const Batch& batch) {
  check_shape(x, {batch.num_tokens, table.columns}, "x of lora_linear");
  check_dtype(x, runtime.dtype(), "x of lora_linear");
  if (weight.out() != table.out) throw std::invalid_argument("lora_linear: the adapters are for another weight");
  const DeviceGuard guard(runtime.device());
  const auto width = padded(table.max_rank) * static_cast<std::int64_t>(table.rows.size());
  const auto chunks = static_cast<unsigned>(batch.num_chunks);
  const auto* views = static_cast<const LowRankView*>(table.views.data);
  const Tensor low = runtime.make({batch.num_tokens, width}, DType::float32);
  const auto columns = static_cast<int>(table.columns), out = static_cast<int>(table.out);
  // First, so that a product which fetches its weights early does so meanwhile.
  with_float(x.dtype, [&](auto* pointer) {
    using T = Pointee<decltype(pointer)>;
    const auto kernel =
        columns % kPack<T> == 0 && aligned(x.data, 16) ? shrink_kernel<T, kPack<T>> : shrink_kernel<T, 1>;
    const dim3 grid(std::min(blocks_for(width, kRanks), kMostTiles), chunks);
    launch(runtime, kernel, grid, kWarps * 32, 0, static_cast<const T*>(x.data), views, batch.chunks,
           static_cast<float*>(low.data), columns, static_cast<int>(width));
  });
  Tensor y = linear(runtime, x, weight, runtime.dtype());
  with_float(y.dtype, [&](auto* pointer) {
    using T = Pointee<decltype(pointer)>;
    const bool packs = std::ranges::all_of(table.rows, [](std::int64_t rows) { return rows % kPack<T> == 0; });
    const auto go = [&](auto* kernel, int size) {
      launch(runtime, kernel, dim3(blocks_for(out, kColumnThreads * size), chunks), kColumnThreads, 0,
             static_cast<T*>(y.data), static_cast<const float*>(low.data), views, batch.chunks, out,
             static_cast<int>(width));
    };
    packs ? go(expand_kernel<T, kPack<T>>, kPack<T>) : go(expand_kernel<T, 1>, 1);
  });
  return y;
}

}  // namespace vllmlite::cuda
