#include "contract/data.hpp"

#include <algorithm>
#include <array>
#include <limits>
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

void SlotSpec::check_pool(std::int64_t blocks_of_pool) const {
  if (num_blocks > blocks_of_pool)
    throw std::invalid_argument("the slots are those of a pool of " + std::to_string(num_blocks) +
                                " blocks, and this one has " + std::to_string(blocks_of_pool));
}

void check_copies(std::span<const std::int32_t> sources, std::int64_t source_blocks,
                  std::span<const std::int32_t> targets, std::int64_t target_blocks, bool same_pool) {
  if (sources.size() != targets.size())
    throw std::invalid_argument("copy_blocks: sources and targets differ in length");
  check_indices("source block", sources, source_blocks);
  check_indices("target block", targets, target_blocks);
  std::vector<std::int32_t> written(targets.begin(), targets.end());
  std::ranges::sort(written);
  if (std::ranges::adjacent_find(written) != written.end())
    throw std::invalid_argument("copy_blocks: a block is the target of two copies");
  if (same_pool &&
      std::ranges::any_of(sources, [&](std::int32_t block) { return std::ranges::binary_search(written, block); }))
    throw std::invalid_argument("copy_blocks: a block is both source and target");
}

namespace {

struct CacheTypeInfo {
  std::string_view name;
  CacheElement element;
  bool head_scales;
};

constexpr std::array kCacheTypes{
    CacheTypeInfo{"float32", CacheElement::float32, false},
    CacheTypeInfo{"float16", CacheElement::float16, false},
    CacheTypeInfo{"bfloat16", CacheElement::bfloat16, false},
    CacheTypeInfo{"int8", CacheElement::int8, true},
    CacheTypeInfo{"fp8_e4m3", CacheElement::fp8_e4m3, false},
    CacheTypeInfo{"fp8_e5m2", CacheElement::fp8_e5m2, false},
    CacheTypeInfo{"fp8_per_token_head", CacheElement::fp8_e4m3, true},
};

}  // namespace

std::pair<CacheElement, bool> cache_type_from_name(std::string_view name) {
  const auto* found = std::ranges::find(kCacheTypes, name, &CacheTypeInfo::name);
  if (found == kCacheTypes.end())
    throw std::invalid_argument("unknown dtype '" + std::string(name) + "' of a key/value cache");
  return {found->element, found->head_scales};
}

DType CacheSpec::dtype() const {
  switch (element) {
    case CacheElement::float32:
      return DType::float32;
    case CacheElement::float16:
      return DType::float16;
    case CacheElement::bfloat16:
      return DType::bfloat16;
    default:
      return DType::uint8;
  }
}

std::pair<float, float> CacheSpec::layer_scales(int layer) const {
  check_index("layer", layer, layers);
  return scales.empty() ? std::pair{1.0F, 1.0F} : scales.at(static_cast<std::size_t>(layer));
}

void CacheSpec::check_same_form(const CacheSpec& other) const {
  if (layers != other.layers || kv_heads != other.kv_heads || head_dim != other.head_dim ||
      block_size != other.block_size || element != other.element || head_scales != other.head_scales)
    throw std::invalid_argument("copy_blocks: the pools have blocks of different forms");
}

void Rotation::check(int head_dim, const SlotSpec& slots) const {
  if (cos_sin.dtype != DType::float32 || cos_sin.shape.size() != 2 || cos_sin.shape[1] != rotary_dim ||
      cos_sin.shape[0] < slots.max_context || rotary_dim < 0 || rotary_dim > head_dim || rotary_dim % 2 != 0)
    throw std::invalid_argument("rope: a float32 table [" + std::to_string(slots.max_context) + " positions or more, " +
                                std::to_string(rotary_dim) + "] for heads of " + std::to_string(head_dim) +
                                " is needed, not " + describe(cos_sin));
}

void HostBatch::check(const SlotSpec& slots, int block_size) const {
  const auto rows = static_cast<std::size_t>(num_rows), tokens = static_cast<std::size_t>(num_tokens);
  if (token_ids.size() != tokens || positions.size() != tokens || query_start_loc.size() != rows + 1 ||
      slot_ids.size() != rows || context_lens.size() != rows || sample_slots.size() != logits_rows.size() ||
      sample_positions.size() != logits_rows.size() || (!adapters.empty() && adapters.size() != rows))
    throw std::invalid_argument("batch: arrays do not fit num_tokens and num_rows");
  check_indices("token id", token_ids, slots.vocab_size, -1);
  check_indices("slot", slot_ids, slots.max_slots);
  check_indices("context length", context_lens, static_cast<std::int64_t>(max_context) + 1);
  check_index("max_context", max_context,
              std::min<std::int64_t>(slots.max_context, std::int64_t{slots.max_blocks} * block_size) + 1);
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
  std::vector<bool> seen(static_cast<std::size_t>(slots.max_slots));
  for (std::size_t i = 0; i < sample_slots.size(); ++i) {
    const auto slot = static_cast<std::size_t>(sample_slots[i]);
    if (seen[slot] && (sample_slots[i - 1] != sample_slots[i] || logits_rows[i - 1] + 1 != logits_rows[i]))
      throw std::invalid_argument("batch: sampled positions of slot " + std::to_string(slot) + " are not in a row");
    seen[slot] = true;
  }
}

std::int32_t BeamRows::largest_group() const {
  std::int32_t most = 0;
  for (std::size_t group = 1; group < groups.size(); ++group) most = std::max(most, groups[group] - groups[group - 1]);
  return most;
}

void BeamRows::check(std::int64_t sampled, std::int64_t vocab_size, int k) const {
  if (scores.size() != rows.size() || temperatures.size() != rows.size())
    throw std::invalid_argument("choose_beams: rows, scores and temperatures differ in length");
  check_indices("sampled row", rows, sampled);
  if (groups.empty() || groups.front() != 0 || groups.back() != count() || !std::ranges::is_sorted(groups))
    throw std::invalid_argument("choose_beams: groups do not run from 0 to the number of rows");
  if (std::ranges::any_of(temperatures, [](float temperature) { return !(temperature > 0); }))
    throw std::invalid_argument("choose_beams: a temperature is not above 0");
  if (k < 1 || largest_group() * vocab_size > std::numeric_limits<std::int32_t>::max())
    throw std::invalid_argument("choose_beams: k must be at least 1, and a group's continuations fewer than 2^31");
}

std::vector<std::int32_t> HostBatch::first_sampled() const {
  std::vector<std::int32_t> first = logits_rows;
  for (std::size_t i = 1; i < first.size(); ++i)
    if (sample_slots[i] == sample_slots[i - 1]) first[i] = first[i - 1];
  return first;
}

}  // namespace vllmlite
