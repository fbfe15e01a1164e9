// Memory for what ops return. A piece that is given back goes to the next op that wants about its size: ops run in the
// order in which they were issued, so whoever reads a piece is before whoever overwrites it.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <vector>

#include "tensor/tensor.hpp"

namespace vllmlite::cpu {

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // An uninitialised tensor that returns here when its last copy goes.
  Tensor make(std::vector<std::int64_t> shape, DType dtype);

  // Whether the tensor's memory came from an arena.
  static bool owns(const Tensor& tensor);

 private:
  struct Return;

  std::map<std::size_t, std::vector<void*>> free_;
};

// Uninitialised memory of its own, 64-byte aligned, on huge pages where it is large.
Tensor allocate(std::vector<std::int64_t> shape, DType dtype);

}  // namespace vllmlite::cpu
