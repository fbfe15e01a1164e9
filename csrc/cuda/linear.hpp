// Ways to compute y = x @ w.T + bias of x [m, k], w [n, k], y [m, n], all row-major.
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

// Without tensor cores, each output summed up in one order whatever m is: float32, and what the others do not take.
void multiply_by_dot_products(const Runtime& runtime, const Product& product);

// In one order too, on tensor cores where they multiply the dtype.
void multiply_batch_invariant(const Runtime& runtime, const Product& product);

// At most 8 rows of 16-bit x, on tensor cores; first, whether it takes the product.
bool takes_skinny_product(const Runtime& runtime, const Product& product);
void multiply_skinny(const Runtime& runtime, const Product& product);

// By cuBLASLt; false if it has no way to.
bool multiply_by_library(Runtime& runtime, const Product& product);

}  // namespace vllmlite::cuda
