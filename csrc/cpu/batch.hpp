// A step's input, and what lives a slot from step to step.
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
  // By slot and id, empty for slots without penalties: how often it was generated, and whether the prompt has it.
  std::vector<std::vector<std::int32_t>> counts;
  std::vector<std::vector<std::uint8_t>> in_prompt;
};

// Some queries of a row that attend together.
struct QueryTile {
  std::int32_t row, first, count;  // tokens `first` up to `first + count` of the step
};

struct Batch : HostBatch {
  // Checks the step's input and derives the rest; ids of -1 become the slots' last ones.
  Batch(HostBatch host, std::shared_ptr<Slots> slots, int block_size);

  std::vector<std::int32_t> token_rows;     // row of each token
  std::vector<std::int32_t> first_sampled;  // see HostBatch
  std::vector<std::int32_t> mask_places;    // by sampled position, its place in mask_rows or -1; empty: no masks
  std::shared_ptr<Slots> slots;
  int block_size;  // of the caches that it is for

  // The ids drafted before a sampled position.
  std::span<const std::int32_t> drafts(std::size_t sampled) const {
    return std::span(token_ids).subspan(static_cast<std::size_t>(first_sampled[sampled]) + 1,
                                        static_cast<std::size_t>(logits_rows[sampled] - first_sampled[sampled]));
  }

  // Takes over what recorded phases read of another step, of the same shape.
  void replace(const Batch& other);

  // Rows cut into tiles of at most `queries`.
  std::vector<QueryTile> tiles(int queries) const;
};

}  // namespace vllmlite::cpu
