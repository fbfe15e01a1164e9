// Changes of linear layers by adapters: low-rank products of some rows, added to the layer's results.
//
// A chunk is a few tokens with one adapter. Every element is summed by one thread, or by the threads of one block, in
// an order that does not depend on the other tokens. Both kernels read the adapter's weights before they wait for the
// kernel before them: weights and chunks are from before the step's fence. Their blocks take one task after another, of
// as many as the step's chunks make, which a graph does not know.
#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

constexpr int kRanks = 4;  // ranks that a thread block or a thread computes at once; ranks are padded to a multiple

// The change that an adapter makes to a weight, as kernels read it.
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

// Calls `body` with the number of tokens that a chunk is computed for: one, or all of it, of which those beyond `count`
// are the last one again.
template <typename Body>
static __device__ __forceinline__ void for_tokens(int count, Body&& body) {
  if (count == 1)
    body(std::integral_constant<int, 1>{});
  else
    body(std::integral_constant<int, kChunkTokens>{});
}

// ---- The first factor: low = x @ a.T
// A task is kRanks ranks of a chunk. The warps of a block divide the columns of x, and add their sums in shared memory.

constexpr int kWarps = 4, kShrinkBlocks = 3;  // blocks of a multiprocessor
constexpr int kStepsAhead = 2;                // steps along k whose rows of a are read before x is there

// Reads what the kernel before the last one wrote, if a pack has 16 bytes: past the first-level cache.
template <typename P>
static __device__ __forceinline__ P load_fresh(const void* from) {
  if constexpr (sizeof(P) == sizeof(uint4)) {
    const uint4 words = __ldcg(static_cast<const uint4*>(from));
    return *reinterpret_cast<const P*>(&words);
  } else {
    return *static_cast<const P*>(from);
  }
}

// With `x_is_there`, the kernel before this one does not write x, but waits for the one that does before this one
// begins.
template <typename T, int kSize>
static __global__ __launch_bounds__(kWarps * 32, kShrinkBlocks) void shrink_kernel(const T* x, const LowRankView* views,
                                                                                   const AdapterChunk* chunks,
                                                                                   float* low, int k, int width,
                                                                                   bool x_is_there) {
  using P = Pack<T, kSize>;
  __shared__ float partials[kWarps][kRanks * kChunkTokens];
  let_next_begin();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int tiles = width / kRanks, tasks = chunks[0].chunks * tiles;
  const auto begin = [&](int step) { return (step * kWarps + warp) * 32 * kSize; };
  bool waits = !x_is_there;
  for (int task = static_cast<int>(blockIdx.x); task < tasks; task += static_cast<int>(gridDim.x)) {
    const AdapterChunk& chunk = chunks[task / tiles];
    const LowRankView& view = views[chunk.adapter];
    const int rank = task % tiles * kRanks, count = chunk.count;
    if (rank >= view.ranks) continue;
    const T* a = static_cast<const T*>(view.a) + static_cast<std::int64_t>(rank) * k;
    const auto load = [&](P(&to)[kRanks], int at) {
#pragma unroll
      for (int r = 0; r < kRanks; ++r) to[r] = *reinterpret_cast<const P*>(a + static_cast<std::int64_t>(r) * k + at);
    };
    P ahead[kStepsAhead][kRanks];
#pragma unroll
    for (int step = 0; step < kStepsAhead; ++step) {
      const int at = begin(step) + lane * kSize;
      if (at < k) load(ahead[step], at);
    }
    const T* rows[kChunkTokens];
#pragma unroll
    for (int j = 0; j < kChunkTokens; ++j) rows[j] = x + static_cast<std::int64_t>(chunk.tokens[j]) * k;
    if (waits) {
      wait_for_previous();
      waits = false;
    }
    const auto multiply = [&](auto tokens) {
      constexpr int kTokens = decltype(tokens)::value;
      float sums[kRanks][kTokens] = {};
      const auto add = [&](const P(&values)[kRanks], int at) {
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          const P b = load_fresh<P>(rows[j] + at);
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
#pragma unroll
            for (int e = 0; e < kSize; ++e) sums[r][j] = fmaf(to_float(values[r].at[e]), to_float(b.at[e]), sums[r][j]);
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
        P values[kRanks];
        load(values, at);
        add(values, at);
      }
#pragma unroll
      for (int j = 0; j < kTokens; ++j)
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
          const float sum = warp_sum(sums[r][j]);
          if (lane == 0) partials[warp][j * kRanks + r] = sum;
        }
    };
    for_tokens(count, multiply);
    __syncthreads();
    const int i = static_cast<int>(threadIdx.x);
    if (i < count * kRanks) {
      float sum = 0;
#pragma unroll
      for (int part = 0; part < kWarps; ++part) sum += partials[part][i];
      low[static_cast<std::int64_t>(chunk.tokens[i / kRanks]) * width + rank + i % kRanks] = sum;
    }
    __syncthreads();
  }
  if (waits || x_is_there) wait_for_previous();
}

// ---- The second factor: y += scale * low @ b.T
// A task is kColumnThreads packs of columns of a chunk, one for each thread.

constexpr int kColumnThreads = 64, kExpandBlocks = 4;  // blocks of a multiprocessor
constexpr int kRanksAhead = 8;                         // ranks whose rows of b are read before `low` is there

template <typename T, int kSize>
static __global__ __launch_bounds__(kColumnThreads,
                                    kExpandBlocks) void expand_kernel(T* y, const float* low, const LowRankView* views,
                                                                      const AdapterChunk* chunks, int out, int width) {
  using P = Pack<T, kSize>;
  let_next_begin();
  const int tiles = (out + kColumnThreads * kSize - 1) / (kColumnThreads * kSize), tasks = chunks[0].chunks * tiles;
  bool waits = true;
  for (int task = static_cast<int>(blockIdx.x); task < tasks; task += static_cast<int>(gridDim.x)) {
    const AdapterChunk& chunk = chunks[task / tiles];
    const LowRankView& view = views[chunk.adapter];
    const int column = (task % tiles * kColumnThreads + static_cast<int>(threadIdx.x)) * kSize, count = chunk.count;
    LowRankView::Part part{};
    for (int i = 0; i < view.parts; ++i)
      if (column >= view.part[i].first_column && column < view.part[i].first_column + view.part[i].columns)
        part = view.part[i];
    const T* b = static_cast<const T*>(part.b) + (column - part.first_column);
    P ahead[kRanksAhead];
#pragma unroll
    for (int r = 0; r < kRanksAhead; ++r)
      if (r < part.rank) ahead[r] = *reinterpret_cast<const P*>(b + static_cast<std::int64_t>(r) * part.columns);
    if (waits) {
      wait_for_previous();
      waits = false;
    }
    if (part.rank == 0) continue;
    const auto multiply = [&](auto tokens) {
      constexpr int kTokens = decltype(tokens)::value;
      T* places[kTokens];
      const float* factors[kTokens];
      P results[kTokens];
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        places[j] = y + static_cast<std::int64_t>(chunk.tokens[j]) * out + column;
        factors[j] = low + static_cast<std::int64_t>(chunk.tokens[j]) * width + part.first_rank;
        results[j] = *reinterpret_cast<const P*>(places[j]);
      }
      float sums[kTokens][kSize] = {};
      const auto add = [&](const P* rows, int rank) {
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          const float4 four = *reinterpret_cast<const float4*>(factors[j] + rank);
          const float factor[kRanks] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
#pragma unroll
            for (int e = 0; e < kSize; ++e) sums[j][e] = fmaf(factor[r], to_float(rows[r].at[e]), sums[j][e]);
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
      for (int j = 0; j < kTokens; ++j) {
        if (j >= count) break;
#pragma unroll
        for (int e = 0; e < kSize; ++e)
          results[j].at[e] = from_float<T>(fmaf(part.scale, sums[j][e], to_float(results[j].at[e])));
        *reinterpret_cast<P*>(places[j]) = results[j];
      }
    };
    for_tokens(count, multiply);
  }
  if (waits) wait_for_previous();
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

Tensor lora_linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight, const LowRankTable& table,
                   const Batch& batch) {
  check_shape(x, {batch.num_tokens, table.columns}, "x of lora_linear");
  check_dtype(x, runtime.dtype(), "x of lora_linear");
  if (weight.out() != table.out) throw std::invalid_argument("lora_linear: the adapters are for another weight");
  const DeviceGuard guard(runtime.device());
  const auto width = padded(table.max_rank) * static_cast<std::int64_t>(table.rows.size());
  const auto chunks = static_cast<unsigned>(batch.num_chunks),
             processors = static_cast<unsigned>(runtime.multiprocessors());
  const auto* views = static_cast<const LowRankView*>(table.views.data);
  const Tensor low = runtime.make({batch.num_tokens, width}, DType::float32);
  const auto columns = static_cast<int>(table.columns), out = static_cast<int>(table.out);
  const auto shrink = [&](bool x_is_there) {
    with_float(x.dtype, [&](auto* pointer) {
      using T = Pointee<decltype(pointer)>;
      const bool packs = columns % kPack<T> == 0 && aligned(x.data, 16);
      const unsigned blocks = std::min(chunks * blocks_for(width, kRanks), processors * kShrinkBlocks);
      launch(runtime, packs ? shrink_kernel<T, kPack<T>> : shrink_kernel<T, 1>, blocks, kWarps * 32, 0,
             static_cast<const T*>(x.data), views, batch.chunks, static_cast<float*>(low.data), columns,
             static_cast<int>(width), x_is_there);
    });
  };
  // The first half runs beside a skinny product, which leaves multiprocessors free; otherwise before the product, which
  // may fetch its weights meanwhile.
  const bool beside = multiplies_skinny(runtime, x, weight);
  if (!beside) shrink(false);
  Tensor y = linear(runtime, x, weight, runtime.dtype());
  if (beside) shrink(true);
  with_float(y.dtype, [&](auto* pointer) {
    using T = Pointee<decltype(pointer)>;
    const bool packs = std::ranges::all_of(table.rows, [](std::int64_t rows) { return rows % kPack<T> == 0; });
    const unsigned tiles = blocks_for(out, kColumnThreads * (packs ? kPack<T> : 1));
    launch(runtime, packs ? expand_kernel<T, kPack<T>> : expand_kernel<T, 1>,
           std::min(chunks * tiles, processors * kExpandBlocks), kColumnThreads, 0, static_cast<T*>(y.data),
           static_cast<const float*>(low.data), views, batch.chunks, out, static_cast<int>(width));
  });
  return y;
}

}  // namespace vllmlite::cuda
