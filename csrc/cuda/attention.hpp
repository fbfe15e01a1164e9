// What the kernels of paged attention are given. Query head h shares key/value head h * kv_heads / heads.
#pragma once

#include "cuda/batch.hpp"
#include "cuda/runtime.hpp"

namespace vllmlite::cuda {

constexpr int kMostSize = 256;       // elements of a head
constexpr int kWideRoom = 99 << 10;  // bytes of shared memory for heads of more than 128 on tensor cores: sm_86 has it

struct Attention {
  const void* q;   // [tokens, heads, size]
  const void* kv;  // a layer's blocks, [num_blocks, 2, kv_heads, block_size, width]
  void* out;       // [tokens, heads, size]
  BatchView batch;
  const float* alibi;  // slopes by head; null: none
  float soft_cap;      // 0: none
  float scale;
  int window, heads, kv_heads, size, width, block_size;
  std::int64_t num_blocks;
  int num_tokens, num_rows, num_items, num_shares, num_tiles[kTileLists];
  DType dtype, kv_dtype;
};

// Any dtypes and sizes, exact in float32: a token's sums depend on its own row alone.
void attend_in_order(const Runtime& runtime, const Attention& attention);

// 16-bit tensor cores: rows of one token, and rows of several. The first says whether both take it.
bool takes_tensor_cores(const Runtime& runtime, const Attention& attention);
void attend_decoding(Runtime& runtime, const Attention& attention);
void attend_prefilling(const Runtime& runtime, const Attention& attention);

// The latter where sm_90a's own instructions serve; the first says whether they do for what takes_tensor_cores.
bool takes_hopper(const Runtime& runtime, const Attention& attention);
void attend_prefilling_hopper(const Runtime& runtime, const Attention& attention);

}  // namespace vllmlite::cuda
