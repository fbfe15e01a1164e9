// Products of 8-bit floats (e4m3) with float32 scales: weights that are stored as such, and activations that are
// quantised before each product.
//
// A weight [rows, columns] has a scale for each row, or for each block of 128 x 128 elements. Activations are quantised
// by a scale for each row (by its largest magnitude or by a constant), or with blocks for each 128 columns of a row:
// scale = max(largest magnitude / 448, 2^-100), and an element x becomes x * (1 / scale), rounded to nearest, at most
// 448 in magnitude. Tensor cores add up 128 columns; such sums are added in float32, those of blocks times their
// scales.
#pragma once

#include <optional>
#include <vector>

#include "cuda/linear.hpp"

namespace vllmlite::cuda {

constexpr int kFp8Block = 128;

// Rows of a weight that are alike in all of this.
struct Fp8Rows {
  Tensor weight;                     // uint8 [rows, columns]
  Tensor scales;                     // float32 [rows], or [blocks of rows, blocks of columns]
  bool blocks;                       // which of the two
  std::optional<float> input_scale;  // the constant by which activations are quantised
  int rows = static_cast<int>(weight.shape[0]), columns = static_cast<int>(weight.shape[1]);
};

// Activations as products take them: e4m3 [m, columns], and float32 scales [blocks of columns or 1][m, padded].
struct Fp8Activations {
  Tensor values, scales;
};

// Memory for m rows of activations that are to be multiplied by such rows of a weight.
Fp8Activations make_fp8_activations(Runtime& runtime, std::int64_t m, const Fp8Rows& rows);

// The rows of a matrix in the runtime's dtype, each by its largest magnitude; columns are multiples of 8.
Fp8Activations quantise_fp8(Runtime& runtime, const Tensor& x);
// The same as `rows` says, which multiply them.
Fp8Activations quantise_fp8(Runtime& runtime, const Tensor& x, const Fp8Rows& rows);

// Rows of a mixture's pairs, in sorted order, whose experts have constants that quantise activations. With `of_tokens`,
// x has rows of tokens instead.
struct Fp8Pairs {
  const std::int32_t *pairs, *experts;  // [pairs]: the number of a sorted pair, and the expert of a number
  const float* constants;               // by expert
  int count, top_k;
  bool of_tokens;
};

// The rows of x for such pairs.
Fp8Activations quantise_fp8(Runtime& runtime, const Tensor& x, const Fp8Pairs& pairs);

// The scales of a product: of x [blocks of columns or 1][stride], of w as above.
struct Fp8Scales {
  const float *x, *w;
  int stride;
};

// x and w are of e4m3, rows of y `stride` apart; `dtype` is the bias's.
struct Fp8Product : Product {
  Fp8Scales scales;
  int stride;
  bool blocks;
};

// Whether weights of so many columns are multiplied on this device in the runtime's dtype.
bool takes_fp8(const Runtime& runtime, int columns);

// The weight as a matrix of the runtime's dtype.
Tensor dequantise(Runtime& runtime, const std::vector<Fp8Rows>& parts);

// y = x @ w.T + bias of x [m, columns] in the runtime's dtype, or quantised for all of the parts.
void multiply_fp8(Runtime& runtime, const Tensor& x, const std::vector<Fp8Rows>& parts, const Tensor* bias,
                  const Tensor& y);
void multiply_fp8(Runtime& runtime, const Fp8Activations& x, const std::vector<Fp8Rows>& parts, const Tensor* bias,
                  const Tensor& y);

// Ways to multiply: at most 8 rows of x; any number, outputs summed up in one order; and on Hopper many rows.
bool takes_skinny_fp8(const Fp8Product& product);
void multiply_skinny_fp8(const Runtime& runtime, const Fp8Product& product);
void multiply_fp8_tiles(const Runtime& runtime, const Fp8Product& product);
bool takes_fp8_on_hopper(const Runtime& runtime, const Fp8Product& product);
void multiply_fp8_on_hopper(const Runtime& runtime, const Fp8Product& product);

}  // namespace vllmlite::cuda
