#include "cpu/batch.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace vllmlite::cpu {

Slots::Slots(const SlotSpec& spec) : SlotSpec(spec) {
  const auto n = static_cast<std::size_t>(max_slots);
  block_table.resize(n * static_cast<std::size_t>(max_blocks));
  last_id.resize(n);
  params.resize(n);
  counts.resize(n);
  in_prompt.resize(n);
}

void Slots::set(int slot, SlotParams values) {
  check_params(slot, values);
  const auto at = static_cast<std::size_t>(slot);
  const std::size_t size = values.penalised() ? static_cast<std::size_t>(vocab_size) : 0;
  counts[at].assign(size, 0);
  in_prompt[at].assign(size, 0);
  if (size != 0) {
    for (const std::int32_t id : values.output_ids) ++counts[at][static_cast<std::size_t>(id)];
    for (const std::int32_t id : values.prompt_ids) in_prompt[at][static_cast<std::size_t>(id)] = 1;
  }
  params[at] = std::move(values);
}

void Slots::append_blocks(std::span<const std::int32_t> slot_ids, std::span<const std::int32_t> columns,
                          std::span<const std::int32_t> blocks) {
  check_blocks(slot_ids, columns, blocks);
  for (std::size_t i = 0; i < blocks.size(); ++i)
    block_table[static_cast<std::size_t>(slot_ids[i]) * static_cast<std::size_t>(max_blocks) +
                static_cast<std::size_t>(columns[i])] = blocks[i];
}

Batch::Batch(HostBatch host, std::shared_ptr<Slots> the_slots, int tokens_of_block)
    : HostBatch(std::move(host)), slots(std::move(the_slots)), block_size(tokens_of_block) {
  check(*slots, block_size);
  first_sampled = HostBatch::first_sampled();
  token_rows.resize(token_ids.size());
  for (std::size_t row = 0; row < slot_ids.size(); ++row)
    std::fill(token_rows.begin() + query_start_loc[row], token_rows.begin() + query_start_loc[row + 1],
              static_cast<std::int32_t>(row));
  for (std::size_t token = 0; token < token_ids.size(); ++token)
    if (token_ids[token] < 0)
      token_ids[token] =
          slots->last_id[static_cast<std::size_t>(slot_ids[static_cast<std::size_t>(token_rows[token])])];
  if (!adapters.empty()) {
    const auto adapter_of = [&](std::int32_t token) {
      return adapters[static_cast<std::size_t>(token_rows[static_cast<std::size_t>(token)])];
    };
    std::vector<std::int32_t> of_tokens(token_ids.size()), of_samples(logits_rows.size());
    for (std::size_t token = 0; token < of_tokens.size(); ++token)
      of_tokens[token] = adapter_of(static_cast<std::int32_t>(token));
    std::ranges::transform(logits_rows, of_samples.begin(), adapter_of);
    token_adapters = std::make_shared<AdapterRows>(std::move(of_tokens));
    sample_adapters = std::make_shared<AdapterRows>(std::move(of_samples));
  }
  if (!mask_rows.empty()) {
    mask_places.assign(logits_rows.size(), -1);
    for (std::size_t i = 0; i < mask_rows.size(); ++i)
      mask_places[static_cast<std::size_t>(mask_rows[i])] = static_cast<std::int32_t>(i);
  }
}

AdapterRows::AdapterRows(std::vector<std::int32_t> of_rows) : adapters(std::move(of_rows)) {
  group(0, static_cast<std::int32_t>(adapters.size()), 0);
}

void AdapterRows::group(std::int32_t first, std::int32_t last, std::size_t expert) {
  constexpr std::int32_t kGroupRows = 64;  // of a group, roughly, so that threads share long prompts
  std::vector<std::pair<std::int32_t, AdapterRun>> found;
  for (std::int32_t row = first; row < last; ++row) {
    const std::int32_t adapter = adapters[static_cast<std::size_t>(row)];
    if (adapter == 0) continue;
    if (!found.empty() && found.back().first == adapter) {
      AdapterRun& run = found.back().second;
      if (run.first + run.count == row && run.count < kShrinkTokens) {
        ++run.count;
        continue;
      }
    }
    found.push_back({adapter, {row, 1}});
  }
  std::ranges::stable_sort(found, {}, [](const auto& each) { return each.first; });
  std::int32_t rows = kGroupRows, before = 0;
  for (const auto& [adapter, run] : found) {
    if (adapter != before || rows >= kGroupRows) {
      groups.push_back({adapter, runs.size(), 0, expert});
      before = adapter;
      rows = 0;
    }
    runs.push_back(run);
    ++groups.back().runs;
    rows += run.count;
  }
}

void Batch::replace(const Batch& other) {
  const auto copy = [](auto& to, const auto& from) {
    if (to.size() != from.size())
      throw std::invalid_argument("graph: the batch has other shapes than the recorded one");
    std::copy(from.begin(), from.end(), to.begin());
  };
  if (other.slots != slots || other.block_size != block_size)
    throw std::invalid_argument("graph: the batch belongs to other slots or another cache");
  copy(token_ids, other.token_ids);
  copy(positions, other.positions);
  copy(query_start_loc, other.query_start_loc);
  copy(slot_ids, other.slot_ids);
  copy(context_lens, other.context_lens);
  copy(logits_rows, other.logits_rows);
  copy(token_rows, other.token_rows);
  if (token_adapters && other.token_adapters) {
    *token_adapters = *other.token_adapters;
    *sample_adapters = *other.sample_adapters;
  }
  max_context = other.max_context;
}

std::vector<QueryTile> Batch::tiles(int queries) const {
  std::vector<QueryTile> found;
  for (int row = 0; row < num_rows; ++row) {
    const std::int32_t last = query_start_loc[static_cast<std::size_t>(row) + 1];
    for (std::int32_t at = query_start_loc[static_cast<std::size_t>(row)]; at < last; at += queries)
      found.push_back({row, at, std::min(queries, last - at)});
  }
  // The longest contexts come first, so that no thread is left alone with one at the end.
  std::ranges::stable_sort(found, std::ranges::greater{},
                           [&](const QueryTile& tile) { return positions[static_cast<std::size_t>(tile.first)]; });
  return found;
}

}  // namespace vllmlite::cpu
