// The data that crosses the contract of vllmlite/backends/base.py, as every native backend takes it, and what is
// checked of it: std::out_of_range, and std::invalid_argument for what does not fit together.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
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
  // Checks that a pool has the blocks that block tables may point to.
  void check_pool(std::int64_t blocks_of_pool) const;
};

// A step's input as the host has it: a ForwardBatch.
struct HostBatch {
  int num_tokens = 0, num_rows = 0, max_context = 0;
  int num_logprobs = -1;
  std::vector<std::int32_t> token_ids, positions, query_start_loc, slot_ids, context_lens, logits_rows, sample_slots;
  std::vector<std::int64_t> sample_positions;
  std::vector<std::int32_t> mask_rows;
  std::vector<std::int32_t> bitmask;  // [mask_rows, (vocab_size + 31) / 32]

  // Checks sizes, every index, and that contexts fit block tables of blocks of `block_size` tokens.
  void check(const SlotSpec& slots, int block_size) const;

  // By sampled position, the token of the first sampled position of its slot: drafts are the tokens behind it.
  std::vector<std::int32_t> first_sampled() const;
};

// Of a head's elements in pairs, by position.
struct Rotation {
  Tensor cos_sin;  // float32 [positions, rotary_dim]
  int rotary_dim;
  bool interleaved;

  // Checks that it is for heads of `head_dim`, and for the positions of the longest sequence.
  void check(int head_dim, const SlotSpec& slots) const;
};

// Weights of norms of q's and k's heads, as attn_prep has them.
struct AttentionNorms {
  std::optional<Tensor> q, k;
  float eps = 0;
};

struct Logprobs {
  Tensor chosen, rank, top_ids, top;
};

struct Sampled {
  Tensor ids;
  std::optional<Logprobs> logprobs;
};

}  // namespace vllmlite
