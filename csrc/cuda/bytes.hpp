// Products of 8-bit elements with float32 scales: weights that are stored as such, and activations that are quantised
// before each product. Elements are floats (e4m3), as vllmlite/weights/schemes/float8.py defines their products, or
// integers, as w8a8.py does.
//
// Floats: a weight [rows, columns] has a scale for each row, or for each block of 128 x 128 elements. Activations are
// quantised by a scale for each row (by its largest magnitude or by a constant), or with blocks for each 128 columns of
// a row: scale = max(largest magnitude / 448, 2^-100), and an element x becomes x * (1 / scale), rounded to nearest, at
// most 448 in magnitude. Tensor cores add up 128 columns; such sums are added in float32, those of blocks times their
// scales.
//
// Integers: a row of a weight has a scale and a zero, a row of activations as well. Tensor cores add up products of
// elements as they are. Sums are exact, the zeros' parts are taken away afterwards: sum of (q - z)(w - v) = sum of q w
// - z sum of w - v sum of (q - z).
#pragma once

#include <optional>
#include <vector>

#include "cuda/linear.hpp"

namespace vllmlite::cuda {

constexpr int kFp8Block = 128;

// How rows of activations are quantised.
struct ByteInputs {
  bool operator==(const ByteInputs&) const = default;

  bool integers = false;   // or floats
  bool blocks = false;     // floats with a scale for each 128 columns
  bool symmetric = true;   // integers without a zero, where the scale is not constant
  bool with_sums = false;  // integers whose sums a weight with zeros needs
  float constant = 0;      // the scale, if it is not that of the row
  std::int32_t zero = 0;   // of integers with a constant scale
};

// The zero of a row of integers, and the sum of its elements: of a weight's as they are, of activations' minus the
// zero.
struct ByteZero {
  std::int32_t zero, sum;
};

// Rows of a weight that are alike in all of this.
struct ByteRows {
  Tensor weight;                // uint8 [rows, columns, padded to 16 with integers of 0]
  Tensor scales;                // float32 [rows], or [blocks of rows, blocks of columns]
  std::optional<Tensor> zeros;  // of integers: ByteZero [rows]
  ByteInputs inputs;
  int rows, columns;
};

// Activations as products take them: uint8 [m, columns, padded], float32 scales [blocks of columns or 1][m, padded],
// and of integers ByteZero [m].
struct ByteActivations {
  Tensor values, scales, zeros;
};

// Memory for m rows of `columns` activations.
ByteActivations make_byte_activations(Runtime& runtime, std::int64_t m, int columns, const ByteInputs& inputs);

// Quantises the rows of a matrix in the runtime's dtype.
ByteActivations quantise_bytes(Runtime& runtime, const Tensor& x, const ByteInputs& inputs);

// The constants that quantise the activations of an expert.
struct ByteConstant {
  float scale;
  std::int32_t zero;
};

// Rows of a mixture's pairs, in sorted order, whose experts have constants. With `of_tokens`, x has rows of tokens
// instead.
struct BytePairs {
  const std::int32_t *pairs, *experts;  // [pairs]: the number of a sorted pair, and the expert of a number
  const ByteConstant* constants;        // by expert
  int count, top_k;
  bool of_tokens;
};

// The rows of x for such pairs; the constants replace those of `inputs`.
ByteActivations quantise_bytes(Runtime& runtime, const Tensor& x, const ByteInputs& inputs, const BytePairs& pairs);

// The scales of a product: of x [blocks of columns or 1][stride], of w as above; and the zeros of integers.
struct ByteScales {
  const float *x, *w;
  int stride;
  const ByteZero *x_zeros, *w_zeros;
};

// x and w are of bytes, k padded, rows of y `stride` apart; `dtype` is the bias's.
struct ByteProduct : Product {
  ByteScales scales;
  int stride;
  bool blocks, integers;
};

// Returns whether this device multiplies 8-bit float weights with this number of columns in the runtime's dtype.
bool takes_fp8(const Runtime& runtime, int columns);

// The weight as a matrix of the runtime's dtype.
Tensor dequantise(Runtime& runtime, const std::vector<ByteRows>& parts);

// y = x @ w.T + bias of x [m, columns] in the runtime's dtype, or quantised for all of the parts.
void multiply_bytes(Runtime& runtime, const Tensor& x, const std::vector<ByteRows>& parts, const Tensor* bias,
                    const Tensor& y);
void multiply_bytes(Runtime& runtime, const ByteActivations& x, const std::vector<ByteRows>& parts, const Tensor* bias,
                    const Tensor& y);

// Ways to multiply: at most 8 rows of x; any number, outputs summed up in one order; and on Hopper many rows of floats.
bool takes_skinny_bytes(const Runtime& runtime, const ByteProduct& product);
void multiply_skinny_bytes(const Runtime& runtime, const ByteProduct& product);
void multiply_byte_tiles(const Runtime& runtime, const ByteProduct& product);
bool takes_fp8_on_hopper(const Runtime& runtime, const ByteProduct& product);
void multiply_fp8_on_hopper(const Runtime& runtime, const ByteProduct& product);

}  // namespace vllmlite::cuda
