#include "cpu/batch.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace vllmlite::cpu {

namespace {

[[noreturn]] void complain(const std::string& what, std::int64_t value, std::int64_t limit) {
  throw std::out_of_range(what + " " + std::to_string(value) + " is not within 0 and " + std::to_string(limit - 1));
}

void check_all(const char* what, std::span<const std::int32_t> values, std::int64_t limit) {
  for (const std::int32_t value : values)
    if (value < 0 || value >= limit) complain(what, value, limit);
}

}  // namespace

Slots::Slots(int slot_count, int block_count, int vocabulary, std::int64_t pool_blocks)
    : max_slots(slot_count), max_blocks(block_count), vocab_size(vocabulary), num_blocks(pool_blocks) {
  const auto n = static_cast<std::size_t>(max_slots);
  block_table.resize(n * static_cast<std::size_t>(max_blocks));
  last_id.resize(n);
  params.resize(n);
  counts.resize(n);
  in_prompt.resize(n);
}

void Slots::check(int slot) const {
  if (slot < 0 || slot >= max_slots) complain("slot", slot, max_slots);
}

void Slots::set(int slot, SlotParams values, const std::vector<std::int32_t>& prompt_ids,
                const std::vector<std::int32_t>& output_ids) {
  check(slot);
  check_all("prompt id", prompt_ids, vocab_size);
  check_all("output id", output_ids, vocab_size);
  for (const auto& [id, bias] : values.logit_bias)
    if (id < 0 || id >= vocab_size) complain("logit_bias id", id, vocab_size);
  const auto at = static_cast<std::size_t>(slot);
  const std::size_t size = values.penalised() ? static_cast<std::size_t>(vocab_size) : 0;
  counts[at].assign(size, 0);
  in_prompt[at].assign(size, 0);
  if (size != 0) {
    for (const std::int32_t id : output_ids) ++counts[at][static_cast<std::size_t>(id)];
    for (const std::int32_t id : prompt_ids) in_prompt[at][static_cast<std::size_t>(id)] = 1;
  }
  params[at] = std::move(values);
}

void Slots::append_blocks(std::span<const std::int32_t> slot_ids, std::span<const std::int32_t> columns,
                          std::span<const std::int32_t> blocks) {
  if (slot_ids.size() != columns.size() || columns.size() != blocks.size())
    throw std::invalid_argument("append_blocks: slots, columns and blocks differ in length");
  check_all("slot", slot_ids, max_slots);
  check_all("block table column", columns, max_blocks);
  check_all("block", blocks, num_blocks);
  for (std::size_t i = 0; i < blocks.size(); ++i)
    block_table[static_cast<std::size_t>(slot_ids[i]) * static_cast<std::size_t>(max_blocks) +
                static_cast<std::size_t>(columns[i])] = blocks[i];
}

void Batch::complete() {
  const auto rows = static_cast<std::size_t>(num_rows), tokens = static_cast<std::size_t>(num_tokens);
  if (token_ids.size() != tokens || positions.size() != tokens || query_start_loc.size() != rows + 1 ||
      slot_ids.size() != rows || context_lens.size() != rows || sample_slots.size() != logits_rows.size() ||
      sample_positions.size() != logits_rows.size())
    throw std::invalid_argument("batch: arrays do not fit num_tokens and num_rows");
  check_all("slot", slot_ids, slots->max_slots);
  check_all("sampled slot", sample_slots, slots->max_slots);
  check_all("sampled token", logits_rows, num_tokens);
  check_all("mask row", mask_rows, static_cast<std::int64_t>(logits_rows.size()));
  const std::size_t words = (static_cast<std::size_t>(slots->vocab_size) + 31) / 32;
  if (bitmask.size() != mask_rows.size() * words) throw std::invalid_argument("batch: bitmask is not [rows, V / 32]");
  token_rows.resize(tokens);
  for (std::size_t row = 0; row < rows; ++row) {
    const std::int32_t first = query_start_loc[row], last = query_start_loc[row + 1];
    if (first < 0 || last < first || last > num_tokens) complain("query_start_loc", last, num_tokens + 1);
    std::fill(token_rows.begin() + first, token_rows.begin() + last, static_cast<std::int32_t>(row));
  }
  for (std::size_t token = 0; token < tokens; ++token) {
    if (token_ids[token] < 0)
      token_ids[token] =
          slots->last_id[static_cast<std::size_t>(slot_ids[static_cast<std::size_t>(token_rows[token])])];
    if (positions[token] < 0 || positions[token] >= max_context) complain("position", positions[token], max_context);
  }
  check_all("token id", token_ids, slots->vocab_size);
  if (!mask_rows.empty()) {
    mask_places.assign(logits_rows.size(), -1);
    for (std::size_t i = 0; i < mask_rows.size(); ++i)
      mask_places[static_cast<std::size_t>(mask_rows[i])] = static_cast<std::int32_t>(i);
  }
}

void Batch::replace(Batch other) {
  const auto copy = [](auto& to, const auto& from) {
    if (to.size() != from.size())
      throw std::invalid_argument("graph: the batch has other shapes than the recorded one");
    std::copy(from.begin(), from.end(), to.begin());
  };
  if (other.slots != slots) throw std::invalid_argument("graph: the batch belongs to other slots");
  copy(token_ids, other.token_ids);
  copy(positions, other.positions);
  copy(query_start_loc, other.query_start_loc);
  copy(slot_ids, other.slot_ids);
  copy(context_lens, other.context_lens);
  copy(logits_rows, other.logits_rows);
  copy(sample_slots, other.sample_slots);
  copy(sample_positions, other.sample_positions);
  copy(token_rows, other.token_rows);
  max_context = other.max_context;
  mask_rows = std::move(other.mask_rows);
  bitmask = std::move(other.bitmask);
  mask_places = std::move(other.mask_places);
}

std::vector<QueryTile> Batch::tiles(int queries) const {
  std::vector<QueryTile> found;
  for (int row = 0; row < num_rows; ++row) {
    const std::int32_t last = query_start_loc[static_cast<std::size_t>(row) + 1];
    for (std::int32_t at = query_start_loc[static_cast<std::size_t>(row)]; at < last; at += queries)
      found.push_back({row, at, std::min(queries, last - at)});
  }
  // The longest contexts first, so that no member is left alone with one at the end.
  std::ranges::stable_sort(found, std::ranges::greater{},
                           [&](const QueryTile& tile) { return positions[static_cast<std::size_t>(tile.first)]; });
  return found;
}

}  // namespace vllmlite::cpu
