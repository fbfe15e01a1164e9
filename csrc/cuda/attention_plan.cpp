// How a step's attention is cut into work of about the same size.
#include "cuda/attention_plan.hpp"

#include <algorithm>

namespace vllmlite::cuda {

namespace {

constexpr int kKeysOfUnit = 64;   // keys that a block of the decoding kernel takes at a time
constexpr int kUnitsOfItem = 4;   // that are not worth cutting
constexpr int kUnitsOfStart = 1;  // that take as long as an item's start and end

std::int64_t units_of(std::int64_t context) { return (context + kKeysOfUnit - 1) / kKeysOfUnit; }

bool has_one_token(const HostBatch& host, std::size_t row) {
  return host.query_start_loc[row + 1] - host.query_start_loc[row] == 1;
}

}  // namespace

DecodingBlocks decoding_blocks(const Runtime& runtime, int rows, int kv_heads) {
  return rows * kv_heads > 8 * runtime.multiprocessors() ? DecodingBlocks{2, 5} : DecodingBlocks{4, 2};
}

void plan_items(const HostBatch& host, int shares, std::vector<Item>& items, std::vector<std::int32_t>& starts) {
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

std::vector<Tile> plan_tiles(const HostBatch& host, int queries, bool all) {
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

}  // namespace vllmlite::cuda
