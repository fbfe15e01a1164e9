// Integer codes as quantised checkpoints pack them, brought into rows of 4 or 8 bits a code. StoredCodes.repacked in
// vllmlite/weights/schemes/codes.py is the reference.
#pragma once

#include <optional>

#include "cpu/runtime.hpp"

namespace vllmlite::cpu {

enum class Packing : std::uint8_t {
  rows,   // each row is a stream of bits, low bits first, which unused bytes may follow
  words,  // 32-bit words [columns * bits / 32, rows]: each row's stream, word by word
  awq,    // 32-bit words [columns, rows / 8] of eight rows' 4-bit codes, in the order that AWQ has
};

struct StoredCodes {
  Packing packing;
  int bits;
  std::int64_t rows, columns;
  Tensor data;                  // uint8 [n]
  std::optional<Tensor> order;  // int32 [columns]: the stored column of each column of the result; none: the same
  int added;                    // to every code, modulo 256
  int to_bits;                  // of a code of the result
};

// Codes as uint8 [rows, ceil(columns * to_bits / 8)]. std::invalid_argument for parts that do not fit.
Tensor repack(Runtime& runtime, const StoredCodes& codes);

}  // namespace vllmlite::cpu
