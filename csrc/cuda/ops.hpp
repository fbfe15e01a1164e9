// The ops of the contract in vllmlite/backends/base.py. Each checks its arguments, issues kernels and returns the
// tensor that will hold the result.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "contract/activation.hpp"
#include "cuda/batch.hpp"
#include "cuda/bytes.hpp"
#include "cuda/grouped.hpp"
#include "cuda/runtime.hpp"

namespace vllmlite::cuda {

// A weight [out, in], row-major and of the backend's dtype, or in groups of integers or of 8-bit elements, some rows
// after the others; and a bias [out] of the backend's dtype.
struct LinearWeight {
  std::int64_t out() const;
  std::int64_t in() const;
  Tensor matrix(Runtime& runtime) const;  // of the backend's dtype

  std::variant<Tensor, std::vector<GroupedRows>, std::vector<ByteRows>> weight;
  std::optional<Tensor> bias;
};

// The rows that say how activations are quantised for a weight, if a row of them has one scale; else null.
const ByteRows* rows_that_quantise(const LinearWeight& weight);

// The result of an op that may already be quantised for the only product that reads it.
using Activations = std::variant<Tensor, ByteActivations>;

// Writes `source`, of any float dtype, to `target`, of as many elements, in that one's dtype.
void convert(Runtime& runtime, const Tensor& source, const Tensor& target);

Tensor embedding(Runtime& runtime, const Tensor& ids, const Tensor& table);
Tensor gather_rows(Runtime& runtime, const Tensor& x, const Tensor& index);
// `feeds`, or null: the only weight that the norm is multiplied by.
std::pair<Activations, Tensor> rms_norm(Runtime& runtime, const Tensor& x, const Tensor& weight, float eps,
                                        const std::optional<Tensor>& residual, const LinearWeight* feeds);

std::pair<Tensor, Tensor> layer_norm(Runtime& runtime, const Tensor& x, const Tensor& weight,
                                     const std::optional<Tensor>& bias, float eps,
                                     const std::optional<Tensor>& residual);

// These overwrite what they return: `other`, or x.
Tensor add(Runtime& runtime, const Tensor& x, const Tensor& other);
Tensor scale(Runtime& runtime, const Tensor& x, float factor);
Tensor soft_cap(Runtime& runtime, const Tensor& x, float cap);
Tensor sigmoid_gate(Runtime& runtime, const Tensor& x, const Tensor& gate);

Activations gated_activation(Runtime& runtime, const Tensor& x, Activation activation, const LinearWeight* feeds);
Tensor activation(Runtime& runtime, const Tensor& x, Activation activation);

// x @ weight.T + bias: [rows, in] -> [rows, out] of `dtype`, the backend's or float32.
Tensor linear(Runtime& runtime, const Activations& x, const LinearWeight& weight, DType dtype);

// Whether linear computes this by multiply_skinny, after which the next kernel may read x at once.
bool multiplies_skinny(const Runtime& runtime, const Tensor& x, const LinearWeight& weight);

// The second factor of an adapter's change of a part of a weight, and which of the first factors it belongs to.
struct LowRankOutput {
  std::size_t part, input;
  Tensor b;  // [rows of the part, rank]
  float scale;
};

// The changes of one weight by all resident adapters.
struct LowRankTable {
  LowRankTable(Runtime& the_runtime, std::vector<std::int64_t> rows_of_parts, std::int64_t the_columns, int adapters,
               int rank);

  // Replaces the change by adapter `index`; without outputs, it is removed.
  void set(int index, const std::vector<Tensor>& inputs, const std::vector<LowRankOutput>& outputs);

  Runtime& runtime;
  std::vector<std::int64_t> rows;  // of each part of the weight
  std::int64_t columns, max_rank, out = 0;
  Tensor views;                            // what kernels read of each adapter
  std::vector<std::vector<Tensor>> owned;  // by adapter, what its view points to
};

// linear, changed for each row by its adapter.
Tensor lora_linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight, const LowRankTable& table,
                   const Batch& batch);

// One of the two weights [out, in] of each of a mixture's experts: all of the backend's dtype, or all packed in one
// form.
struct ExpertWeights {
  std::variant<Tensor, GroupedRows, ByteRows> first;  // that of expert 0, whose form the others have
  std::vector<Tensor> owned;                          // what the addresses are of
  // int64 [count]: addresses of elements, and of packed ones' scales, zeros and orders of columns, where there are any.
  Tensor weights, scales, zeros, orders;
  std::optional<Tensor> constants;  // ByteConstant [count]: what quantises activations, where constants do
};

// Weights of a mixture's experts, each [2 * inner, hidden], the gate's rows first, and [hidden, inner]. Both are
// floats, or both packed in the same kind.
struct Experts {
  bool packed() const { return !std::holds_alternative<Tensor>(gate_up.first); }

  ExpertWeights gate_up, down;
  int count, hidden, inner;
  DType dtype;
};

std::shared_ptr<Experts> make_experts(Runtime& runtime, const std::vector<LinearWeight>& gate_up,
                                      const std::vector<LinearWeight>& down);
Tensor moe(Runtime& runtime, const Tensor& x, const Tensor& router_logits, const Experts& experts, int top_k,
           bool renormalise, Activation activation);

// A pool of blocks. A layer's block is [K, V] x [kv heads] x [block_size] x [width], where width is the head size,
// padded to kHeadUnit. Head scales are apart from the elements: a layer's are [num_blocks, 2, kv heads, block_size].
struct KVCache : CacheSpec {
  static constexpr int kHeadUnit = 16;

  KVCache(Runtime& runtime, const CacheSpec& spec, std::int64_t num_blocks);

  void* layer(int index) const;         // its elements
  float* layer_heads(int index) const;  // its head scales; null without

  int width;
  std::int64_t num_blocks;
  Tensor memory, scales_memory;
};

// Checks that the batch is for this pool.
void check_pool(const KVCache& kv, const Batch& batch);

// Copies block sources[i] of one pool to block targets[i] of another pool of the same form, or of the same pool.
void copy_blocks(Runtime& runtime, const KVCache& source, std::span<const std::int32_t> sources, const KVCache& target,
                 std::span<const std::int32_t> targets);

Tensor attn_prep(Runtime& runtime, const Tensor& qkv, int num_heads, const std::optional<Rotation>& rope,
                 const KVCache& kv, int layer, const Batch& batch, const AttentionNorms& norms);

// Changes of scaled scores before the softmax: a cap (0: none) and the slopes of linear biases, float32 [heads].
struct ScoreEdits {
  float soft_cap = 0;
  std::optional<Tensor> alibi;
};

Tensor paged_attention(Runtime& runtime, const Tensor& q, const KVCache& kv, int layer, const Batch& batch, float scale,
                       int window, const ScoreEdits& edits);

// Throws if logits do not fit the batch's sampled positions.
void check_logits(const Tensor& logits, const Batch& batch);
// Adds bias, mask and penalties to logits [rows, vocabulary], in this order, and writes them to `to`, which may be
// `from`. Row i is that of the sampled position positions[i], or i if `positions` is null.
void edit(Runtime& runtime, const float* from, float* to, std::int64_t rows, const Batch& batch,
          const std::int32_t* positions);

Continuations choose_beams(Runtime& runtime, const Tensor& logits, const Batch& batch, const BeamRows& beams, int k);
Sampled sample(Runtime& runtime, const Tensor& logits, const Batch& batch);
Tensor accept(Runtime& runtime, const Tensor& ids, const Batch& batch);
Logprobs logprobs(Runtime& runtime, const Tensor& logits, const Tensor& ids, int k);

}  // namespace vllmlite::cuda
