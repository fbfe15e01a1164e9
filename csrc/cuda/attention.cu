// The cache, what goes into it, and attention that is exact rather than fast.
#include <algorithm>

#include "cuda/attention.hpp"
#include "cuda/checks.hpp"
#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"

namespace vllmlite::cuda {

constexpr int kMostSize = 256;  // elements of a head

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
  memory = runtime.make({layers, num_blocks, block_elements()}, dtype);
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

// ---- Preparation: a warp a head of a token

constexpr unsigned kPrepWarps = 4;

template <typename T, typename Cached>
static __global__ void prepare_kernel(const T* qkv, T* q, Cached* kv, const float* cos_sin, int rotary_dim,
                                      bool interleaved, const T* q_norm, const T* k_norm, float eps, int heads,
                                      int kv_heads, int size, int width, int block_size, const std::int32_t* positions,
                                      const std::int32_t* cache_slots, unsigned work) {
  __shared__ float room[kPrepWarps][kMostSize];
  let_next_begin();
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto index = blockIdx.x * kPrepWarps + threadIdx.x / 32;
  if (index >= work) return;
  float* values = room[threadIdx.x / 32];
  const auto all = static_cast<unsigned>(heads + 2 * kv_heads);
  const std::int64_t token = index / all;
  const auto head = static_cast<int>(index % all);
  const bool is_q = head < heads, is_v = head >= heads + kv_heads;
  const T* from = qkv + static_cast<std::int64_t>(index) * size;
  for (int i = lane; i < size; i += 32) values[i] = wide(from[i]);
  __syncwarp();
  const T* norm = is_v ? nullptr : is_q ? q_norm : k_norm;
  if (norm != nullptr) {
    float squares = 0;
    for (int i = lane; i < size; i += 32) squares = fmaf(values[i], values[i], squares);
    const float factor = rsqrtf(warp_sum(squares) / static_cast<float>(size) + eps);
    // Rounded as a norm of its own would be.
    for (int i = lane; i < size; i += 32) values[i] = wide(narrow<T>(values[i] * factor * wide(norm[i])));
    __syncwarp();
  }
  const float* turn =
      is_v || cos_sin == nullptr ? nullptr : cos_sin + static_cast<std::int64_t>(positions[token]) * rotary_dim;
  const int half = rotary_dim / 2;
  const auto rotated = [&](int i) {
    if (turn == nullptr || i >= rotary_dim) return values[i];
    const bool second = interleaved ? i % 2 == 1 : i >= half;
    const int pair = interleaved ? i / 2 : second ? i - half : i;
    const float partner = values[interleaved ? i ^ 1 : second ? i - half : i + half];
    const float cosine = turn[pair], sine = turn[half + pair];
    return second ? values[i] * cosine + partner * sine : values[i] * cosine - partner * sine;
  };
  if (is_q) {
    T* to = q + (token * heads + head) * size;
    for (int i = lane; i < size; i += 32) to[i] = narrow<T>(rotated(i));
    return;
  }
  const int slot = cache_slots[token];
  if (slot < 0) return;
  const std::int64_t plane = (is_v ? kv_heads : 0) + (head - heads) % kv_heads;
  Cached* to =
      kv +
      ((static_cast<std::int64_t>(slot / block_size) * 2 * kv_heads + plane) * block_size + slot % block_size) * width;
  // Through the activations' dtype, as q goes.
  for (int i = lane; i < width; i += 32)
    to[i] = i < size ? narrow<Cached>(wide(narrow<T>(rotated(i)))) : narrow<Cached>(0);
}

Tensor attn_prep(Runtime& runtime, const Tensor& qkv, int num_heads, const std::optional<Rotation>& rope,
                 const KVCache& kv, int layer, const Batch& batch, const AttentionNorms& norms) {
  const std::int64_t tokens = batch.num_tokens, all = num_heads + std::int64_t{2} * kv.kv_heads;
  check_shape(qkv, {tokens, all * kv.head_dim}, "qkv of attn_prep");
  check_dtype(qkv, runtime.dtype(), "qkv of attn_prep");
  if (num_heads < 1 || num_heads % kv.kv_heads != 0)
    throw std::invalid_argument("attn_prep: " + std::to_string(num_heads) + " query heads do not share " +
                                std::to_string(kv.kv_heads) + " key/value heads evenly");
  for (const std::optional<Tensor>* norm : {&norms.q, &norms.k})
    if (*norm) {
      check_shape(**norm, {kv.head_dim}, "a norm of attn_prep");
      check_dtype(**norm, qkv.dtype, "a norm of attn_prep");
    }
  if (rope) {
    check_dtype(rope->cos_sin, DType::float32, "the rotation of attn_prep");
    check_rank(rope->cos_sin, 2, "the rotation of attn_prep");
    if (rope->cos_sin.shape[1] != rope->rotary_dim || rope->rotary_dim % 2 != 0 || rope->rotary_dim > kv.head_dim ||
        rope->cos_sin.shape[0] < batch.max_context)
      throw std::invalid_argument("attn_prep: a rotation " + describe(rope->cos_sin.shape) + " does not fit");
  }
  const DeviceGuard guard(runtime.device());
  Tensor q = runtime.make({tokens, num_heads, kv.head_dim}, qkv.dtype);
  const Tensor pool = kv.layer(layer);
  with_float(qkv.dtype, [&](auto* from) {
    with_float(kv.dtype, [&](auto* to) {
      using T = Pointee<decltype(from)>;
      using Cached = Pointee<decltype(to)>;
      const auto norm = [](const std::optional<Tensor>& weight) {
        return weight ? static_cast<const T*>(weight->data) : nullptr;
      };
      launch(runtime, prepare_kernel<T, Cached>, blocks_for(tokens * all, kPrepWarps), kPrepWarps * 32, 0,
             static_cast<const T*>(qkv.data), static_cast<T*>(q.data), static_cast<Cached*>(pool.data),
             rope ? static_cast<const float*>(rope->cos_sin.data) : nullptr, rope ? rope->rotary_dim : 0,
             rope && rope->interleaved, norm(norms.q), norm(norms.k), norms.eps, num_heads, kv.kv_heads, kv.head_dim,
             kv.width, kv.block_size, batch.view.positions, batch.view.cache_slots,
             static_cast<unsigned>(tokens * all));
    });
  });
  return q;
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
  for (int i = thread; i < size; i += kTileKeys) query[i] = wide(static_cast<const T*>(given.q)[at + i]) * given.scale;
  const int position = given.batch.positions[token];
  const int first = given.window > position ? 0 : position - given.window + 1;
  const int kv_head = head / (given.heads / given.kv_heads);
  const std::int64_t plane = static_cast<std::int64_t>(given.block_size) * given.width;
  const std::int32_t* table = given.batch.block_table + static_cast<std::int64_t>(slot) * given.batch.max_blocks;
  const auto* keys = static_cast<const Cached*>(given.kv) + kv_head * plane;
  const Cached* values = keys + given.kv_heads * plane;
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
                       int window) {
  check_rank(q, 3, "q of paged_attention");
  check_shape(q, {batch.num_tokens, q.shape[1], kv.head_dim}, "q of paged_attention");
  check_dtype(q, runtime.dtype(), "q of paged_attention");
  const auto heads = static_cast<int>(q.shape[1]);
  if (heads < 1 || heads % kv.kv_heads != 0)
    throw std::invalid_argument("paged_attention: " + std::to_string(heads) + " query heads do not share " +
                                std::to_string(kv.kv_heads) + " key/value heads evenly");
  if (kv.block_size != batch.block_size)
    throw std::invalid_argument("paged_attention: the batch was uploaded for blocks of " +
                                std::to_string(batch.block_size) + ", the cache has " + std::to_string(kv.block_size));
  if (window < 1) throw std::invalid_argument("paged_attention: a window of " + std::to_string(window));
  const DeviceGuard guard(runtime.device());
  Tensor out = runtime.make({q.shape[0], q.shape[1] * q.shape[2]}, q.dtype);
  const Tensor pool = kv.layer(layer);
  const Attention attention{q.data,         pool.data,       out.data,
                            batch.view,     scale,           window,
                            heads,          kv.kv_heads,     kv.head_dim,
                            kv.width,       kv.block_size,   batch.num_tokens,
                            batch.num_rows, batch.num_items, {batch.num_tiles[0], batch.num_tiles[1]},
                            q.dtype,        kv.dtype};
  if (!takes_tensor_cores(runtime, attention)) {
    attend_in_order(runtime, attention);
  } else {
    if (attention.num_items > 0) attend_decoding(runtime, attention);
    if (attention.num_tiles[0] > 0) attend_prefilling(runtime, attention);
  }
  return out;
}

}  // namespace vllmlite::cuda
