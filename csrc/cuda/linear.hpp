// Products y = x @ w.T + bias of x [m, k], w [n, k], y [m, n], all row-major, by whoever does them best.
#pragma once

#include "cuda/ops.hpp"
#include "cuda/runtime.hpp"

namespace vllmlite::cuda {

struct Product {
  const void *x, *w, *bias;
  void* y;
  int m, n, k;
  DType dtype;      // of x, w and the bias
  DType out_dtype;  // of y: the same, or float32
};

// Sums each output in one order whatever m is: float32, and what nobody else takes.
void multiply_in_order(const Runtime& runtime, const Product& product);

// Few rows of 16-bit x against streamed weights, on tensor cores. Says whether it takes the product.
bool takes_few_rows(const Runtime& runtime, const Product& product);

// Such a product and what goes with it.
struct FewRows {
  const void *x, *w, *bias;
  void* y;
  int m, n, k;
  // Where x is normalised first: the norm's weight, and shares of the sums of squares of x, [m, num_squares].
  const void* norm;
  const float* squares;
  int num_squares;
  float eps;
  // Where y is the residual, to be added to: shares of its sums of squares, [m, squares_of_few_rows(n)].
  float* squares_out;
  // Where the first half of the outputs gates the second, of a normalised x: y is [m, n / 2].
  bool gates;
  Gate gate;
};

void multiply_few_rows(const Runtime& runtime, const FewRows& given, DType dtype, DType out);
int squares_of_few_rows(const Runtime& runtime, int n);

// By cuBLASLt; false if it has no way to.
bool multiply_by_library(Runtime& runtime, const Product& product);

}  // namespace vllmlite::cuda
