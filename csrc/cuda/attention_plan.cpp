#include "cuda/attention_plan.hpp"

#include <algorithm>

namespace vllmlite::cuda {

namespace {

constexpr int kKeysOfUnit = 64;   // keys that a thread block of the decoding kernel takes at a time
constexpr int kUnitsOfItem = 4;   // that are not worth splitting
constexpr int kUnitsOfStart = 1;  // that take as long as an item's start and end

std::int64_t units_of(std::int64_t context) { return (context + kKeysOfUnit - 1) / kKeysOfUnit; }

std::int32_t tokens_of(const HostBatch& host, std::size_t row) {
  return host.query_start_loc[row + 1] - host.query_start_loc[row];
}

bool decodes(const HostBatch& host, std::size_t row) {
  const std::int32_t tokens = tokens_of(host, row);
  return tokens >= 1 && tokens <= kDecodingQueries;
}

}  // namespace

DecodingBlocks decoding_blocks(const Runtime& runtime, int rows, int queries, int kv_heads) {
  return queries == 1 && rows * kv_heads > 8 * runtime.multiprocessors() ? DecodingBlocks{2, 5} : DecodingBlocks{4, 2};
}

int most_decoding_queries(const HostBatch& host) {
  std::int32_t most = 1;
  for (std::size_t row = 0; row < host.slot_ids.size(); ++row)
    if (decodes(host, row)) most = std::max(most, tokens_of(host, row));
  return most;
}

DecodingPlan plan_decoding(const HostBatch& host, int num_lists) {
  std::int64_t total = 0;
  for (std::size_t row = 0; row < host.slot_ids.size(); ++row)
    if (decodes(host, row)) total += units_of(host.context_lens[row]) + kUnitsOfStart;
  // Every split makes another start.
  const std::int64_t quota = std::max<std::int64_t>((total + num_lists - 1) / num_lists + kUnitsOfStart, kUnitsOfItem);
  std::int64_t left = quota;
  DecodingPlan plan;
  auto& [items, lists] = plan;
  lists.push_back(0);
  std::int32_t partials = 0;
  for (std::size_t row = 0; row < host.slot_ids.size(); ++row) {
    if (!decodes(host, row)) continue;
    const std::int32_t context = host.context_lens[row], token = host.query_start_loc[row];
    const std::int32_t queries = tokens_of(host, row);
    // A row that goes on from a sampled id had its earlier keys written by earlier steps; another row may share blocks
    // that this very step writes.
    const bool goes_on = host.token_ids[static_cast<std::size_t>(token)] < 0;
    const std::size_t first = items.size();
    for (std::int32_t begin = 0; begin < context;) {
      const std::int64_t units = units_of(context - begin) + kUnitsOfStart;
      // A remainder that is not worth an item of its own stays.
      const bool whole = units <= left + kUnitsOfStart || static_cast<int>(lists.size()) == num_lists;
      const std::int64_t taken = whole ? units : std::max<std::int64_t>(left, kUnitsOfStart + 1);
      const std::int32_t end = whole ? context : begin + static_cast<std::int32_t>(taken - kUnitsOfStart) * kKeysOfUnit;
      items.push_back({static_cast<std::int32_t>(row), begin, end, token, queries, host.slot_ids[row], context,
                       goes_on ? context - queries : 0, partials, 1, partials});
      begin = end;
      left -= taken;
      if (left <= kUnitsOfStart && static_cast<int>(lists.size()) < num_lists) {
        lists.push_back(static_cast<std::int32_t>(items.size()));
        left += quota;
      }
    }
    if (items.size() - first < 2) continue;
    for (std::size_t i = first; i < items.size(); ++i) {
      items[i].count = static_cast<std::int32_t>(items.size() - first);
      items[i].partial = partials++;
    }
  }
  lists.resize(static_cast<std::size_t>(num_lists) + 1, static_cast<std::int32_t>(items.size()));
  return plan;
}

std::vector<Tile> plan_tiles(const HostBatch& host, int queries, bool all) {
  std::vector<Tile> tiles;
  for (int row = 0; row < host.num_rows; ++row) {
    if (!all && decodes(host, static_cast<std::size_t>(row))) continue;
    const std::int32_t begin = host.query_start_loc[static_cast<std::size_t>(row)];
    const std::int32_t end = host.query_start_loc[static_cast<std::size_t>(row) + 1];
    for (std::int32_t at = begin; at < end; at += queries) tiles.push_back({row, at, std::min(queries, end - at), 0});
  }
  // The longest contexts first, so that no multiprocessor is left alone with one at the end.
  std::ranges::stable_sort(tiles, std::ranges::greater{},
                           [&](const Tile& tile) { return host.positions[static_cast<std::size_t>(tile.first)]; });
  return tiles;
}

}  // namespace vllmlite::cuda
