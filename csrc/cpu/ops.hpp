// The ops of the contract in vllmlite/backends/base.py. Each checks its arguments, issues phases and returns the tensor
// that will hold the result. Activations are float32, or bfloat16 if the next product takes only that.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/batch.hpp"
#include "cpu/runtime.hpp"

namespace vllmlite::cpu {

// Returns `x`, converted if it has another dtype.
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

// Rows of a weight [rows, in]: floats, row-major, or grouped integers in tiles (see GroupedLayout).
struct LinearPart {
  Tensor data;  // [rows, in], or uint8 [tiles, bytes of a tile]
  std::int64_t rows, in;
  GroupedLayout layout = {};
  std::optional<Tensor> order = {};  // int32 [in]: column i is multiplied with column order[i] of x; none: with i

  bool grouped() const { return layout.bits != 0; }
  // The size of a row of floats, or of a tile.
  std::size_t unit_bytes() const;
  // The data of a row; of grouped integers, of the tile that begins with it.
  const std::byte* at(std::int64_t row) const;
};

// A weight [out, in]: the rows of its parts, one part after the other.
struct LinearWeight {
  std::vector<LinearPart> parts;
  std::optional<Tensor> bias;  // float32 [out]

  std::int64_t in() const { return parts.front().in; }
  std::int64_t out() const;
  bool grouped() const { return parts.front().grouped(); }
};

// Makes a weight of parts. Throws std::invalid_argument if their widths or dtypes differ, or if the bias does not fit.
LinearWeight make_weight(std::vector<LinearPart> parts, std::optional<Tensor> bias);

// Makes a part of floats [rows, in].
LinearPart float_part(Tensor data);

// The parts of a weight in a scheme of vllmlite/weights/schemes/grouped.py.
struct GroupedWeight {
  int bits;
  std::int64_t columns, group_size;
  Tensor qweight, scales;
  std::optional<Tensor> zeros, order;
  bool floats = false;  // qweight holds floats: e2m1 of 4 bits, e4m3 of 8 bits
};

// Throws std::invalid_argument if the tensors of a stored weight do not fit together.
void check_grouped(const GroupedWeight& stored);

// Repacks a stored weight into tiles. Throws std::invalid_argument for parts that do not fit together.
LinearPart grouped_part(Runtime& runtime, const GroupedWeight& stored);

Tensor linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight);

// gated_activation of linear. With many rows of x, the activation is applied to each block of results at once, so that
// they are not all in memory.
Tensor gated_linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight, Activation f);

// Rows of a quantised weight [rows, in], in the tiles of vllmlite/weights/schemes/tiles.py.
struct QuantizedPart {
  TileScheme scheme;
  Tensor qweight;                    // uint8 [tiles, groups, bytes of a group]
  Tensor scales;                     // [tiles, units, kTileRows], or [tiles, units, 2, kTileRows]; w8a8: RowScales
  std::optional<Tensor> sub_scales;  // int8 [tiles, groups, n, kTileRows]
  std::int64_t rows;
  InputScale input = {};
  std::optional<Tensor> order = {};  // int32 [in]: the column of x for each column of w; none: the same
  std::optional<Tensor> zeros = {};  // uint8 [tiles, scale groups, kTileRows], if the scheme is grouped
  int groups_per_scale = 1;          // if the scheme is grouped

  std::int64_t groups() const { return qweight.shape[1]; }
  QuantizedTiles from(std::int64_t tile) const;
};

// A weight [out, in]: the rows of its parts, one part after the other. Their schemes may differ.
struct QuantizedWeight {
  std::vector<QuantizedPart> parts;
  std::int64_t in;
  std::optional<Tensor> bias;  // float32 [out]

  std::int64_t groups() const { return parts.front().groups(); }
  std::int64_t out() const;
};

// Allocates uninitialised tiles for a weight [rows, in].
QuantizedPart allocate_tiles(TileScheme scheme, std::int64_t rows, std::int64_t in);

// Quantises float rows [out, in], whose values must be finite, to int8 or int4.
QuantizedPart quantize(Runtime& runtime, const Tensor& w, TileScheme scheme);

// Packs a w8a8 weight: int8 values [out, in], float32 scales [out], int8 zeros [out] if there are any.
QuantizedPart w8a8_part(Runtime& runtime, const Tensor& values, const Tensor& scales,
                        const std::optional<Tensor>& zeros, InputScale input);

// Packs a weight in groups, for products that quantise x.
QuantizedPart grouped_tiles(Runtime& runtime, const GroupedWeight& stored);

// Makes a weight of parts. Throws std::invalid_argument if they do not fit each other, `in`, or the bias.
QuantizedWeight make_quantized(std::vector<QuantizedPart> parts, std::int64_t in, std::optional<Tensor> bias);

// The product with x, whose rows are quantised to int8 first.
Tensor linear(Runtime& runtime, const Tensor& x, const QuantizedWeight& weight);
Tensor gated_linear(Runtime& runtime, const Tensor& x, const QuantizedWeight& weight, Activation f);

// The rows of x that each of several weights multiplies. A phase fills it in before the products run.
struct Groups {
  std::vector<std::int32_t> first;   // the first row of each weight; after them, the number of rows
  std::vector<std::int32_t> active;  // weights with at least one row
};

// The weights of a mixture of experts, all of one shape; an expert's are at the same index of both lists.
struct Experts {
  using Weights = std::variant<std::vector<LinearWeight>, std::vector<QuantizedWeight>>;
  Weights gate_up, down;

  std::int64_t count() const;
};

// Makes a mixture of experts. Throws std::invalid_argument if the weights do not fit each other.
std::shared_ptr<Experts> make_experts(Experts::Weights gate_up, Experts::Weights down);

// Multiplies each row of x with its group's weight. The weights must outlive the phases.
Tensor grouped_linear(Runtime& runtime, const Tensor& x, const std::vector<LinearWeight>& weights,
                      const std::shared_ptr<Groups>& groups);
Tensor grouped_linear(Runtime& runtime, const Tensor& x, const std::vector<QuantizedWeight>& weights,
                      const std::shared_ptr<Groups>& groups);

// The change that an adapter makes to a weight: it adds scale * b * (its rows of a) to some of its parts, the rows of
// W. Where there is a gain, the results of W are multiplied by it before, and the shift is added.
struct LowRankChange {
  struct Part {
    std::int64_t first_column, columns;  // of the results
    std::int64_t first_rank, rank;       // its rows of a
    float scale;
    Tensor b;                    // [blocks][rank][kLowRankColumns]
    std::optional<Tensor> gain;  // float32 [2, columns]: gain and shift
  };

  std::int64_t expand_tasks() const;

  Tensor a;  // [sum of ranks, in]
  std::vector<Part> parts;
};

// The second factor for a part of a weight, and which of the first factors it belongs to.
struct LowRankOutput {
  std::size_t part, input;
  Tensor b;  // [rows of the part, rank]
  float scale;
  std::optional<Tensor> gain;  // float32 [2, rows of the part]: gain and shift
};

// The changes of one weight by all resident adapters.
struct LowRankTable {
  LowRankTable(std::vector<std::int64_t> rows_of_parts, std::int64_t the_columns, int adapters, int rank);

  std::int64_t out() const;
  // Replaces the change by adapter `index`; without outputs, it is removed.
  void set(int index, const std::vector<Tensor>& inputs, const std::vector<LowRankOutput>& outputs);

  std::vector<std::int64_t> rows;  // of each part of the weight
  std::int64_t columns, max_rank;
  std::vector<std::shared_ptr<const LowRankChange>> changes;  // by adapter; null: none
};

// The tables of the weights of a mixture of experts, or of one weight.
using LowRankTables = std::vector<std::shared_ptr<LowRankTable>>;

// Applies the adapters of the rows of x to y, the result of the layer. An x of int32 ids stands for rows of zeros with
// a one at the id: the layer is an embedding. `rows` may be filled in by an earlier phase.
Tensor add_lora(Runtime& runtime, const Tensor& y, const Tensor& x, const std::shared_ptr<const LowRankTables>& tables,
                const std::shared_ptr<AdapterRows>& rows);

// The changes of the weights of a mixture of experts.
struct ExpertTables {
  std::shared_ptr<const LowRankTables> gate_up, down;
};

struct Routing {
  int top_k;
  bool renormalise;
  Activation activation;
};

// `tables` and `adapters`, of the tokens, are given together.
Tensor moe(Runtime& runtime, const Tensor& x, const Tensor& router_logits, const std::shared_ptr<Experts>& experts,
           const Routing& routing, const std::shared_ptr<ExpertTables>& tables = nullptr,
           const std::shared_ptr<AdapterRows>& adapters = nullptr);

// The block pool. For each layer, a block holds the keys and then the values of each key/value head: keys as
// [D / n][block_size][n], where n elements fill four bytes, and values as [block_size][D], with D padded to kHeadUnit;
// with head scales, these follow, float32 [block_size]. The layers of a block are contiguous, so that
// memory is first touched when a block is first used, a little in each step.
struct KVCache : CacheSpec {
  KVCache(const CacheSpec& spec, std::int64_t num_blocks);

  // Which of the quantised formats it has.
  std::size_t byte_format() const {
    return static_cast<std::size_t>(element) - static_cast<std::size_t>(CacheElement::int8);
  }
  std::size_t scales_at() const;    // offset of the scales in a head's bytes
  std::size_t head_bytes() const;   // size of the keys, or of the values, of a head in a block
  std::size_t block_bytes() const;  // size of one layer of a block
  std::size_t stride() const { return static_cast<std::size_t>(layers) * block_bytes(); }  // from block to block
  std::byte* layer(int index) const {
    return static_cast<std::byte*>(memory.data) + static_cast<std::size_t>(index) * block_bytes();
  }
  // Copies blocks to or from rows of stride() bytes in `host`. std::out_of_range, and nothing copied, if there is no
  // such block or row.
  void copy(std::span<const std::int32_t> blocks, std::span<const std::int32_t> places, std::span<std::byte> host,
            bool to_host) const;

  std::int64_t num_blocks;
  Tensor memory;
};

// Copies block sources[i] of one pool to block targets[i] of another pool of the same form, or of the same pool.
void copy_blocks(Runtime& runtime, const std::shared_ptr<KVCache>& source, std::vector<std::int32_t> sources,
                 const std::shared_ptr<KVCache>& target, std::vector<std::int32_t> targets);

Tensor attn_prep(Runtime& runtime, const Tensor& qkv, int num_heads, const std::optional<Rotation>& rope,
                 const std::shared_ptr<KVCache>& kv, int layer, const std::shared_ptr<Batch>& batch,
                 const AttentionNorms& norms);

// How products of queries and keys become attention scores.
struct Scores {
  float scale;
  int window;
  float soft_cap = 0;           // 0: none
  std::optional<Tensor> alibi;  // float32 [heads]
  std::optional<Tensor> sinks;  // float32 [heads]
};

Tensor paged_attention(Runtime& runtime, const Tensor& q, const std::shared_ptr<KVCache>& kv, int layer,
                       const std::shared_ptr<Batch>& batch, const Scores& scores);

// Adds bias, mask and penalties to the logits of a sampled position, in this order.
void edit(std::span<float> logits, const Batch& batch, std::size_t sampled);
// Throws std::invalid_argument if logits do not fit the batch's sampled positions.
void check_logits(const Tensor& logits, const Batch& batch);

Continuations choose_beams(Runtime& runtime, const Tensor& logits, const std::shared_ptr<Batch>& batch, BeamRows beams,
                           int k);
Sampled sample(Runtime& runtime, const Tensor& logits, const std::shared_ptr<Batch>& batch);
Tensor probabilities(Runtime& runtime, const Tensor& logits, const std::shared_ptr<Batch>& batch);
Tensor accept(Runtime& runtime, const Tensor& ids, const std::shared_ptr<Batch>& batch);
Logprobs logprobs(Runtime& runtime, const Tensor& logits, const Tensor& ids, int k);

}  // namespace vllmlite::cpu
