// The cache, the op of attention, and attention that is exact rather than fast.
#include <algorithm>
#include <limits>

#include "cuda/attention.cuh"
#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

// ---- Cache

KVCache::KVCache(Runtime& runtime, int layer_count, int heads, int size, int block, DType type, std::int64_t blocks)
    : layers(layer_count),
      kv_heads(heads),
      head_dim(size),
      width((size + kHeadUnit - 1) / kHeadUnit * kHeadUnit),
      block_size(block),
      dtype(type),
      num_blocks(blocks) {
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
  memory = runtime.make({layers, num_blocks, block_elements()}, dtype);
}

void check_pool(const KVCache& kv, const Batch& batch) {
  batch.slots->check_pool(kv.num_blocks);
  if (batch.cut.block_size != kv.block_size)
    throw std::invalid_argument("the batch is for caches of blocks of " + std::to_string(batch.cut.block_size) +
                                " tokens, and this one's hold " + std::to_string(kv.block_size));
}

std::int64_t KVCache::block_elements() const { return std::int64_t{2} * kv_heads * block_size * width; }

Tensor KVCache::layer(int index) const {
  if (index < 0 || index >= layers)
    throw std::out_of_range("layer " + std::to_string(index) + " is not within 0 and " + std::to_string(layers - 1));
  Tensor part = memory;
  part.shape = {num_blocks, block_elements()};
  part.data = static_cast<char*>(memory.data) + static_cast<std::size_t>(index) * part.bytes();
  return part;
}

// ---- In order: a block a head of a token; tiles of keys begin at the same positions whatever the query

constexpr int kTileKeys = 128;

template <typename T, typename Cached>
static __global__ __launch_bounds__(kTileKeys) void in_order_kernel(const __grid_constant__ Attention given) {
  __shared__ float query[kMostSize];
  __shared__ float weights[kTileKeys];
  __shared__ std::int64_t places[kTileKeys];
  __shared__ float room[32];
  let_next_begin();
  wait_for_previous();
  const int thread = static_cast<int>(threadIdx.x), head = static_cast<int>(blockIdx.y);
  const std::int64_t token = blockIdx.x;
  const int size = given.size;
  const std::int64_t at = (token * given.heads + head) * size;
  T* out = static_cast<T*>(given.out) + at;
  const int slot = given.batch.token_slots[token];
  if (slot < 0) {
    for (int i = thread; i < size; i += kTileKeys) out[i] = narrow<T>(0);
    return;
  }
  for (int i = thread; i < size; i += kTileKeys) query[i] = wide(static_cast<const T*>(given.q)[at + i]);
  const int position = given.batch.positions[token];
  const int first = given.window > position ? 0 : position - given.window + 1;
  const int kv_head = head / (given.heads / given.kv_heads);
  const std::int64_t plane = static_cast<std::int64_t>(given.block_size) * given.width;
  const std::int32_t* table = given.batch.block_table + static_cast<std::int64_t>(slot) * given.batch.max_blocks;
  const auto* keys = static_cast<const Cached*>(given.kv) + kv_head * plane;
  const Cached* values = keys + given.kv_heads * plane;
  const float slope = slope_of(given, head);
  float largest = -INFINITY, total = 0, sums[kMostSize / kTileKeys] = {};
  for (int tile = first / kTileKeys * kTileKeys; tile <= position; tile += kTileKeys) {
    const int key = tile + thread;
    float score = -INFINITY;
    __syncthreads();
    if (key >= first && key <= position) {
      const std::int64_t place = table[key / given.block_size] * 2 * given.kv_heads * plane +
                                 static_cast<std::int64_t>(key % given.block_size) * given.width;
      places[thread] = place;
      score = 0;
      for (int i = 0; i < size; ++i) score = fmaf(query[i], wide(keys[place + i]), score);
      score = edited_score(given, score, slope, key - position);
    }
    const float next = fmaxf(largest, block_reduce(score, room, [](float a, float b) { return fmaxf(a, b); }));
    const float weight = score == -INFINITY ? 0 : expf(score - next);
    weights[thread] = weight;
    const float kept = largest == -INFINITY ? 0 : expf(largest - next);
    total = total * kept + block_sum(weight, room);
    largest = next;
    const int begin = max(first - tile, 0), end = min(position - tile + 1, kTileKeys);
#pragma unroll
    for (int part = 0; part < kMostSize / kTileKeys; ++part) {
      const int i = part * kTileKeys + thread;
      if (i >= size) continue;
      float sum = sums[part] * kept;
      for (int j = begin; j < end; ++j) sum = fmaf(weights[j], wide(values[places[j] + i]), sum);
      sums[part] = sum;
    }
  }
#pragma unroll
  for (int part = 0; part < kMostSize / kTileKeys; ++part)
    if (const int i = part * kTileKeys + thread; i < size) out[i] = narrow<T>(sums[part] / total);
}

void attend_in_order(const Runtime& runtime, const Attention& attention) {
  const dim3 grid(static_cast<unsigned>(attention.num_tokens), static_cast<unsigned>(attention.heads));
  with_float(attention.dtype, [&](auto* q) {
    with_float(attention.kv_dtype, [&](auto* kv) {
      launch(runtime, in_order_kernel<Pointee<decltype(q)>, Pointee<decltype(kv)>>, grid, kTileKeys, 0, attention);
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
  const Tensor pool = kv.layer(layer);
  const Attention attention{q.data,
                            pool.data,
                            out.data,
                            batch.view,
                            edits.alibi ? static_cast<const float*>(edits.alibi->data) : nullptr,
                            edits.soft_cap,
                            scale,
                            window,
                            heads,
                            kv.kv_heads,
                            kv.head_dim,
                            kv.width,
                            kv.block_size,
                            kv.num_blocks,
                            batch.num_tokens,
                            batch.num_rows,
                            batch.num_items,
                            batch.num_shares,
                            {batch.num_tiles[0], batch.num_tiles[1], batch.num_tiles[2]},
                            q.dtype,
                            kv.dtype};
  if (!takes_tensor_cores(runtime, attention)) {
    attend_in_order(runtime, attention);
  } else {
    if (attention.num_items > 0) attend_decoding(runtime, attention);
    if (attention.num_tiles[0] > 0)
      takes_hopper(runtime, attention) ? attend_prefilling_hopper(runtime, attention)
                                       : attend_prefilling(runtime, attention);
  }
  return out;
}

}  // namespace vllmlite::cuda
