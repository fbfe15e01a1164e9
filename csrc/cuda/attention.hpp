// Arguments of the kernels of paged attention. Query head h uses key/value head h * kv_heads / heads.
#pragma once

#include "cuda/batch.hpp"
#include "cuda/runtime.hpp"

namespace vllmlite::cuda {

constexpr int kMostSize = 256;               // elements of a head
constexpr int kMostSharedMemory = 99 << 10;  // bytes of shared memory of a thread block that sm_86 has

struct Attention {
  const void* q;             // [tokens, heads, size]
  const void* kv;            // a layer's blocks, [num_blocks, 2, kv_heads, block_size, width]
  const float* head_scales;  // [num_blocks, 2, kv_heads, block_size], what elements are multiplied by; null: 1
  void* out;                 // [tokens, heads, size]
  BatchView batch;
  const float* alibi;  // slopes by head; null: none
  float soft_cap;      // 0: none
  float scale;         // of scores, times that of the layer's keys
  float value_scale;   // of the layer's values
  int window, heads, kv_heads, size, width, block_size;
  std::int64_t num_blocks;
  int num_tokens, num_rows, num_work_items, num_work_lists, num_queries, num_tiles[kTileLists];
  DType dtype;
  CacheElement element;

  bool quantized() const { return element >= CacheElement::int8; }
};

// Any dtypes and sizes, in float32: the sums of a token depend on its own row and position alone.
void attend_batch_invariant(const Runtime& runtime, const Attention& attention);

// 16-bit tensor cores: rows of up to kDecodingQueries tokens, and longer ones. The first says whether both take it.
bool takes_tensor_cores(const Runtime& runtime, const Attention& attention);
void attend_decoding(Runtime& runtime, const Attention& attention);
template <typename E>
void attend_decoding_over(Runtime& runtime, const Attention& attention);  // a cache of these elements
void attend_prefilling(const Runtime& runtime, const Attention& attention);

// The latter with sm_90a's own instructions; the first says whether it takes what takes_tensor_cores takes.
bool takes_hopper(const Runtime& runtime, const Attention& attention);
void attend_prefilling_hopper(const Runtime& runtime, const Attention& attention);

}  // namespace vllmlite::cuda
