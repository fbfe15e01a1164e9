// How a step's attention is cut into work of about the same size, on the host.
#pragma once

#include <vector>

#include "cuda/batch.hpp"

namespace vllmlite::cuda {

// Cuts the rows that have one token into shares that take about as long, one for each of `shares` slots: a share is
// some items, `starts` says where each one's begin.
void plan_items(const HostBatch& host, int shares, std::vector<Item>& items, std::vector<std::int32_t>& starts);

// Tiles of at most `queries` tokens of rows that have several, or of all rows.
std::vector<Tile> plan_tiles(const HostBatch& host, int queries, bool all);

}  // namespace vllmlite::cuda
