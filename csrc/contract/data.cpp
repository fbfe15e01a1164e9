#include "contract/data.hpp"

#include <stdexcept>
#include <string>

#include "tensor/checks.hpp"

namespace vllmlite {

void SlotSpec::check_params(int slot, const SlotParams& params) const {
  check_index("slot", slot, max_slots);
  check_indices("prompt id", params.prompt_ids, vocab_size);
  check_indices("output id", params.output_ids, vocab_size);
  for (const auto& [id, bias] : params.logit_bias) check_index("logit_bias id", id, vocab_size);
}

void SlotSpec::check_blocks(std::span<const std::int32_t> slot_ids, std::span<const std::int32_t> columns,
                            std::span<const std::int32_t> blocks) const {
  if (slot_ids.size() != columns.size() || columns.size() != blocks.size())
    throw std::invalid_argument("append_blocks: slots, columns and blocks differ in length");
  check_indices("slot", slot_ids, max_slots);
  check_indices("block table column", columns, max_blocks);
  check_indices("block", blocks, num_blocks);
}

void SlotSpec::check_context(int max_context, int block_size) const {
  if (max_context > static_cast<std::int64_t>(max_blocks) * block_size)
    throw std::out_of_range("a context of " + std::to_string(max_context) + " is more than a block table holds");
}

void HostBatch::check(const SlotSpec& slots) const {
  const auto rows = static_cast<std::size_t>(num_rows), tokens = static_cast<std::size_t>(num_tokens);
  if (token_ids.size() != tokens || positions.size() != tokens || query_start_loc.size() != rows + 1 ||
      slot_ids.size() != rows || context_lens.size() != rows || sample_slots.size() != logits_rows.size() ||
      sample_positions.size() != logits_rows.size())
    throw std::invalid_argument("batch: arrays do not fit num_tokens and num_rows");
  check_indices("token id", token_ids, slots.vocab_size, -1);
  check_indices("slot", slot_ids, slots.max_slots);
  check_indices("context length", context_lens, static_cast<std::int64_t>(max_context) + 1);
  check_indices("sampled slot", sample_slots, slots.max_slots);
  check_indices("sampled token", logits_rows, num_tokens);
  check_indices("mask row", mask_rows, static_cast<std::int64_t>(logits_rows.size()));
  const std::size_t words = (static_cast<std::size_t>(slots.vocab_size) + 31) / 32;
  if (bitmask.size() != mask_rows.size() * words) throw std::invalid_argument("batch: bitmask is not [rows, V / 32]");
  if (query_start_loc[0] != 0 || query_start_loc[rows] != num_tokens)
    throw std::invalid_argument("batch: query_start_loc does not run from 0 to num_tokens");
  for (std::size_t row = 0; row < rows; ++row) {
    const std::int32_t first = query_start_loc[row], last = query_start_loc[row + 1];
    check_index("query_start_loc", last, static_cast<std::int64_t>(num_tokens) + 1, first);
    const std::span own(positions.data() + first, static_cast<std::size_t>(last - first));
    check_indices("position", own, context_lens[row]);
  }
}

}  // namespace vllmlite
