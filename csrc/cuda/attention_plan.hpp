// Splits a step's attention into work of about the same duration, on the host.
#pragma once

#include <vector>

#include "cuda/batch.hpp"

namespace vllmlite::cuda {

// The work of the decoding kernel. Thread block b takes items `lists[b]` up to `lists[b + 1]`.
struct DecodingPlan {
  std::vector<WorkItem> items;
  std::vector<std::int32_t> lists;
};

// Splits the rows of at most kDecodingQueries tokens into `num_lists` lists of work items.
DecodingPlan plan_decoding(const HostBatch& host, int num_lists);

// Most tokens of such a row; 1 without one.
int most_decoding_queries(const HostBatch& host);

// Tiles of at most `queries` tokens of the other rows, or of all rows.
std::vector<Tile> plan_tiles(const HostBatch& host, int queries, bool all);

}  // namespace vllmlite::cuda
