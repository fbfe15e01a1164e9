// The ops of the contract in vllmlite/backends/base.py. Each checks its arguments, issues phases and returns the tensor
// that will hold the result. Activations are float32, or bfloat16 where the next product takes nothing else.
#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/batch.hpp"
#include "cpu/runtime.hpp"

namespace vllmlite::cpu {

// `x`, converted if it has another dtype.
Tensor converted(Runtime& runtime, const Tensor& x, DType dtype);

Tensor embedding(Runtime& runtime, const Tensor& ids, const Tensor& table);
Tensor gather_rows(Runtime& runtime, const Tensor& x, const Tensor& index);
std::pair<Tensor, Tensor> rms_norm(Runtime& runtime, const Tensor& x, const Tensor& weight, float eps,
                                   const std::optional<Tensor>& residual);
std::pair<Tensor, Tensor> layer_norm(Runtime& runtime, const Tensor& x, const Tensor& weight,
                                     const std::optional<Tensor>& bias, float eps,
                                     const std::optional<Tensor>& residual);
Tensor gated_activation(Runtime& runtime, const Tensor& x, Activation f);
Tensor activation(Runtime& runtime, const Tensor& x, Activation f);
Tensor add(Runtime& runtime, const Tensor& x, const Tensor& other);
Tensor scale(Runtime& runtime, const Tensor& x, float factor);
Tensor soft_cap(Runtime& runtime, const Tensor& x, float cap);
Tensor sigmoid_gate(Runtime& runtime, const Tensor& x, const Tensor& gate);

// Rows of a weight [rows, in] of floats, row-major; or of integer codes in groups, in tiles.
struct LinearPart {
  Tensor data;  // [rows, in], or uint8 [tiles, bytes of a tile]
  std::int64_t rows, in;
  GroupedLayout layout = {};
  std::optional<Tensor> order = {};  // int32 [in]: the columns of x that the codes' columns meet; none: as they are

  bool grouped() const { return layout.bits != 0; }
  // Of a row, or of a tile.
  std::size_t unit_bytes() const;
  const std::byte* at(std::int64_t row) const;
};

// A weight [out, in]: rows of the parts are the rows of the whole.
struct LinearWeight {
  std::vector<LinearPart> parts;
  std::optional<Tensor> bias;  // float32 [out]

  std::int64_t in() const { return parts.front().in; }
  std::int64_t out() const;
  bool grouped() const { return parts.front().grouped(); }
};

// Checks that the parts have one width, one dtype if they are of floats, and that the bias fits.
LinearWeight make_weight(std::vector<LinearPart> parts, std::optional<Tensor> bias);

// A part of floats [rows, in].
LinearPart float_part(Tensor data);

// What vllmlite/weights/schemes/grouped.py stores for a weight.
struct GroupedWeight {
  int bits;
  std::int64_t columns, group_size;
  Tensor codes, scales;
  std::optional<Tensor> zeros, order;
};

// Puts a stored weight into tiles. std::invalid_argument for parts that do not fit.
LinearPart grouped_part(Runtime& runtime, const GroupedWeight& stored);

Tensor linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight);

// gated_activation of linear, a block of rows of w at a time: the sums are not kept.
Tensor gated_linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight, Activation f);

// Rows of a quantised weight [rows, in] in strips, as vllmlite/weights/schemes/tiles.py has them.
struct QuantizedPart {
  Codes kind;
  Tensor codes;                   // uint8 [strips, groups, bytes of a group]
  Tensor scales;                  // [strips, units, kStripRows], or [strips, units, 2, kStripRows]
  std::optional<Tensor> factors;  // int8 [strips, groups, n, kStripRows]
  std::int64_t rows;

  std::int64_t groups() const { return codes.shape[1]; }
  QuantizedStrips from(std::int64_t strip) const;
};

// Parts one after the other, as LinearWeight's; their kinds may differ.
struct QuantizedWeight {
  std::vector<QuantizedPart> parts;
  std::int64_t in;
  std::optional<Tensor> bias;  // float32 [out]

  std::int64_t groups() const { return parts.front().groups(); }
  std::int64_t out() const;
};

// Uninitialised strips for a weight [rows, in].
QuantizedPart allocate_strips(Codes kind, std::int64_t rows, std::int64_t in);

// Quantises float rows [out, in], whose values must be finite, to one of the kMadeCodes first kinds.
QuantizedPart quantize(Runtime& runtime, const Tensor& w, Codes kind);

// Checks that the parts fit one another, `in`, and the bias.
QuantizedWeight make_quantized(std::vector<QuantizedPart> parts, std::int64_t in, std::optional<Tensor> bias);

// The product with x quantised a row at a time.
Tensor linear(Runtime& runtime, const Tensor& x, const QuantizedWeight& weight);
Tensor gated_linear(Runtime& runtime, const Tensor& x, const QuantizedWeight& weight, Activation f);

// Which rows of x meet which of several weights. It is filled in by a phase, before the products run.
struct Groups {
  std::vector<std::int32_t> first;   // by weight, its first row; and behind them the number of rows
  std::vector<std::int32_t> active;  // weights that have rows
};

// The weights of a mixture, those of an expert at one place; all of one shape.
struct Experts {
  using Weights = std::variant<std::vector<LinearWeight>, std::vector<QuantizedWeight>>;
  Weights gate_up, down;

  std::int64_t count() const;
};

// Checks that weights fit one another.
std::shared_ptr<Experts> make_experts(Experts::Weights gate_up, Experts::Weights down);

// The product of each row with its group's weight. The weights must outlive the phases.
Tensor grouped_linear(Runtime& runtime, const Tensor& x, const std::vector<LinearWeight>& weights,
                      const std::shared_ptr<Groups>& groups);
Tensor grouped_linear(Runtime& runtime, const Tensor& x, const std::vector<QuantizedWeight>& weights,
                      const std::shared_ptr<Groups>& groups);

struct Routing {
  int top_k;
  bool renormalise;
  Activation activation;
};

Tensor moe(Runtime& runtime, const Tensor& x, const Tensor& router_logits, const std::shared_ptr<Experts>& experts,
           const Routing& routing);

// A pool of blocks. A layer's block is [K, V] x [kv heads] x a head's keys ([D / n][block_size][n], n elements in four
// bytes) or values ([block_size][D]), D padded to kHeadUnit; in int8, behind them, their scales (float32 [block_size]).
// Those of all layers lie together: memory is touched first as blocks are first used, and little of it in any one step.
struct KVCache {
  KVCache(int layers, int kv_heads, int head_dim, int block_size, DType dtype, std::int64_t num_blocks);

  bool quantized() const { return dtype == DType::int8; }
  std::size_t scales_at() const;    // where they begin among a head's bytes
  std::size_t head_bytes() const;   // of the keys, or of the values, of a head in a block
  std::size_t block_bytes() const;  // of a layer's block
  std::size_t stride() const { return static_cast<std::size_t>(layers) * block_bytes(); }  // from block to block
  std::byte* layer(int index) const {
    return static_cast<std::byte*>(memory.data) + static_cast<std::size_t>(index) * block_bytes();
  }

  int layers, kv_heads, head_dim, block_size;
  DType dtype;
  std::int64_t num_blocks;
  Tensor memory;
};

Tensor attn_prep(Runtime& runtime, const Tensor& qkv, int num_heads, const std::optional<Rotation>& rope,
                 const std::shared_ptr<KVCache>& kv, int layer, const std::shared_ptr<Batch>& batch,
                 const AttentionNorms& norms);

// What is made of a query's product with a key.
struct Scores {
  float scale;
  int window;
  float soft_cap = 0;           // 0: none
  std::optional<Tensor> alibi;  // float32 [heads]
};

Tensor paged_attention(Runtime& runtime, const Tensor& q, const std::shared_ptr<KVCache>& kv, int layer,
                       const std::shared_ptr<Batch>& batch, const Scores& scores);

Sampled sample(Runtime& runtime, const Tensor& logits, const std::shared_ptr<Batch>& batch);
Tensor accept(Runtime& runtime, const Tensor& ids, const std::shared_ptr<Batch>& batch);
Logprobs logprobs(Runtime& runtime, const Tensor& logits, const Tensor& ids, int k);

}  // namespace vllmlite::cpu
