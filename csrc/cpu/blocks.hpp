// The blocks of ggml that GGUF files store weights in; vllmlite/weights/schemes/gguf_blocks.py documents their layout.
#pragma once

#include <string>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

// QuantizedTiles that can be written.
struct WritableTiles {
  std::uint8_t* qweight;
  std::uint16_t* scales;
  std::int8_t* sub_scales;
};

// A block type of ggml.
struct BlockType {
  const char* name;
  int elements, bytes;
  TileScheme scheme;
  // Repacks `rows` rows of `count` blocks each, `stride` bytes apart, into a tile. Returns whether every scale is
  // finite.
  bool (*write_tile)(const std::uint8_t* blocks, std::int64_t stride, int rows, std::int64_t count,
                     const WritableTiles& to);
  // Dequantises a block. Returns whether every scale is finite.
  bool (*decode)(const std::uint8_t* block, float* to);
};

// Returns the block type called `name`. Throws std::invalid_argument if there is none.
const BlockType& block_type(const std::string& name);

// Repacks the blocks of a weight [rows, in] into tiles of the type's scheme. Throws std::invalid_argument if a scale is
// not finite.
QuantizedPart tiles_of_blocks(Runtime& runtime, const BlockType& type, const Tensor& blocks, std::int64_t rows,
                              std::int64_t in);

// Dequantises blocks, rounding to the dtype of `to`, whose rows must consist of whole blocks. Throws
// std::invalid_argument if a scale is not finite.
void dequantize_blocks(Runtime& runtime, const BlockType& type, const Tensor& blocks, const Tensor& to);

}  // namespace vllmlite::cpu
