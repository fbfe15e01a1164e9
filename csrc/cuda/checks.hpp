// What ops check of their arguments.
#pragma once

#include <string>
#include <vector>

#include "tensor/tensor.hpp"

namespace vllmlite::cuda {

inline void check_rank(const Tensor& tensor, std::size_t rank, const char* what) {
  if (tensor.shape.size() != rank)
    throw std::invalid_argument(std::string(what) + " must have " + std::to_string(rank) + " dimensions, not shape " +
                                describe(tensor.shape));
}

inline void check_shape(const Tensor& tensor, const std::vector<std::int64_t>& shape, const char* what) {
  if (tensor.shape != shape)
    throw std::invalid_argument(std::string(what) + " must be " + describe(shape) + ", not " + describe(tensor.shape));
}

inline void check_dtype(const Tensor& tensor, DType dtype, const char* what) {
  if (tensor.dtype != dtype)
    throw TypeError(std::string(what) + " must be " + std::string(name(dtype)) + ", not " + describe(tensor));
}

[[noreturn]] inline void complain(const std::string& what, std::int64_t value, std::int64_t limit) {
  throw std::out_of_range(what + " " + std::to_string(value) + " is not within 0 and " + std::to_string(limit - 1));
}

inline void check_all(const char* what, const std::vector<std::int32_t>& values, std::int64_t limit,
                      std::int32_t least = 0) {
  for (const std::int32_t value : values)
    if (value < least || value >= limit) complain(what, value, limit);
}

}  // namespace vllmlite::cuda
