// The key/value cache, the op of attention, and attention in float32 for any dtypes and sizes.
#include <algorithm>
#include <limits>

#include "cuda/attention.cuh"
#include "cuda/cache.cuh"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

// ---- Cache

KVCache::KVCache(Runtime& runtime, const CacheSpec& spec, std::int64_t blocks)
    : CacheSpec(spec), width((spec.head_dim + kHeadUnit - 1) / kHeadUnit * kHeadUnit), num_blocks(blocks) {
  if (layers < 1 || kv_heads < 1 || head_dim < 1 || block_size < 1 || num_blocks < 0)
    throw std::invalid_argument("a cache's sizes must be positive");
  if (head_dim > kMostSize)
    throw std::invalid_argument("head size " + std::to_string(head_dim) + ": the CUDA backend has heads of up to " +
                                std::to_string(kMostSize));
  // Kernels and the bulk tensor copy engine count a layer's rows, one for each token, head, and key or value, in int32.
  const std::int64_t rows = std::int64_t{2} * kv_heads * block_size;
  if (num_blocks > std::numeric_limits<std::int32_t>::max() / rows)
    throw std::invalid_argument(std::to_string(num_blocks) + " blocks: the CUDA backend has pools of up to " +
                                std::to_string(std::numeric_limits<std::int32_t>::max() / rows) + " of this size");
  memory = runtime.make_cache({layers, num_blocks, rows, width}, dtype());
  if (head_scales) scales_memory = runtime.make_cache({layers, num_blocks, rows}, DType::float32);
}

void check_pool(const KVCache& kv, const Batch& batch) {
  batch.slots->check_pool(kv.num_blocks);
  if (batch.shape.block_size != kv.block_size)
    throw std::invalid_argument("the batch is for caches of blocks of " + std::to_string(batch.shape.block_size) +
                                " tokens, and this one's hold " + std::to_string(kv.block_size));
}

void* KVCache::layer(int index) const {
  check_index("layer", index, layers);
  return static_cast<char*>(memory.data) + memory.bytes() / static_cast<std::size_t>(layers) * index;
}

float* KVCache::layer_heads(int index) const {
  check_index("layer", index, layers);
  if (!head_scales) return nullptr;
  return static_cast<float*>(scales_memory.data) + scales_memory.size() / layers * index;
}

// ---- Attention in float32, whose sums do not depend on what else is in the batch
//
// Grid: x a token, y a query head. Block: kTileKeys threads.
// Queries: a block has up to kQueries tokens of one row whose positions lie in one group of kQueries; the blocks of the
// other tokens of such a group return at once. Every key and value is read once for the group.
// Keys: tiles of kTileKeys, which begin at the same positions whatever the query. In a tile, thread i scores key i;
// then thread i owns elements i and i + kTileKeys of the sums of every query.
// Shared memory: static; queries, the tile's weights, and where its keys are in the cache.

constexpr int kTileKeys = 128, kQueriesOfGroup = 4;

template <typename T, typename Cached, int kQueries>
static __global__ __launch_bounds__(kTileKeys) void batch_invariant_kernel(const __grid_constant__ Attention given) {
  __shared__ float queries[kQueries][kMostSize];
  __shared__ float weights[kQueries][kTileKeys];  // times the value's own scale
  __shared__ std::int64_t places[kTileKeys];
  __shared__ float reduced[32];
  constexpr int kElements = kMostSize / kTileKeys;
  let_next_begin();
  wait_for_previous();
  const int thread = static_cast<int>(threadIdx.x), head = static_cast<int>(blockIdx.y), size = given.size;
  const int token = static_cast<int>(blockIdx.x), slot = given.batch.token_slots[token];
  const auto row_of = [&](int query) { return (static_cast<std::int64_t>(token + query) * given.heads + head) * size; };
  T* out = static_cast<T*>(given.out);
  if (slot < 0) {
    for (int i = thread; i < size; i += kTileKeys) out[row_of(0) + i] = from_float<T>(0);
    return;
  }
  const int position = given.batch.positions[token];
  int count = 1;
  if constexpr (kQueries > 1) {
    if (position % kQueries != 0 && token > 0 && given.batch.token_slots[token - 1] == slot) return;
    const int most = min(kQueries - position % kQueries, given.num_tokens - token);
    while (count < most && given.batch.token_slots[token + count] == slot) ++count;
  }
  for (int query = 0; query < count; ++query)
    for (int i = thread; i < size; i += kTileKeys)
      queries[query][i] = to_float(static_cast<const T*>(given.q)[row_of(query) + i]);
  // The first key that a query sees.
  const auto first_of = [&](int query) {
    return given.window > position + query ? 0 : position + query - given.window + 1;
  };
  const int first = first_of(0), last = position + count - 1;
  const int kv_head = head / (given.heads / given.kv_heads);
  const std::int64_t plane = static_cast<std::int64_t>(given.block_size) * given.width;
  const std::int32_t* table = given.batch.block_table + static_cast<std::int64_t>(slot) * given.batch.max_blocks;
  const auto* keys = static_cast<const Cached*>(given.kv) + kv_head * plane;
  const Cached* values = keys + given.kv_heads * plane;
  const int values_at = given.kv_heads * given.block_size;  // in heads of tokens
  const float slope = slope_of(given, head);
  float largest[kQueries], total[kQueries] = {}, sums[kQueries][kElements] = {};
#pragma unroll
  for (float& of_query : largest) of_query = -INFINITY;
  for (int tile = first / kTileKeys * kTileKeys; tile <= last; tile += kTileKeys) {
    const int key = tile + thread;
    float scores[kQueries] = {}, value_scale = 1;
    __syncthreads();
    if (key >= first && key <= last) {
      const std::int64_t place = table[key / given.block_size] * 2 * given.kv_heads * plane +
                                 static_cast<std::int64_t>(key % given.block_size) * given.width;
      places[thread] = place;
      for (int i = 0; i < size; ++i) {
        const float element = to_float(keys[place + i]);
#pragma unroll
        for (int query = 0; query < kQueries; ++query)
          if (query < count) scores[query] = fmaf(queries[query][i], element, scores[query]);
      }
      if (kQuantized<Cached> && given.head_scales != nullptr) {
        const float* own = given.head_scales + place / given.width + kv_head * given.block_size;
        value_scale = own[values_at];
#pragma unroll
        for (float& score : scores) score *= *own;
      }
    }
#pragma unroll
    for (int query = 0; query < kQueries; ++query) {
      if (query >= count) break;
      const bool seen = key >= first_of(query) && key <= position + query;
      const float score = seen ? edited_score(given, scores[query], slope, key - position - query) : -INFINITY;
      const float next =
          fmaxf(largest[query], block_reduce(score, reduced, [](float a, float b) { return fmaxf(a, b); }));
      const float weight = score == -INFINITY ? 0 : expf(score - next);
      weights[query][thread] = weight * value_scale;
      const float kept = largest[query] == -INFINITY ? 0 : expf(largest[query] - next);
      total[query] = fmaf(total[query], kept, block_sum(weight, reduced));
      largest[query] = next;
#pragma unroll
      for (float& sum : sums[query]) sum *= kept;
    }
    __syncthreads();
    const int begin = max(first - tile, 0), end = min(last - tile + 1, kTileKeys);
#pragma unroll
    for (int part = 0; part < kElements; ++part) {
      const int i = part * kTileKeys + thread;
      if (i >= size) continue;
      for (int j = begin; j < end; ++j) {
        const float value = to_float(values[places[j] + i]);
#pragma unroll
        for (int query = 0; query < kQueries; ++query)
          if (query < count && tile + j >= first_of(query) && tile + j <= position + query)
            sums[query][part] = fmaf(weights[query][j], value, sums[query][part]);
      }
    }
  }
#pragma unroll
  for (int query = 0; query < kQueries; ++query)
#pragma unroll
    for (int part = 0; part < kElements; ++part)
      if (const int i = part * kTileKeys + thread; query < count && i < size)
        out[row_of(query) + i] = from_float<T>(sums[query][part] / total[query] * given.value_scale);
}

void attend_batch_invariant(const Runtime& runtime, const Attention& attention) {
  const dim3 grid(static_cast<unsigned>(attention.num_tokens), static_cast<unsigned>(attention.heads));
  with_float(attention.dtype, [&](auto* q) {
    with_element(attention.element, [&](auto* kv) {
      using T = Pointee<decltype(q)>;
      using Cached = Pointee<decltype(kv)>;
      launch(runtime,
             attention.num_tokens == attention.num_rows ? batch_invariant_kernel<T, Cached, 1>
                                                        : batch_invariant_kernel<T, Cached, kQueriesOfGroup>,
             grid, kTileKeys, 0, attention);
    });
  });
}

// ---- The op

Tensor paged_attention(Runtime& runtime, const Tensor& q, const KVCache& kv, int layer, const Batch& batch, float scale,
                       int window, const ScoreEdits& edits) {
  check_rank(q, 3, "q of paged_attention");
  check_shape(q, {batch.num_tokens, q.shape[1], kv.head_dim}, "q of paged_attention");
  check_dtype(q, runtime.dtype(), "q of paged_attention");
  const auto heads = static_cast<int>(q.shape[1]);
  if (heads < 1 || heads % kv.kv_heads != 0)
    throw std::invalid_argument("paged_attention: " + std::to_string(heads) + " query heads do not share " +
                                std::to_string(kv.kv_heads) + " key/value heads evenly");
  check_pool(kv, batch);
  if (window < 1) throw std::invalid_argument("paged_attention: a window of " + std::to_string(window));
  if (edits.soft_cap < 0)
    throw std::invalid_argument("paged_attention: a soft cap of " + std::to_string(edits.soft_cap));
  if (edits.alibi) {
    check_shape(*edits.alibi, {heads}, "slopes of paged_attention");
    check_dtype(*edits.alibi, DType::float32, "slopes of paged_attention");
  }
  const DeviceGuard guard(runtime.device());
  Tensor out = runtime.make({q.shape[0], q.shape[1] * q.shape[2]}, q.dtype);
  const auto [key_scale, value_scale] = kv.layer_scales(layer);
  const Attention attention{q.data,
                            kv.layer(layer),
                            kv.layer_heads(layer),
                            out.data,
                            batch.view,
                            edits.alibi ? static_cast<const float*>(edits.alibi->data) : nullptr,
                            edits.soft_cap,
                            scale * key_scale,
                            value_scale,
                            window,
                            heads,
                            kv.kv_heads,
                            kv.head_dim,
                            kv.width,
                            kv.block_size,
                            kv.num_blocks,
                            batch.num_tokens,
                            batch.num_rows,
                            batch.num_work_items,
                            batch.num_work_lists,
                            batch.num_queries,
                            {batch.num_tiles[0], batch.num_tiles[1], batch.num_tiles[2]},
                            q.dtype,
                            kv.element};
  if (!takes_tensor_cores(runtime, attention)) {
    attend_batch_invariant(runtime, attention);
  } else {
    if (attention.num_work_items > 0) attend_decoding(runtime, attention);
    if (attention.num_tiles[0] > 0)
      takes_hopper(runtime, attention) ? attend_prefilling_hopper(runtime, attention)
                                       : attend_prefilling(runtime, attention);
  }
  return out;
}

}  // namespace vllmlite::cuda
