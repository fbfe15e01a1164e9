// The blocks of ggml that GGUF files store weights in; vllmlite/weights/schemes/gguf_blocks.py documents their layout.
#pragma once

#include <string>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

// QuantizedStrips that are being made.
struct WritableStrips {
  std::uint8_t* codes;
  std::uint16_t* scales;
  std::int8_t* factors;
};

// A type of blocks.
struct BlockType {
  const char* name;
  int elements, bytes;
  Codes kind;
  // Writes the strip of `rows` rows, which are `stride` bytes apart and have `count` blocks each. These return whether
  // every scale is finite.
  bool (*put_strip)(const std::uint8_t* blocks, std::int64_t stride, int rows, std::int64_t count,
                    const WritableStrips& to);
  // Writes what a block means.
  bool (*decode)(const std::uint8_t* block, float* to);
};

// The type of a name. Throws std::invalid_argument for others.
const BlockType& block_type(const std::string& name);

// Blocks of a weight [rows, in], as bytes, in strips of the type's kind. These throw std::invalid_argument for scales
// that are not finite.
QuantizedPart strips_of_blocks(Runtime& runtime, const BlockType& type, const Tensor& blocks, std::int64_t rows,
                               std::int64_t in);

// Writes what blocks mean, rounded to the dtype of `to`, whose rows are of whole blocks.
void floats_of_blocks(Runtime& runtime, const BlockType& type, const Tensor& blocks, const Tensor& to);

}  // namespace vllmlite::cpu
