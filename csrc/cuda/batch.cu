#include <algorithm>

#include "cuda/attention_plan.hpp"
#include "cuda/batch.hpp"
#include "cuda/kernel.cuh"

namespace vllmlite::cuda {

constexpr unsigned kThreads = 1024;

// Checks that a batch fits a graph: rows of at most `query_len` tokens, all of which are sampled from.
static void check_graph(const HostBatch& host, const BatchShape& shape) {
  if (shape.query_len < 1 || shape.query_len > kDecodingQueries)
    throw std::invalid_argument("graph: rows of " + std::to_string(shape.query_len) + " tokens; 1 to " +
                                std::to_string(kDecodingQueries) + " are possible");
  bool fits = host.num_rows <= shape.rows && host.logits_rows.size() == host.token_ids.size();
  for (std::size_t row = 0; fits && row < host.slot_ids.size(); ++row)
    fits = host.query_start_loc[row + 1] - host.query_start_loc[row] <= shape.query_len;
  for (std::size_t i = 0; fits && i < host.logits_rows.size(); ++i) fits = host.logits_rows[i] == static_cast<int>(i);
  if (!fits)
    throw std::invalid_argument("graph: the batch is not up to " + std::to_string(shape.rows) + " rows of up to " +
                                std::to_string(shape.query_len) + " tokens, all of them sampled from");
}

Tensor Batch::part(std::int32_t* data, std::int64_t size) const {
  Tensor tensor = memory;
  tensor.dtype = DType::int32;
  tensor.shape = {size};
  tensor.data = data;
  return tensor;
}

// Assigns offsets to the arrays in a batch's memory.
class BatchLayout {
 public:
  template <typename Element>
  std::size_t add(std::size_t count) {
    const std::size_t at = bytes_;
    bytes_ = (at + count * sizeof(Element) + 31) / 32 * 32;
    return at;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

// Writes the appended blocks to the block tables, then fills in each token's last sampled id and cache slot. Grid: one
// block, because the second step reads what the first one writes.
static __global__ void prepare_kernel(BatchView batch, int num_tokens, int block_size, std::int32_t* block_table,
                                      const std::int32_t* appended, int num_appended) {
  wait_for_previous();
  for (int i = static_cast<int>(threadIdx.x); i < num_appended; i += static_cast<int>(blockDim.x))
    block_table[appended[2 * i]] = appended[2 * i + 1];
  __syncthreads();
  for (int token = static_cast<int>(threadIdx.x); token < num_tokens; token += static_cast<int>(blockDim.x)) {
    const int slot = batch.token_slots[token];
    if (slot < 0) {
      batch.token_ids[token] = 0;
      batch.cache_slots[token] = -1;
      continue;
    }
    if (batch.token_ids[token] < 0) batch.token_ids[token] = batch.last_id[slot];
    const int position = batch.positions[token];
    batch.cache_slots[token] =
        block_table[static_cast<std::int64_t>(slot) * batch.max_blocks + position / block_size] * block_size +
        position % block_size;
  }
}

// The tokens that have an adapter, in chunks of one adapter each.
static std::vector<AdapterChunk> plan_chunks(const HostBatch& host) {
  std::vector<std::pair<std::int32_t, std::int32_t>> tokens;  // adapter, token
  for (std::size_t row = 0; row < host.adapters.size(); ++row)
    for (std::int32_t token = host.query_start_loc[row]; token < host.query_start_loc[row + 1]; ++token)
      if (host.adapters[row] != 0) tokens.emplace_back(host.adapters[row], token);
  std::ranges::sort(tokens);
  std::vector<AdapterChunk> chunks;
  for (const auto& [adapter, token] : tokens) {
    if (chunks.empty() || chunks.back().adapter != adapter || chunks.back().count == kChunkTokens)
      chunks.push_back({adapter, 0, {}, 0, 0});
    AdapterChunk& chunk = chunks.back();
    std::fill(chunk.tokens + chunk.count++, std::end(chunk.tokens), token);
  }
  if (!chunks.empty()) chunks.front().chunks = static_cast<std::int32_t>(chunks.size());
  return chunks;
}

std::shared_ptr<Batch> upload(Runtime& runtime, const HostBatch& host, const std::shared_ptr<Slots>& slots,
                              const BatchShape& shape) {
  host.check(*slots, shape.block_size);
  const DeviceGuard guard(runtime.device());
  const bool for_graph = shape.rows > 0;
  if (for_graph) check_graph(host, shape);
  const std::size_t real_samples = host.logits_rows.size(), real_rows = host.slot_ids.size();
  // The sizes with padding, from which nothing is sampled.
  const std::size_t rows = for_graph ? static_cast<std::size_t>(shape.rows) : real_rows;
  const std::size_t tokens =
      for_graph ? rows * static_cast<std::size_t>(shape.query_len) : static_cast<std::size_t>(host.num_tokens);
  const std::size_t samples = for_graph ? tokens : real_samples;

  const bool all_in_tiles = runtime.batch_invariant();
  const int queries = for_graph ? shape.query_len : most_decoding_queries(host);
  const DecodingBlocks blocks = decoding_blocks(runtime, static_cast<int>(rows), queries, shape.kv_heads);
  const int at_once = std::max(runtime.multiprocessors() * blocks.per_processor / std::max(shape.kv_heads, 1), 1);
  DecodingPlan plan;
  if (!all_in_tiles) plan = plan_decoding(host, at_once);
  const std::size_t num_work_items =
      for_graph && !all_in_tiles ? rows + static_cast<std::size_t>(at_once) : plan.items.size();
  std::vector<Tile> tiles[kTileLists];
  for (int list = 0; list < kTileLists; ++list) {
    tiles[list] = plan_tiles(host, kTileQueries[list], all_in_tiles);
    if (for_graph && all_in_tiles) tiles[list].resize(rows, Tile{-1, 0, 0, 0});
  }
  const bool masked = !host.mask_rows.empty();
  std::vector<AdapterChunk> chunks = plan_chunks(host);
  if (for_graph) {
    if (!chunks.empty() && !shape.adapted) throw std::invalid_argument("graph: rows of the batch have adapters");
    chunks.resize(shape.adapted ? tokens : 0);
  }

  auto batch = std::make_shared<Batch>();
  batch->num_tokens = host.num_tokens;
  batch->num_rows = host.num_rows;
  batch->num_samples = static_cast<int>(real_samples);
  batch->num_work_items = static_cast<int>(num_work_items);
  batch->num_work_lists = num_work_items == 0 ? 0 : at_once;
  batch->num_queries = queries;
  batch->num_chunks = static_cast<int>(chunks.size());
  batch->needs = masked ? kEditing : 0U;
  for (const std::int32_t slot : host.sample_slots) batch->needs |= slots->needs[static_cast<std::size_t>(slot)];
  batch->num_logprobs = host.num_logprobs;
  batch->shape = shape;
  batch->slots = slots;

  BatchLayout layout;
  const std::size_t at_ids = layout.add<std::int32_t>(tokens), at_positions = layout.add<std::int32_t>(tokens),
                    at_token_slots = layout.add<std::int32_t>(tokens), at_loc = layout.add<std::int32_t>(rows + 1),
                    at_slots = layout.add<std::int32_t>(rows), at_context = layout.add<std::int32_t>(rows),
                    at_logits = layout.add<std::int32_t>(samples), at_items = layout.add<WorkItem>(num_work_items),
                    at_lists = layout.add<std::int32_t>(plan.lists.size()), at_cache = layout.add<std::int32_t>(tokens);
  std::size_t at_tiles[kTileLists];
  for (int list = 0; list < kTileLists; ++list) at_tiles[list] = layout.add<Tile>(tiles[list].size());
  const std::size_t at_chunks = layout.add<AdapterChunk>(chunks.size());
  batch->bytes = layout.bytes();
  const std::size_t at_sampled = layout.add<std::int32_t>(real_samples),
                    at_first = layout.add<std::int32_t>(real_samples),
                    at_sample_positions = layout.add<std::int64_t>(real_samples),
                    at_places = layout.add<std::int32_t>(masked ? real_samples : 0),
                    at_bits = layout.add<std::int32_t>(host.bitmask.size()),
                    at_appended = layout.add<std::int32_t>(slots->appended.size());

  Pinned& staged = runtime.stage(layout.bytes());
  auto* const base = static_cast<char*>(staged.data);
  const auto fill = [&](std::size_t at, const auto& values, std::size_t count, auto padding_value) {
    using Element = std::decay_t<decltype(values[0])>;
    auto* to = reinterpret_cast<Element*>(base + at);
    to = std::copy(values.begin(), values.end(), to);
    for (std::size_t i = values.size(); i < count; ++i) *to++ = static_cast<Element>(padding_value);
  };
  fill(at_ids, host.token_ids, tokens, 0);
  fill(at_positions, host.positions, tokens, 0);
  auto* token_slots = reinterpret_cast<std::int32_t*>(base + at_token_slots);
  std::fill(token_slots, token_slots + tokens, -1);
  for (std::size_t row = 0; row < real_rows; ++row)
    std::fill(token_slots + host.query_start_loc[row], token_slots + host.query_start_loc[row + 1], host.slot_ids[row]);
  fill(at_loc, host.query_start_loc, rows + 1, host.num_tokens);
  fill(at_slots, host.slot_ids, rows, -1);
  fill(at_context, host.context_lens, rows, 0);
  fill(at_logits, host.logits_rows, samples, 0);
  for (std::size_t i = real_samples; i < samples; ++i)
    reinterpret_cast<std::int32_t*>(base + at_logits)[i] = static_cast<std::int32_t>(i);
  fill(at_sampled, host.sample_slots, 0, 0);
  fill(at_first, host.first_sampled(), 0, 0);
  fill(at_sample_positions, host.sample_positions, 0, 0);
  std::ranges::copy(plan.items, reinterpret_cast<WorkItem*>(base + at_items));
  fill(at_lists, plan.lists, 0, 0);
  for (int list = 0; list < kTileLists; ++list) {
    std::ranges::copy(tiles[list], reinterpret_cast<Tile*>(base + at_tiles[list]));
    batch->num_tiles[list] = static_cast<int>(tiles[list].size());
  }
  std::ranges::copy(chunks, reinterpret_cast<AdapterChunk*>(base + at_chunks));
  if (masked) {
    auto* places = reinterpret_cast<std::int32_t*>(base + at_places);
    std::fill(places, places + real_samples, -1);
    for (std::size_t i = 0; i < host.mask_rows.size(); ++i) places[host.mask_rows[i]] = static_cast<std::int32_t>(i);
    fill(at_bits, host.bitmask, 0, 0);
  }
  fill(at_appended, slots->appended, 0, 0);

  batch->memory = runtime.make({static_cast<std::int64_t>(layout.bytes())}, DType::uint8);
  auto* const data = static_cast<char*>(batch->memory.data);
  const auto part = [&](std::size_t at) { return reinterpret_cast<std::int32_t*>(data + at); };
  BatchView& view = batch->view;
  view.token_ids = part(at_ids);
  view.positions = part(at_positions);
  view.token_slots = part(at_token_slots);
  view.query_start_loc = part(at_loc);
  view.slot_ids = part(at_slots);
  view.context_lens = part(at_context);
  view.logits_rows = part(at_logits);
  view.sample_slots = part(at_sampled);
  view.first_sampled = part(at_first);
  view.sample_positions = reinterpret_cast<std::int64_t*>(data + at_sample_positions);
  view.work_items = reinterpret_cast<WorkItem*>(data + at_items);
  view.work_lists = part(at_lists);
  view.cache_slots = part(at_cache);
  for (int list = 0; list < kTileLists; ++list) view.tiles[list] = reinterpret_cast<Tile*>(data + at_tiles[list]);
  batch->chunks = reinterpret_cast<const AdapterChunk*>(data + at_chunks);
  view.mask_places = masked ? part(at_places) : nullptr;
  view.mask_bits = part(at_bits);
  view.block_table = static_cast<const std::int32_t*>(slots->block_table.data);
  view.last_id = static_cast<std::int32_t*>(slots->last_id.data);
  view.states = static_cast<SlotState*>(slots->states.data);
  view.max_blocks = slots->max_blocks;

  runtime.send(staged, data, layout.bytes());
  launch(runtime, prepare_kernel, 1, kThreads, 0, view, static_cast<int>(tokens), shape.block_size,
         static_cast<std::int32_t*>(slots->block_table.data), part(at_appended),
         static_cast<int>(slots->appended.size() / 2));
  runtime.fence();
  slots->appended.clear();
  return batch;
}

std::shared_ptr<Batch> padding(Runtime& runtime, const std::shared_ptr<Slots>& slots, const BatchShape& shape) {
  HostBatch none;
  none.query_start_loc = {0};
  std::shared_ptr<Batch> batch = upload(runtime, none, slots, shape);
  batch->num_rows = shape.rows;
  batch->num_tokens = batch->num_samples = shape.rows * shape.query_len;
  return batch;
}

// A kernel: between kernels it takes less time than the copy engine does.
static __global__ void take_over_kernel(const uint4* from, uint4* to, std::size_t words) {
  wait_for_previous();
  const std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < words) to[i] = from[i];
}

void take_over(Runtime& runtime, Batch& target, const Batch& source) {
  if (target.bytes != source.bytes || target.shape != source.shape)
    throw std::invalid_argument("graph: the batch has other shapes than the recorded one");
  if (target.slots != source.slots) throw std::invalid_argument("graph: the batch belongs to other slots");
  const DeviceGuard guard(runtime.device());
  constexpr unsigned kCopyThreads = 256;
  const std::size_t words = source.bytes / sizeof(uint4);  // a layout has whole ones
  launch(runtime, take_over_kernel, blocks_for(static_cast<std::int64_t>(words), kCopyThreads), kCopyThreads, 0,
         static_cast<const uint4*>(source.memory.data), static_cast<uint4*>(target.memory.data), words);
}

}  // namespace vllmlite::cuda
