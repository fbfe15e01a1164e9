// Device memory that can be taken away and put back at the same addresses, which tensors and recorded steps keep.
#pragma once

#include <cstddef>

namespace vllmlite::cuda {

class Mapping {
 public:
  // Reserves addresses for at least `bytes`, and maps memory there. OutOfMemory if there is too little.
  Mapping(int device, std::size_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return size_; }
  bool mapped() const { return mapped_; }

  // Frees the memory; no work that uses it may be running. If `keep`, the contents are copied to pinned host memory
  // first: OutOfMemory, and nothing freed, if that is too small.
  void release(bool keep);

  // Maps memory again, with the contents that were kept. OutOfMemory if there is too little; it may be called again.
  void restore();

 private:
  void map();

  int device_;
  void* data_ = nullptr;
  std::size_t size_ = 0;
  bool mapped_ = false;
  void* kept_ = nullptr;
};

}  // namespace vllmlite::cuda
