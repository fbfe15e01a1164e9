// A step's input, and the per-slot state that is kept between steps.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "contract/data.hpp"
#include "cpu/runtime.hpp"

namespace vllmlite::cpu {

struct Slots : SlotSpec {
  explicit Slots(const SlotSpec& spec);

  void set(int slot, SlotParams params);
  void append_blocks(std::span<const std::int32_t> slot_ids, std::span<const std::int32_t> columns,
                     std::span<const std::int32_t> blocks);

  const std::int32_t* table(int slot) const {
    return block_table.data() + static_cast<std::ptrdiff_t>(slot) * max_blocks;
  }

  std::vector<std::int32_t> block_table;  // [max_slots, max_blocks], each below num_blocks
  std::vector<std::int32_t> last_id;
  std::vector<SlotParams> params;
  // For each slot, by token id: how often it was generated, and whether the prompt has it. Empty without penalties.
  std::vector<std::vector<std::int32_t>> counts;
  std::vector<std::vector<std::uint8_t>> in_prompt;
};

// Consecutive queries of one row, computed together by attention.
struct QueryTile {
  std::int32_t row, first, count;  // tokens `first` up to `first + count` of the step
};

// Consecutive rows with the same adapter, at most kShrinkTokens.
struct AdapterRun {
  std::int32_t first, count;
};

// Runs of one adapter that are computed together.
struct AdapterGroup {
  std::int32_t adapter;
  std::size_t first_run, runs;
  std::size_t expert;  // whose weight they are multiplied with; 0 outside mixtures of experts
};

// Which adapter each row of a tensor has, and the rows grouped by adapter.
struct AdapterRows {
  AdapterRows() = default;
  explicit AdapterRows(std::vector<std::int32_t> of_rows);

  // Groups the rows `first` up to `last`, all of one expert. Rows without an adapter are in no group.
  void group(std::int32_t first, std::int32_t last, std::size_t expert);

  std::span<const AdapterRun> runs_of(const AdapterGroup& group) const {
    return std::span(runs).subspan(group.first_run, group.runs);
  }

  std::vector<std::int32_t> adapters;  // of each row, 0 for none
  std::vector<AdapterRun> runs;
  std::vector<AdapterGroup> groups;
};

struct Batch : HostBatch {
  // Checks the step's input and derives the other fields; an id of -1 becomes the slot's last sampled id.
  Batch(HostBatch host, std::shared_ptr<Slots> slots, int block_size);

  std::vector<std::int32_t> token_rows;     // row of each token
  std::vector<std::int32_t> first_sampled;  // see HostBatch
  std::vector<std::int32_t> mask_places;    // for each sampled position its index in mask_rows, or -1; empty: no masks
  // Of the tokens, and of the sampled positions; null if no row has an adapter.
  std::shared_ptr<AdapterRows> token_adapters, sample_adapters;
  std::shared_ptr<Slots> slots;
  int block_size;  // of the KV caches that it is used with

  // The draft ids before a sampled position.
  std::span<const std::int32_t> drafts(std::size_t sampled) const {
    return std::span(token_ids).subspan(static_cast<std::size_t>(first_sampled[sampled]) + 1,
                                        static_cast<std::size_t>(logits_rows[sampled] - first_sampled[sampled]));
  }

  // Copies in what recorded phases read of another step of the same shape; std::invalid_argument if the shape differs.
  void replace(const Batch& other);

  // The rows, cut into tiles of at most `queries` queries.
  std::vector<QueryTile> tiles(int queries) const;
};

}  // namespace vllmlite::cpu
