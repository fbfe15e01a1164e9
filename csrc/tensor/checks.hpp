// Checks of op arguments: std::invalid_argument for a shape, TypeError for a dtype, std::out_of_range for an index.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "tensor/tensor.hpp"

namespace vllmlite {

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

inline void check_index(const char* what, std::int64_t value, std::int64_t limit, std::int64_t least = 0) {
  if (value < least || value >= limit)
    throw std::out_of_range(std::string(what) + " " + std::to_string(value) + " is not within " +
                            std::to_string(least) + " and " + std::to_string(limit - 1));
}

inline void check_indices(const char* what, std::span<const std::int32_t> values, std::int64_t limit,
                          std::int64_t least = 0) {
  for (const std::int32_t value : values) check_index(what, value, limit, least);
}

}  // namespace vllmlite
