// The ops of the contract in vllmlite/backends/base.py. Each checks its arguments, issues kernels and returns the
// tensor that will hold the result.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/batch.hpp"
#include "cuda/runtime.hpp"

namespace vllmlite::cuda {

// Writes `source`, of any float dtype, to `target`, of as many elements, in that one's dtype.
void convert(Runtime& runtime, const Tensor& source, const Tensor& target);

Tensor embedding(Runtime& runtime, const Tensor& ids, const Tensor& table);
Tensor gather_rows(Runtime& runtime, const Tensor& x, const Tensor& index);
std::pair<Tensor, Tensor> rms_norm(Runtime& runtime, const Tensor& x, const Tensor& weight, float eps,
                                   const std::optional<Tensor>& residual);

enum class Gate { silu, gelu, gelu_tanh };
Tensor gated_activation(Runtime& runtime, const Tensor& x, Gate gate);

// A weight [out, in], row-major, and a bias [out], both of the backend's dtype.
struct LinearWeight {
  Tensor weight;
  std::optional<Tensor> bias;
};

// x @ weight.T + bias: [rows, in] -> [rows, out] of `dtype`, the backend's or float32.
Tensor linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight, DType dtype);

// A pool of blocks. A layer's block is [K, V] x [kv heads] x [block_size] x [width], where width is the head size,
// padded to kHeadUnit.
struct KVCache {
  static constexpr int kHeadUnit = 16;

  KVCache(Runtime& runtime, int layers, int kv_heads, int head_dim, int block_size, DType dtype,
          std::int64_t num_blocks);

  std::int64_t block_elements() const;  // of a layer's block
  Tensor layer(int index) const;        // [num_blocks, block_elements]

  int layers, kv_heads, head_dim, width, block_size;
  DType dtype;
  std::int64_t num_blocks;
  Tensor memory;
};

struct AttentionNorms {
  std::optional<Tensor> q, k;
  float eps = 0;
};

struct Rotation {
  Tensor cos_sin;  // float32 [positions, rotary_dim]
  int rotary_dim;
  bool interleaved;
};

Tensor attn_prep(Runtime& runtime, const Tensor& qkv, int num_heads, const std::optional<Rotation>& rope,
                 const KVCache& kv, int layer, const Batch& batch, const AttentionNorms& norms);
Tensor paged_attention(Runtime& runtime, const Tensor& q, const KVCache& kv, int layer, const Batch& batch, float scale,
                       int window);

struct Logprobs {
  Tensor chosen, rank, top_ids, top;
};

struct Sampled {
  Tensor ids;
  std::optional<Logprobs> logprobs;
};

Sampled sample(Runtime& runtime, const Tensor& logits, const Batch& batch);
Logprobs logprobs(Runtime& runtime, const Tensor& logits, const Tensor& ids, int k);

}  // namespace vllmlite::cuda
