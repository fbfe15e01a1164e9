// Memory for the results of ops. A released piece goes to the next op that needs about its size. That is safe because
// ops run in the order in which they were issued: every reader of a piece runs before the op that overwrites it.
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

  // An uninitialised tensor whose memory returns to this arena when its last copy is destroyed.
  Tensor make(std::vector<std::int64_t> shape, DType dtype);

  // Gives the pages of the pieces that no tensor uses back to the system. Their addresses stay: recordings use them.
  void discard();

  // Whether the tensor's memory came from an arena.
  static bool owns(const Tensor& tensor);

 private:
  struct Return;

  std::map<std::size_t, std::vector<void*>> free_;
};

// Uninitialised memory that belongs to no arena, 64-byte aligned, on huge pages if it is 2 MiB or more.
Tensor allocate(std::vector<std::int64_t> shape, DType dtype);

// Gives the whole pages of a tensor's memory back to the system. The tensor stays usable; its contents are lost.
void discard(const Tensor& tensor);

}  // namespace vllmlite::cpu
