// The data that crosses the interface of vllmlite/backends/base.py, as every native backend takes it. The checks throw
// std::out_of_range for an index that is out of range and std::invalid_argument for fields that do not fit together.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "tensor/tensor.hpp"

namespace vllmlite {

// Sampling parameters of a slot.
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
  std::vector<std::int32_t> prompt_ids, output_ids;

  bool penalised() const { return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0; }
};

// Sizes of the per-slot state.
struct SlotSpec {
  int max_slots, max_blocks, max_context, vocab_size;
  std::int64_t num_blocks;  // of the pool

  void check_params(int slot, const SlotParams& params) const;
  void check_blocks(std::span<const std::int32_t> slot_ids, std::span<const std::int32_t> columns,
                    std::span<const std::int32_t> blocks) const;
  // Throws std::invalid_argument if a pool of this many blocks has fewer than the block tables may point to.
  void check_pool(std::int64_t blocks_of_pool) const;
};

// Checks the arguments of copy_blocks: every block must be in its pool, and no target may be written twice or read.
void check_copies(std::span<const std::int32_t> sources, std::int64_t source_blocks,
                  std::span<const std::int32_t> targets, std::int64_t target_blocks, bool same_pool);

// The form in which a key/value cache stores a number: a float, or a byte that is multiplied by a scale when it is
// read.
enum class CacheElement : std::uint8_t { float32, float16, bfloat16, int8, fp8_e4m3, fp8_e5m2 };

// The KVSpec of vllmlite/backends/kv_cache.py.
struct CacheSpec {
  int layers, kv_heads, head_dim, block_size;
  CacheElement element;
  bool head_scales;                             // each head of a token has a float32 scale
  std::vector<std::pair<float, float>> scales;  // by layer, of keys and values without head scales; empty: 1

  bool quantized() const { return element >= CacheElement::int8; }
  DType dtype() const;  // of the elements, uint8 for bytes
  // The layer's scales of keys and of values; std::out_of_range if there is no such layer.
  std::pair<float, float> layer_scales(int layer) const;
  // Throws std::invalid_argument if blocks of `other` have another form.
  void check_same_form(const CacheSpec& other) const;
};

// Reads "float32", "int8", "fp8_per_token_head", ...: the element, and whether there are head scales.
std::pair<CacheElement, bool> cache_type_from_name(std::string_view name);

// A step's input in host memory: the ForwardBatch of vllmlite/backends/batch.py.
struct HostBatch {
  int num_tokens = 0, num_rows = 0, max_context = 0;
  int num_logprobs = -1;
  std::vector<std::int32_t> token_ids, positions, query_start_loc, slot_ids, context_lens, logits_rows, sample_slots;
  std::vector<std::int64_t> sample_positions;
  std::vector<std::int32_t> mask_rows;
  std::vector<std::int32_t> bitmask;   // [mask_rows, (vocab_size + 31) / 32]
  std::vector<std::int32_t> adapters;  // of each row, 0 for none; empty: no row has one

  // Checks the sizes, every index, and that the contexts fit block tables of blocks of `block_size` tokens.
  void check(const SlotSpec& slots, int block_size) const;

  // For each sampled position, the token of its slot's first sampled position; the drafts come after it.
  std::vector<std::int32_t> first_sampled() const;
};

// Rotary embedding: the first `rotary_dim` elements of each head are rotated in pairs, by an angle of the position.
struct Rotation {
  Tensor cos_sin;  // float32 [positions, rotary_dim]
  int rotary_dim;
  bool interleaved;

  // Checks that it fits heads of `head_dim` elements and covers max_context positions.
  void check(int head_dim, const SlotSpec& slots) const;
};

// Weights of the norms of q's and k's heads, as attn_prep takes them.
struct AttentionNorms {
  std::optional<Tensor> q, k;
  float eps = 0;
};

// Groups of sampled positions among which beam search chooses: the BeamRows of vllmlite/backends/sampling.py.
struct BeamRows {
  std::vector<std::int32_t> rows;           // indices of sampled positions
  std::vector<std::int32_t> groups;         // where each group begins in `rows`; after them, the number of rows
  std::vector<float> scores, temperatures;  // of each row

  std::int64_t count() const { return static_cast<std::int64_t>(rows.size()); }
  std::int64_t num_groups() const { return static_cast<std::int64_t>(groups.size()) - 1; }
  std::int32_t largest_group() const;
  // Checks sizes and indices; `k` continuations are wanted of each group.
  void check(std::int64_t sampled, std::int64_t vocab_size, int k) const;
};

// The continuations that beam search chose, [groups, k] each.
struct Continuations {
  Tensor rows, ids, scores;
};

struct Logprobs {
  Tensor chosen, rank, top_ids, top;
};

struct Sampled {
  Tensor ids;
  std::optional<Logprobs> logprobs;
};

}  // namespace vllmlite
