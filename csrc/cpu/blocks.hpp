// ggml's blocks, of which the weights in GGUF files are made. vllmlite/weights/gguf_blocks.py says what is in them.
#pragma once

#include <string>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

// Scales of a block as they stand there: float16 bits, and what those of its groups are multiplied by.
struct BlockScales {
  std::uint16_t floats[2];           // of the scale; of the offset
  std::int8_t factors[kUnitGroups][2];  // of a group, in the order of the layout
};

struct BlockType {
  const char* name;
  int elements, bytes;
  Codes kind;
  // Four codes a word, in the order of elements.
  void (*read_codes)(const std::uint8_t* block, int group, std::uint32_t* quads);
  BlockScales (*read_scales)(const std::uint8_t* block);
};

// The type of a name. Throws std::invalid_argument for others.
const BlockType& block_type(const std::string& name);

// Blocks of a weight [rows, in], as bytes, in strips of the type's kind.
QuantizedPart strips_of_blocks(Runtime& runtime, const BlockType& type, const Tensor& blocks, std::int64_t rows,
                               std::int64_t in);

// Writes what blocks mean, rounded to the dtype of `to`, whose rows are of whole blocks.
void floats_of_blocks(Runtime& runtime, const BlockType& type, const Tensor& blocks, const Tensor& to);

}  // namespace vllmlite::cpu
