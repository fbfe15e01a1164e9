// Host memory for the blocks of a key/value cache.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "cuda/ops.hpp"

namespace vllmlite::cuda {

// Pinned memory of `places` rows, each of which holds a block: the elements of its layers, then their head scales, then
// padding.
// Copies run on a stream of their own, after the work issued before them.
class HostBlocks {
 public:
  HostBlocks(Runtime& runtime, std::shared_ptr<KVCache> kv, std::int64_t places);
  ~HostBlocks();
  HostBlocks(const HostBlocks&) = delete;
  HostBlocks& operator=(const HostBlocks&) = delete;

  std::int64_t places() const { return places_; }
  std::size_t block_bytes() const { return block_bytes_; }
  void* data() const { return data_; }

  // Copies blocks to or from places. Work issued later waits for copies to the device; for those to the host it waits
  // from join() on.
  void copy(std::span<const std::int32_t> blocks, std::span<const std::int32_t> places, bool to_host);
  void join();
  // Waits for all copies.
  void wait();

 private:
  Runtime& runtime_;
  std::shared_ptr<KVCache> kv_;
  std::int64_t places_;
  std::size_t block_bytes_;
  void* data_ = nullptr;
  CUstream_st* stream_ = nullptr;
  CUevent_st* ready_ = nullptr;   // the work before the copies
  CUevent_st* copied_ = nullptr;  // the last copies
};

}  // namespace vllmlite::cuda
