// A step's input on the device, and the per-slot state that is kept between steps.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "contract/data.hpp"
#include "cuda/runtime.hpp"

namespace vllmlite::cuda {

// SlotParams as kernels read them.
struct SlotState {
  double top_p;
  std::uint64_t seed;
  std::int32_t* counts;     // how often each id was generated; null without penalties
  std::uint8_t* in_prompt;  // whether the prompt has it
  const std::int32_t* bias_ids;
  const float* biases;
  float temperature, log_min_p, repetition_penalty, presence_penalty, frequency_penalty;
  std::int32_t top_k, bias_count;
};

// The parts of sampling that a slot's parameters require; the host chooses kernels by them.
enum Needs : unsigned { kDrawing = 1, kEditing = 2 };

struct Slots : SlotSpec {
  Slots(Runtime& runtime, const SlotSpec& spec);

  void set(int slot, const SlotParams& params);
  // Takes effect with the next upload, which carries it.
  void append_blocks(std::span<const std::int32_t> slot_ids, std::span<const std::int32_t> columns,
                     std::span<const std::int32_t> blocks);

  Runtime& runtime;
  Tensor block_table;                  // int32 [max_slots, max_blocks]
  Tensor last_id;                      // int32 [max_slots]
  Tensor states;                       // SlotState [max_slots]
  std::vector<unsigned> needs;         // by slot, bits of Needs
  std::vector<std::int32_t> appended;  // place in block_table, block, place, block, ...

 private:
  std::vector<std::vector<Tensor>> owned_;  // by slot, the tensors that its state points to
};

// Split-KV work item: the `queries` last positions of a row of `context` tokens attend to keys `begin` up to `end`. The
// queries are tokens `token` and those after it. A row whose context is split has `count` items, whose partial results
// are `first` up to `first + count` of the step's; this item's is `partial`. Keys below `settled` were written by
// earlier steps.
struct WorkItem {
  std::int32_t row, begin, end, token, queries, slot, context, settled, first, count, partial;
};

// Shape of the grid of the decoding kernel: warps of a thread block, and thread blocks of a multiprocessor.
struct DecodingBlocks {
  int warps, per_processor;
};
DecodingBlocks decoding_blocks(const Runtime& runtime, int rows, int queries, int kv_heads);

constexpr int kDecodingQueries = 9;  // tokens of a row up to which the decoding kernel takes it

// Queries of a row that attend together: tokens `first` up to `first + count` of the step. Row -1: nothing to do.
struct Tile {
  std::int32_t row, first, count, unused;
};

constexpr int kTileQueries[] = {128, 64, 192};  // by list of tiles, what a tile holds at most
constexpr int kTileLists = 3;

constexpr int kChunkTokens = 4;

// Tokens that have the same adapter; those beyond `count` are the last one again.
struct AdapterChunk {
  std::int32_t adapter, count, tokens[kChunkTokens];
  std::int32_t chunks, unused;  // in the first one, how many chunks the step has; those after them are padding
};

// A batch as kernels read it. A padding row has slot -1, context 0 and no cache slots. The arrays that sampling reads
// (sample_slots, sample_positions, first_sampled and masks) have no padding.
struct BatchView {
  std::int32_t *token_ids, *positions, *token_slots, *query_start_loc, *slot_ids, *context_lens, *logits_rows,
      *sample_slots, *first_sampled, *mask_places, *mask_bits, *cache_slots;
  std::int64_t* sample_positions;
  WorkItem* work_items;
  std::int32_t* work_lists;  // [num_work_lists + 1]: where the work items of a thread block begin
  Tile* tiles[kTileLists];
  const std::int32_t* block_table;
  std::int32_t* last_id;
  SlotState* states;
  int max_blocks;
};

// Sizes that decide the layout of a batch's memory.
struct BatchShape {
  int rows;        // of the graph that the batch is for, or 0
  int query_len;   // tokens of each row of that graph
  int block_size;  // of the cache
  int kv_heads;
  bool adapted;  // whether rows of that graph may have adapters

  bool operator==(const BatchShape&) const = default;
};

struct Batch {
  int num_tokens, num_rows, num_samples, num_tiles[kTileLists];
  int num_work_items, num_work_lists;
  int num_queries;  // most queries of a work item
  unsigned needs;   // bits of Needs, of any of the sampled slots
  int num_logprobs;
  BatchShape shape;
  std::shared_ptr<Slots> slots;
  Tensor memory;
  std::size_t bytes;  // of `memory`, what a graph reads and takes over of another batch
  BatchView view;
  const AdapterChunk* chunks;
  int num_chunks;

  Tensor part(std::int32_t* data, std::int64_t size) const;
};

// Copies a step's input to the device, by one copy of pinned memory and one kernel, which fills in last sampled ids and
// cache slots and appends blocks to block tables. A batch for a graph is padded to the graph's number of rows; each row
// has `query_len` tokens, all of which are sampled from.
std::shared_ptr<Batch> upload(Runtime& runtime, const HostBatch& host, const std::shared_ptr<Slots>& slots,
                              const BatchShape& shape);

// Returns a batch that consists of padding, with which a graph is recorded.
std::shared_ptr<Batch> padding(Runtime& runtime, const std::shared_ptr<Slots>& slots, const BatchShape& shape);

// Copies the contents of `source` to `target`, which has the same shape.
void take_over(Runtime& runtime, Batch& target, const Batch& source);

}  // namespace vllmlite::cuda
