// Device memory: taken from the driver in segments, handed out in blocks, and kept when blocks come back, so that a
// step asks the driver for nothing. Whoever takes a block uses it on one stream, hence one that comes back is free at
// once: what is issued next comes after whatever still reads it.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace vllmlite::cuda {

class Pool : public std::enable_shared_from_this<Pool> {
 public:
  // Memory of recorded steps is never given back: they keep addresses of blocks that nobody owns any more.
  explicit Pool(int device, bool recorded = false) : device_(device), recorded_(recorded) {}
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Memory aligned to 512 bytes, which goes back to the pool with its last owner. OutOfMemory if there is none left.
  std::shared_ptr<void> take(std::size_t bytes);

 private:
  struct Block;
  using Idle = std::multimap<std::size_t, Block*>;
  struct Block {
    char* data;
    std::size_t size;
    bool small;
    bool idle = false;
    Block* previous = nullptr;  // neighbours in the segment
    Block* next = nullptr;
    Idle::iterator place{};  // while idle
  };

  Block* segment(std::size_t bytes, bool small);
  bool give_back_segments();
  void rest(Block* block);
  void wake(Block* block);
  void give(Block* block);

  int device_;
  bool recorded_;
  std::mutex mutex_;
  Idle idle_[2];  // large blocks, small blocks
};

}  // namespace vllmlite::cuda
