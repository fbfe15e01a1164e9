// The implementations of y = x @ w.T + bias, with x [m, k], w [n, k] and y [m, n], all row-major.
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

// Without tensor cores; the order of additions does not depend on m. For float32, and for shapes that the others do not
// support.
void multiply_by_dot_products(const Runtime& runtime, const Product& product);

// The order of additions does not depend on m; on tensor cores if these multiply the dtype.
void multiply_batch_invariant(const Runtime& runtime, const Product& product);

// For at most 8 rows of 16-bit x, on tensor cores. takes_skinny_product says whether the shape is supported. The kernel
// after this one begins when x is complete, so it may read x before it waits for the product.
bool takes_skinny_product(const Runtime& runtime, const Product& product);
void multiply_skinny(const Runtime& runtime, const Product& product);

// By cuBLASLt. Returns false if it has no algorithm for the product.
bool multiply_by_library(Runtime& runtime, const Product& product);

}  // namespace vllmlite::cuda
