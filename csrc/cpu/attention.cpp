// The key/value cache, and attention over it.
#include <algorithm>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

void check_batch(const KVCache& kv, int layer, const Batch& batch, const Tensor& tensor, const char* what) {
  if (layer < 0 || layer >= kv.layers) throw std::out_of_range("the cache has no layer " + std::to_string(layer));
  batch.slots->check_pool(kv.num_blocks);
  if (batch.block_size != kv.block_size)
    throw std::invalid_argument("the batch is for caches of blocks of " + std::to_string(batch.block_size) +
                                " tokens, and this one's hold " + std::to_string(kv.block_size));
  if (tensor.shape.empty() || tensor.shape[0] != batch.num_tokens)
    throw std::invalid_argument(std::string(what) + " must have a row for each of " + std::to_string(batch.num_tokens) +
                                " tokens, not shape " + describe(tensor.shape));
}

void check_heads(const Tensor& tensor, std::int64_t heads, const char* what) {
  if (tensor.dtype != DType::float32 || tensor.size() != heads)
    throw std::invalid_argument(std::string(what) + ": a float32 for each of " + std::to_string(heads) +
                                " heads is needed, not " + describe(tensor));
}

// Writes a token's keys and values of one head.
struct Writer {
  const Kernels& kernels;
  const KVCache& kv;
  std::pair<float, float> scales;  // of keys and values; 0: a head's own
  std::size_t item = item_size(kv.dtype());
  int padded = padded_head(kv.head_dim);

  void keys(const float* x, std::byte* head, int at, std::byte* scratch) const {
    const auto block = static_cast<std::size_t>(kv.block_size), offset = static_cast<std::size_t>(at);
    pack(x, head, at, scales.first, scratch);
    for (std::size_t unit = 0; unit < static_cast<std::size_t>(padded) * item / 4; ++unit)
      std::memcpy(head + (unit * block + offset) * 4, scratch + unit * 4, 4);
  }

  void values(const float* x, std::byte* head, int at) const {
    pack(x, head, at, scales.second, head + static_cast<std::size_t>(at) * static_cast<std::size_t>(padded) * item);
  }

 private:
  // Puts the elements at `to`, with zeros behind them, and the head's own scale, if any, into its place in the block.
  void pack(const float* x, std::byte* head, int at, float scale, std::byte* to) const {
    if (kv.quantized()) {
      scale = kernels.quantize_head[kv.byte_format()](x, reinterpret_cast<std::int8_t*>(to), kv.head_dim, scale);
      if (kv.head_scales)
        std::memcpy(head + kv.scales_at() + static_cast<std::size_t>(at) * sizeof scale, &scale, sizeof scale);
    } else {
      kernels.convert(x, Float::f32, to, float_of(kv.dtype()), kv.head_dim);
    }
    std::memset(to + static_cast<std::size_t>(kv.head_dim) * item, 0,
                static_cast<std::size_t>(padded - kv.head_dim) * item);
  }
};

}  // namespace

KVCache::KVCache(const CacheSpec& spec, std::int64_t blocks) : CacheSpec(spec), num_blocks(blocks) {
  memory = allocate({num_blocks, layers, static_cast<std::int64_t>(block_bytes())}, DType::uint8);
}

std::size_t KVCache::scales_at() const {
  return static_cast<std::size_t>(block_size) * static_cast<std::size_t>(padded_head(head_dim)) * item_size(dtype());
}

std::size_t KVCache::head_bytes() const {
  return scales_at() + (head_scales ? static_cast<std::size_t>(block_size) * sizeof(float) : 0);
}

std::size_t KVCache::block_bytes() const { return 2 * static_cast<std::size_t>(kv_heads) * head_bytes(); }

void copy_blocks(Runtime& runtime, const std::shared_ptr<KVCache>& source, std::vector<std::int32_t> sources,
                 const std::shared_ptr<KVCache>& target, std::vector<std::int32_t> targets) {
  source->check_same_form(*target);
  check_copies(sources, source->num_blocks, targets, target->num_blocks, source == target);
  runtime.issue([source, target, sources = std::move(sources), targets = std::move(targets)](Worker& worker) {
    const std::size_t bytes = source->stride();
    for (std::int64_t task; (task = worker.take()) < static_cast<std::int64_t>(sources.size());) {
      const auto i = static_cast<std::size_t>(task);
      std::memcpy(target->layer(0) + static_cast<std::size_t>(targets[i]) * bytes,
                  source->layer(0) + static_cast<std::size_t>(sources[i]) * bytes, bytes);
    }
  });
}

void KVCache::copy(std::span<const std::int32_t> blocks, std::span<const std::int32_t> places,
                   std::span<std::byte> host, bool to_host) const {
  const auto num_places = static_cast<std::int64_t>(host.size() / stride());
  if (to_host)
    check_copies(blocks, num_blocks, places, num_places, false);
  else
    check_copies(places, num_places, blocks, num_blocks, false);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    std::byte* block = static_cast<std::byte*>(memory.data) + static_cast<std::size_t>(blocks[i]) * stride();
    std::byte* row = host.data() + static_cast<std::size_t>(places[i]) * stride();
    std::memcpy(to_host ? row : block, to_host ? block : row, stride());
  }
}

namespace {

// The norm of the heads of q, or of k, before they are rotated.
struct HeadNorm {
  HeadRow row;
  LayerNormRow layer;  // of the first head; without a weight: none
  std::ptrdiff_t layer_bytes;
};

HeadNorm head_norm(Runtime& runtime, const HeadRow& head, const std::optional<Tensor>& weight, int heads) {
  HeadNorm norm{head, {}, 0};
  if (!weight) return norm;
  const bool each = weight->shape == std::vector<std::int64_t>{heads, head.size};
  if (!each && weight->shape != std::vector<std::int64_t>{head.size} &&
      weight->shape != std::vector<std::int64_t>{static_cast<std::int64_t>(heads) * head.size})
    throw std::invalid_argument("a norm must have " + std::to_string(head.size) + " weights, or as many for each of " +
                                std::to_string(heads) + " heads, not " + describe(*weight));
  const Float type = float_of(weight->dtype);
  runtime.keep(*weight);
  if (each) {
    norm.layer.weight = weight->data;
    norm.layer.weight_type = type;
    norm.layer.out_type = Float::f32;
    norm.layer.size = head.size;
    norm.layer.eps = head.eps;
    norm.layer_bytes = head.size * static_cast<std::ptrdiff_t>(item_size(weight->dtype));
  } else {
    norm.row.size = static_cast<int>(weight->size());
    norm.row.weight = weight->data;
    norm.row.weight_type = type;
  }
  return norm;
}

}  // namespace

Tensor attn_prep(Runtime& runtime, const Tensor& given, int num_heads, const std::optional<Rotation>& rope,
                 const std::shared_ptr<KVCache>& kv, int layer, const std::shared_ptr<Batch>& batch,
                 const AttentionNorms& norms) {
  check_batch(*kv, layer, *batch, given, "qkv");
  const int size = kv->head_dim, width = (num_heads + 2 * kv->kv_heads) * size;
  if (given.shape.size() != 2 || given.shape[1] != width)
    throw std::invalid_argument("qkv must be [tokens, " + std::to_string(width) + "], not " + describe(given.shape));
  if (rope) rope->check(size, *batch->slots);
  const Tensor qkv = converted(runtime, given, DType::float32);
  const Tensor q = runtime.make({batch->num_tokens, num_heads, size}, DType::float32);
  HeadRow head{};
  head.size = size;
  head.eps = norms.eps;
  if (rope) {
    head.rotary_dim = rope->rotary_dim;
    head.interleaved = rope->interleaved;
    head.cos_sin = static_cast<const float*>(rope->cos_sin.data);
    runtime.keep(rope->cos_sin);
  }
  const HeadNorm query = head_norm(runtime, head, norms.q, num_heads),
                 key = head_norm(runtime, head, norms.k, kv->kv_heads);
  runtime.keep(qkv);
  const std::size_t keys = static_cast<std::size_t>(kv->kv_heads * size) * sizeof(float);
  runtime.reserve_scratch(keys + static_cast<std::size_t>(padded_head(size)) * sizeof(float));
  runtime.issue([&kernels = runtime.kernels(), query, key, keys, num_heads, size, width, kv, layer, batch,
                 from = static_cast<const float*>(qkv.data), to = static_cast<float*>(q.data)](Worker& worker) {
    const Writer writer{kernels, *kv, kv->head_scales ? std::pair{0.0F, 0.0F} : kv->layer_scales(layer)};
    std::byte* const pool = kv->layer(layer);
    auto* const copy = reinterpret_cast<float*>(worker.scratch());
    std::byte* const packed = worker.scratch() + keys;
    for (std::int64_t token; (token = worker.take()) < batch->num_tokens;) {
      const auto index = static_cast<std::size_t>(token);
      const int position = batch->positions[index];
      // Norms over all heads together and layer norms are applied first; the rest is done for each head separately.
      const auto prepare = [&](const HeadNorm& norm, float* x, int heads) {
        HeadRow row = norm.row;
        for (int h = 0; norm.layer.weight != nullptr && h < heads; ++h) {
          LayerNormRow one = norm.layer;
          one.x = x + h * size;
          one.out = x + h * size;
          one.weight = static_cast<const std::byte*>(one.weight) + h * norm.layer_bytes;
          kernels.layer_norm(one);
        }
        if (row.size != size) {
          HeadRow whole = row;
          whole.x = x;
          whole.cos_sin = nullptr;
          kernels.prepare_head(whole);
          row.weight = nullptr;
          row.size = size;
        }
        if (row.cos_sin != nullptr) row.cos_sin += static_cast<std::ptrdiff_t>(position) * row.rotary_dim;
        for (int h = 0; h < heads; ++h) {
          row.x = x + h * size;
          kernels.prepare_head(row);
        }
      };
      const float* x = from + token * width;
      float* q_row = to + token * num_heads * size;
      std::copy_n(x, num_heads * size, q_row);
      prepare(query, q_row, num_heads);
      x += num_heads * size;
      std::copy_n(x, kv->kv_heads * size, copy);
      prepare(key, copy, kv->kv_heads);
      x += kv->kv_heads * size;
      const std::int32_t slot = batch->slot_ids[static_cast<std::size_t>(batch->token_rows[index])];
      const std::int32_t id = batch->slots->table(slot)[position / kv->block_size];
      std::byte* block = pool + static_cast<std::size_t>(id) * kv->stride();
      for (int h = 0; h < kv->kv_heads; ++h, block += kv->head_bytes())
        writer.keys(copy + h * size, block, position % kv->block_size, packed);
      for (int h = 0; h < kv->kv_heads; ++h, block += kv->head_bytes())
        writer.values(x + h * size, block, position % kv->block_size);
    }
  });
  return q;
}

Tensor paged_attention(Runtime& runtime, const Tensor& given, const std::shared_ptr<KVCache>& kv, int layer,
                       const std::shared_ptr<Batch>& batch, const Scores& scores) {
  check_batch(*kv, layer, *batch, given, "q");
  if (given.shape.size() != 3 || given.shape[2] != kv->head_dim || given.shape[1] % kv->kv_heads != 0)
    throw std::invalid_argument("q must be [tokens, heads, head_dim] of the cache's heads, not " + describe(given));
  if (scores.soft_cap < 0) throw std::invalid_argument("a soft cap must be above 0");
  if (scores.alibi) check_heads(*scores.alibi, given.shape[1], "slopes of linear biases");
  if (scores.sinks) check_heads(*scores.sinks, given.shape[1], "attention sinks");
  if (scores.window < 1) throw std::invalid_argument("window must be at least 1");
  const Tensor q = converted(runtime, given, DType::float32);
  const int heads = static_cast<int>(q.shape[1]), size = kv->head_dim, group = heads / kv->kv_heads;
  // Query heads of a key/value head that are too many for a tile are shared out among several.
  const int parts = (group + kAttentionRows - 1) / kAttentionRows, part_heads = (group + parts - 1) / parts;
  const Tensor out = runtime.make({batch->num_tokens, heads * size}, runtime.product_input());
  AttentionTile tile{};
  tile.q = static_cast<const float*>(q.data);
  tile.q_stride = tile.out_stride = heads * size;
  tile.group = group;
  tile.window = scores.window;
  tile.block_stride = static_cast<std::ptrdiff_t>(kv->stride());
  tile.block_size = kv->block_size;
  tile.head_dim = size;
  tile.head_scales = kv->head_scales;
  std::tie(tile.key_scale, tile.value_scale) = kv->layer_scales(layer);
  tile.scale = scores.scale;
  tile.soft_cap = scores.soft_cap;
  if (scores.alibi) {
    tile.slopes = static_cast<const float*>(scores.alibi->data);
    runtime.keep(*scores.alibi);
  }
  if (scores.sinks) {
    tile.sinks = static_cast<const float*>(scores.sinks->data);
    runtime.keep(*scores.sinks);
  }
  tile.out = out.data;
  tile.out_type = float_of(out.dtype);
  runtime.keep(q);
  runtime.reserve_scratch(attention_scratch(size));
  const Kernels& kernels = runtime.kernels();
  const auto kernel = kv->quantized() ? kernels.attention_bytes[kv->byte_format()]
                                      : kernels.attention[static_cast<std::size_t>(float_of(kv->dtype()))];
  runtime.issue([kernel, tile, kv, layer, batch, parts, part_heads, tiles = batch->tiles(kAttentionRows / part_heads),
                 item = item_size(out.dtype)](Worker& worker) {
    const std::int64_t tasks = static_cast<std::int64_t>(tiles.size()) * kv->kv_heads * parts;
    for (std::int64_t task; (task = worker.take()) < tasks;) {
      const QueryTile& queries = tiles[static_cast<std::size_t>(task / parts / kv->kv_heads)];
      const auto head = static_cast<std::size_t>(task / parts % kv->kv_heads);
      const int skipped = static_cast<int>(task % parts) * part_heads;
      const std::ptrdiff_t first = static_cast<std::ptrdiff_t>(head) * tile.group + skipped;
      const std::ptrdiff_t at = queries.first * tile.q_stride + first * tile.head_dim;
      AttentionTile one = tile;
      one.group = std::min(part_heads, tile.group - skipped);
      one.q += at;
      one.out = static_cast<std::byte*>(one.out) + at * static_cast<std::ptrdiff_t>(item);
      if (one.slopes != nullptr) one.slopes += first;
      if (one.sinks != nullptr) one.sinks += first;
      one.queries = queries.count;
      one.position = batch->positions[static_cast<std::size_t>(queries.first)];
      one.table = batch->slots->table(batch->slot_ids[static_cast<std::size_t>(queries.row)]);
      one.keys = kv->layer(layer) + head * kv->head_bytes();
      one.values = one.keys + static_cast<std::size_t>(kv->kv_heads) * kv->head_bytes();
      one.scratch = worker.scratch();
      kernel(one);
    }
  });
  return out;
}

}  // namespace vllmlite::cpu
