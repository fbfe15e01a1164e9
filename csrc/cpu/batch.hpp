// A step's input, and what lives a slot from step to step.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/runtime.hpp"

namespace vllmlite::cpu {

// Sampling parameters of a slot; the fields are those of SlotParams in vllmlite/backends/base.py.
struct SlotParams {
  float temperature = 0;
  int top_k = 0;
  double top_p = 1;
  double min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  std::uint64_t seed = 0;
  std::vector<std::pair<std::int32_t, float>> logit_bias;

  bool penalised() const { return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0; }
};

struct Slots {
  Slots(int max_slots, int max_blocks, int vocab_size, std::int64_t num_blocks);

  void set(int slot, SlotParams params, const std::vector<std::int32_t>& prompt_ids,
           const std::vector<std::int32_t>& output_ids);
  void append_blocks(std::span<const std::int32_t> slot_ids, std::span<const std::int32_t> columns,
                     std::span<const std::int32_t> blocks);

  const std::int32_t* table(int slot) const {
    return block_table.data() + static_cast<std::ptrdiff_t>(slot) * max_blocks;
  }

  int max_slots, max_blocks, vocab_size;
  std::int64_t num_blocks;                // of the pool
  std::vector<std::int32_t> block_table;  // [max_slots, max_blocks], each below num_blocks
  std::vector<std::int32_t> last_id;
  std::vector<SlotParams> params;
  // By slot and id, empty for slots without penalties: how often it was generated, and whether the prompt has it.
  std::vector<std::vector<std::int32_t>> counts;
  std::vector<std::vector<std::uint8_t>> in_prompt;

 private:
  void check(int slot) const;
};

// Some queries of a row that attend together.
struct QueryTile {
  std::int32_t row, first, count;  // tokens `first` up to `first + count` of the step
};

struct Batch {
  int num_tokens = 0, num_rows = 0, max_context = 0;
  unsigned features = 0;
  int num_logprobs = -1;
  std::vector<std::int32_t> token_ids, positions, query_start_loc, slot_ids, context_lens, logits_rows, sample_slots;
  std::vector<std::int64_t> sample_positions;
  std::vector<std::int32_t> mask_rows;
  std::vector<std::int32_t> bitmask;      // [mask_rows, (vocab_size + 31) / 32]
  std::vector<std::int32_t> token_rows;   // row of each token
  std::vector<std::int32_t> mask_places;  // by sampled row, its place in mask_rows or -1; empty: no masks
  std::shared_ptr<Slots> slots;

  // Checks every index and derives the rest; ids of -1 become the slots' last ones.
  void complete();

  // Takes over another step's values, of the same shape, so that recorded phases see them.
  void replace(Batch other);

  // Rows cut into tiles of at most `queries`.
  std::vector<QueryTile> tiles(int queries) const;
};

}  // namespace vllmlite::cpu
