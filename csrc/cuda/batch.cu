#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cuda/batch.hpp"
#include "cuda/kernel.cuh"

namespace vllmlite::cuda {

constexpr int kKeysOfUnit = 64;   // keys that a block of the decoding kernel takes at a time
constexpr int kUnitsOfItem = 4;   // that are not worth cutting
constexpr int kUnitsOfStart = 1;  // that take as long as an item's start and end
constexpr unsigned kThreads = 1024;
constexpr std::size_t kCountersOfSlot = 256;  // key/value heads that a slot's attention may have

[[noreturn]] static void complain(const std::string& what, std::int64_t value, std::int64_t limit) {
  throw std::out_of_range(what + " " + std::to_string(value) + " is not within 0 and " + std::to_string(limit - 1));
}

static void check_all(const char* what, const std::vector<std::int32_t>& values, std::int64_t limit,
                      std::int32_t least = 0) {
  for (const std::int32_t value : values)
    if (value < least || value >= limit) complain(what, value, limit);
}

// ---- Slots

Slots::Slots(Runtime& the_runtime, int slot_count, int block_count, int vocabulary, int pool)
    : runtime(the_runtime), max_slots(slot_count), max_blocks(block_count), vocab_size(vocabulary), num_blocks(pool) {
  block_table = runtime.make({max_slots, max_blocks}, DType::int32);
  last_id = runtime.make({max_slots}, DType::int32);
  states = runtime.make({max_slots, static_cast<std::int64_t>(sizeof(SlotState))}, DType::uint8);
  owned_.resize(static_cast<std::size_t>(max_slots));
  const DeviceGuard guard(runtime.device());
  (void)runtime.counters(static_cast<std::size_t>(max_slots) * kCountersOfSlot);  // before any graph wants them
  for (const Tensor* tensor : {&block_table, &last_id, &states})
    if (tensor->data != nullptr)
      VLLMLITE_CUDA_CHECK(cudaMemsetAsync, tensor->data, 0, tensor->bytes(), runtime.stream());
}

void Slots::check(int slot) const {
  if (slot < 0 || slot >= max_slots) complain("slot", slot, max_slots);
}

static __global__ void count_ids_kernel(const std::int32_t* ids, int size, std::int32_t* counts) {
  wait_for_previous();
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < size;
       i += static_cast<int>(gridDim.x * blockDim.x))
    atomicAdd(counts + ids[i], 1);
}

static __global__ void mark_ids_kernel(const std::int32_t* ids, int size, std::uint8_t* marks) {
  wait_for_previous();
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < size;
       i += static_cast<int>(gridDim.x * blockDim.x))
    marks[ids[i]] = 1;
}

template <typename Element>
static Tensor uploaded(Runtime& runtime, const std::vector<Element>& values, DType dtype) {
  Tensor tensor = runtime.make({static_cast<std::int64_t>(values.size())}, dtype);
  runtime.upload(tensor.data, values.data(), tensor.bytes());
  return tensor;
}

void Slots::set(int slot, const SlotParams& params, const std::vector<std::int32_t>& prompt_ids,
                const std::vector<std::int32_t>& output_ids) {
  check(slot);
  check_all("prompt id", prompt_ids, vocab_size);
  check_all("output id", output_ids, vocab_size);
  for (const auto& [id, bias] : params.logit_bias)
    if (id < 0 || id >= vocab_size) complain("logit_bias id", id, vocab_size);
  const DeviceGuard guard(runtime.device());
  std::vector<Tensor> owned;
  SlotState state{};
  state.top_p = params.top_p;
  state.seed = params.seed;
  state.temperature = params.temperature;
  state.log_min_p = static_cast<float>(std::log(params.min_p));
  state.repetition_penalty = params.repetition_penalty;
  state.presence_penalty = params.presence_penalty;
  state.frequency_penalty = params.frequency_penalty;
  state.top_k = params.top_k;
  if (params.penalised()) {
    owned.push_back(runtime.make({vocab_size}, DType::int32));
    owned.push_back(runtime.make({vocab_size}, DType::uint8));
    for (const Tensor& tensor : owned)
      VLLMLITE_CUDA_CHECK(cudaMemsetAsync, tensor.data, 0, tensor.bytes(), runtime.stream());
    state.counts = static_cast<std::int32_t*>(owned[0].data);
    state.in_prompt = static_cast<std::uint8_t*>(owned[1].data);
    if (!output_ids.empty()) {
      const Tensor ids = uploaded(runtime, output_ids, DType::int32);
      launch(runtime, count_ids_kernel, blocks_for(ids.size(), 256), 256, 0, static_cast<const std::int32_t*>(ids.data),
             static_cast<int>(ids.size()), state.counts);
    }
    if (!prompt_ids.empty()) {
      const Tensor ids = uploaded(runtime, prompt_ids, DType::int32);
      launch(runtime, mark_ids_kernel, blocks_for(ids.size(), 256), 256, 0, static_cast<const std::int32_t*>(ids.data),
             static_cast<int>(ids.size()), state.in_prompt);
    }
  }
  if (!params.logit_bias.empty()) {
    std::vector<std::int32_t> ids;
    std::vector<float> biases;
    for (const auto& [id, bias] : params.logit_bias) {
      ids.push_back(id);
      biases.push_back(bias);
    }
    owned.push_back(uploaded(runtime, ids, DType::int32));
    state.bias_ids = static_cast<const std::int32_t*>(owned.back().data);
    owned.push_back(uploaded(runtime, biases, DType::float32));
    state.biases = static_cast<const float*>(owned.back().data);
    state.bias_count = static_cast<std::int32_t>(ids.size());
  }
  runtime.upload(static_cast<SlotState*>(states.data) + slot, &state, sizeof state);
  owned_[static_cast<std::size_t>(slot)] = std::move(owned);
}

void Slots::append_blocks(std::span<const std::int32_t> slot_ids, std::span<const std::int32_t> columns,
                          std::span<const std::int32_t> blocks) {
  if (slot_ids.size() != columns.size() || columns.size() != blocks.size())
    throw std::invalid_argument("append_blocks: slots, columns and blocks differ in length");
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    check(slot_ids[i]);
    if (columns[i] < 0 || columns[i] >= max_blocks) complain("block table column", columns[i], max_blocks);
    if (blocks[i] < 0 || blocks[i] >= num_blocks) complain("block", blocks[i], num_blocks);
  }
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    appended.push_back(slot_ids[i] * max_blocks + columns[i]);
    appended.push_back(blocks[i]);
  }
}

// ---- Batches

void HostBatch::check(const Slots& slots) const {
  const auto rows = static_cast<std::size_t>(num_rows), tokens = static_cast<std::size_t>(num_tokens);
  if (token_ids.size() != tokens || positions.size() != tokens || query_start_loc.size() != rows + 1 ||
      slot_ids.size() != rows || context_lens.size() != rows || sample_slots.size() != logits_rows.size() ||
      sample_positions.size() != logits_rows.size())
    throw std::invalid_argument("batch: arrays do not fit num_tokens and num_rows");
  check_all("token id", token_ids, slots.vocab_size, -1);
  check_all("slot", slot_ids, slots.max_slots);
  check_all("sampled slot", sample_slots, slots.max_slots);
  check_all("sampled token", logits_rows, num_tokens);
  check_all("mask row", mask_rows, static_cast<std::int64_t>(logits_rows.size()));
  const std::size_t words = (static_cast<std::size_t>(slots.vocab_size) + 31) / 32;
  if (bitmask.size() != mask_rows.size() * words) throw std::invalid_argument("batch: bitmask is not [rows, V / 32]");
  if (query_start_loc[0] != 0 || query_start_loc[rows] != num_tokens)
    throw std::invalid_argument("batch: query_start_loc does not run from 0 to num_tokens");
  for (std::size_t row = 0; row < rows; ++row)
    if (query_start_loc[row + 1] < query_start_loc[row])
      throw std::invalid_argument("batch: query_start_loc does not ascend");
}

bool HostBatch::decodes() const {
  if (num_tokens != num_rows || logits_rows.size() != static_cast<std::size_t>(num_rows)) return false;
  for (int row = 0; row < num_rows; ++row)
    if (query_start_loc[static_cast<std::size_t>(row)] != row || logits_rows[static_cast<std::size_t>(row)] != row)
      return false;
  return true;
}

Tensor Batch::part(std::int32_t* data, std::int64_t size) const {
  Tensor tensor = memory;
  tensor.dtype = DType::int32;
  tensor.shape = {size};
  tensor.data = data;
  return tensor;
}

namespace {

// Parts of a batch's memory, first those that the host fills.
class Layout {
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

}  // namespace

// One block, so that what was appended is there before it is looked up.
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

DecodingBlocks decoding_blocks(const Runtime& runtime, int rows, int kv_heads) {
  return rows * kv_heads > 8 * runtime.multiprocessors() ? DecodingBlocks{2, 5} : DecodingBlocks{4, 2};
}

static std::int64_t units_of(std::int64_t context) { return (context + kKeysOfUnit - 1) / kKeysOfUnit; }

static bool has_one_token(const HostBatch& host, std::size_t row) {
  return host.query_start_loc[row + 1] - host.query_start_loc[row] == 1;
}

// Cuts the rows that have one token into shares that take about as long, one for each of `shares` slots: a share is
// some items, `starts` says where each one's begin.
static void plan_items(const HostBatch& host, int shares, std::vector<Item>& items, std::vector<std::int32_t>& starts) {
  std::int64_t total = 0;
  for (std::size_t row = 0; row < host.slot_ids.size(); ++row)
    if (has_one_token(host, row)) total += units_of(host.context_lens[row]) + kUnitsOfStart;
  // Every cut makes another start.
  const std::int64_t quota = std::max<std::int64_t>((total + shares - 1) / shares + kUnitsOfStart, kUnitsOfItem);
  std::int64_t left = quota;
  starts.push_back(0);
  for (std::size_t row = 0; row < host.slot_ids.size(); ++row) {
    if (!has_one_token(host, row)) continue;
    const std::int32_t context = host.context_lens[row], token = host.query_start_loc[row];
    // A row that goes on from a sampled id has been here before; another may see keys that this very step writes.
    const bool goes_on = host.token_ids[static_cast<std::size_t>(token)] < 0;
    const auto first = static_cast<std::int32_t>(items.size());
    for (std::int32_t begin = 0; begin < context;) {
      const std::int64_t units = units_of(context - begin) + kUnitsOfStart;
      // A rest that is not worth an item of its own stays.
      const bool whole = units <= left + kUnitsOfStart || static_cast<int>(starts.size()) == shares;
      const std::int64_t taken = whole ? units : std::max<std::int64_t>(left, kUnitsOfStart + 1);
      const std::int32_t end = whole ? context : begin + static_cast<std::int32_t>(taken - kUnitsOfStart) * kKeysOfUnit;
      items.push_back({static_cast<std::int32_t>(row), begin, end, first, 0, token, host.slot_ids[row], context,
                       goes_on ? context - 1 : 0});
      begin = end;
      left -= taken;
      if (left <= kUnitsOfStart && static_cast<int>(starts.size()) < shares) {
        starts.push_back(static_cast<std::int32_t>(items.size()));
        left += quota;
      }
    }
    for (std::size_t i = static_cast<std::size_t>(first); i < items.size(); ++i)
      items[i].count = static_cast<std::int32_t>(items.size()) - first;
  }
  starts.resize(static_cast<std::size_t>(shares) + 1, static_cast<std::int32_t>(items.size()));
}

// Tiles of rows of several tokens, or of all.
static std::vector<Tile> plan_tiles(const HostBatch& host, int queries, bool all) {
  std::vector<Tile> tiles;
  for (int row = 0; row < host.num_rows; ++row) {
    const std::int32_t begin = host.query_start_loc[static_cast<std::size_t>(row)];
    const std::int32_t end = host.query_start_loc[static_cast<std::size_t>(row) + 1];
    if (end - begin == 1 && !all) continue;
    for (std::int32_t at = begin; at < end; at += queries) tiles.push_back({row, at, std::min(queries, end - at), 0});
  }
  // The longest contexts first, so that no multiprocessor is left alone with one at the end.
  std::ranges::stable_sort(tiles, std::ranges::greater{},
                           [&](const Tile& tile) { return host.positions[static_cast<std::size_t>(tile.first)]; });
  return tiles;
}

std::shared_ptr<Batch> upload(Runtime& runtime, const HostBatch& host, const std::shared_ptr<Slots>& slots,
                              const Cut& cut) {
  host.check(*slots);
  const DeviceGuard guard(runtime.device());
  const auto real_tokens = static_cast<std::size_t>(host.num_tokens);
  const auto real_rows = static_cast<std::size_t>(host.num_rows);
  const std::size_t real_samples = host.logits_rows.size();
  const bool decodes = host.decodes();
  const std::size_t room = decodes ? static_cast<std::size_t>(std::max(cut.capacity, host.num_rows)) : 0;
  const std::size_t tokens = std::max(real_tokens, room), rows = std::max(real_rows, room);
  const std::size_t samples = std::max(real_samples, room);

  const DecodingBlocks blocks = decoding_blocks(runtime, static_cast<int>(rows), cut.kv_heads);
  const int at_once = std::max(runtime.multiprocessors() * blocks.per_processor / std::max(cut.kv_heads, 1), 1);
  std::vector<Item> items;
  std::vector<std::int32_t> starts;
  const bool all_in_tiles = runtime.batch_invariant();
  if (!all_in_tiles) plan_items(host, at_once, items, starts);
  const std::size_t num_items = decodes && !all_in_tiles ? rows + static_cast<std::size_t>(at_once) : items.size();
  std::vector<Tile> tiles[kTileLists];
  for (int list = 0; list < kTileLists; ++list) {
    tiles[list] = plan_tiles(host, kTileQueries[list], all_in_tiles);
    if (decodes && all_in_tiles) tiles[list].resize(rows, Tile{-1, 0, 0, 0});
  }
  const bool masked = !host.mask_rows.empty();

  auto batch = std::make_shared<Batch>();
  batch->num_tokens = host.num_tokens;
  batch->num_rows = host.num_rows;
  batch->num_samples = static_cast<int>(real_samples);
  batch->max_context = host.max_context;
  batch->block_size = cut.block_size;
  batch->num_items = static_cast<int>(num_items);
  batch->num_shares = num_items == 0 ? 0 : at_once;
  batch->features = host.features;
  batch->num_logprobs = host.num_logprobs;
  batch->masked = masked;
  batch->slots = slots;

  Layout layout;
  const std::size_t at_ids = layout.add<std::int32_t>(tokens), at_positions = layout.add<std::int32_t>(tokens),
                    at_token_slots = layout.add<std::int32_t>(tokens), at_loc = layout.add<std::int32_t>(rows + 1),
                    at_slots = layout.add<std::int32_t>(rows), at_context = layout.add<std::int32_t>(rows),
                    at_logits = layout.add<std::int32_t>(samples), at_sampled = layout.add<std::int32_t>(samples),
                    at_sample_positions = layout.add<std::int64_t>(samples), at_items = layout.add<Item>(num_items),
                    at_starts = layout.add<std::int32_t>(starts.size()), at_cache = layout.add<std::int32_t>(tokens);
  std::size_t at_tiles[kTileLists];
  for (int list = 0; list < kTileLists; ++list) at_tiles[list] = layout.add<Tile>(tiles[list].size());
  batch->bytes = layout.bytes();
  const std::size_t at_places = layout.add<std::int32_t>(masked ? samples : 0),
                    at_bits = layout.add<std::int32_t>(host.bitmask.size()),
                    at_appended = layout.add<std::int32_t>(slots->appended.size());

  Pinned& staged = runtime.stage(layout.bytes());
  auto* const base = static_cast<char*>(staged.data);
  const auto fill = [&](std::size_t at, const auto& values, std::size_t room_for, auto padding_value) {
    using Element = std::decay_t<decltype(values[0])>;
    auto* to = reinterpret_cast<Element*>(base + at);
    to = std::copy(values.begin(), values.end(), to);
    for (std::size_t i = values.size(); i < room_for; ++i) *to++ = static_cast<Element>(padding_value);
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
  fill(at_sampled, host.sample_slots, samples, -1);
  fill(at_sample_positions, host.sample_positions, samples, 0);
  std::ranges::copy(items, reinterpret_cast<Item*>(base + at_items));
  fill(at_starts, starts, 0, 0);
  for (int list = 0; list < kTileLists; ++list) {
    std::ranges::copy(tiles[list], reinterpret_cast<Tile*>(base + at_tiles[list]));
    batch->num_tiles[list] = static_cast<int>(tiles[list].size());
  }
  if (masked) {
    auto* places = reinterpret_cast<std::int32_t*>(base + at_places);
    std::fill(places, places + samples, -1);
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
  view.sample_positions = reinterpret_cast<std::int64_t*>(data + at_sample_positions);
  view.items = reinterpret_cast<Item*>(data + at_items);
  view.starts = part(at_starts);
  view.cache_slots = part(at_cache);
  for (int list = 0; list < kTileLists; ++list) view.tiles[list] = reinterpret_cast<Tile*>(data + at_tiles[list]);
  view.mask_places = masked ? part(at_places) : nullptr;
  view.mask_bits = part(at_bits);
  view.block_table = static_cast<const std::int32_t*>(slots->block_table.data);
  view.last_id = static_cast<std::int32_t*>(slots->last_id.data);
  view.states = static_cast<SlotState*>(slots->states.data);
  view.max_blocks = slots->max_blocks;

  runtime.send(staged, data, layout.bytes());
  launch(runtime, prepare_kernel, 1, kThreads, 0, view, static_cast<int>(tokens), cut.block_size,
         static_cast<std::int32_t*>(slots->block_table.data), part(at_appended),
         static_cast<int>(slots->appended.size() / 2));
  runtime.fence();
  slots->appended.clear();
  return batch;
}

std::shared_ptr<Batch> padding(Runtime& runtime, unsigned features, int num_logprobs,
                               const std::shared_ptr<Slots>& slots, const Cut& cut) {
  HostBatch none;
  none.features = features;
  none.num_logprobs = num_logprobs;
  none.query_start_loc = {0};
  std::shared_ptr<Batch> batch = upload(runtime, none, slots, cut);
  batch->num_tokens = batch->num_rows = batch->num_samples = cut.capacity;
  return batch;
}

void take_over(Runtime& runtime, Batch& target, const Batch& source) {
  if (&target == &source) return;
  if (target.bytes != source.bytes || target.slots != source.slots)
    throw std::invalid_argument("graph: the batch has other shapes than the recorded one");
  const DeviceGuard guard(runtime.device());
  VLLMLITE_CUDA_CHECK(cudaMemcpyAsync, target.memory.data, source.memory.data, source.bytes, cudaMemcpyDeviceToDevice,
                      runtime.stream());
}

}  // namespace vllmlite::cuda
