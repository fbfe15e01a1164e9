// Products y = x @ w.T + bias of x [m, k], w [n, k], y [m, n], all row-major, by whoever does them best.
#pragma once

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

// The same on tensor cores where they multiply the dtype.
void multiply_in_fixed_order(const Runtime& runtime, const Product& product);

// Few rows of 16-bit x against streamed weights, on tensor cores. Says whether it takes the product.
bool takes_few_rows(const Runtime& runtime, const Product& product);
void multiply_few_rows(const Runtime& runtime, const Product& product);

// By cuBLASLt; false if it has no way to.
bool multiply_by_library(Runtime& runtime, const Product& product);

}  // namespace vllmlite::cuda
