// A pool of device memory: allocated from the driver in segments, handed out in blocks, and kept when blocks are
// released, so that a step never calls the driver's allocator. All blocks are used on one stream, so a released block
// is free at once: work issued later runs after everything that still reads it.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/mapping.hpp"

namespace vllmlite::cuda {

class Pool : public std::enable_shared_from_this<Pool> {
 public:
  // With `recorded`, segments are never freed: recorded steps keep addresses of blocks that were released. Memory of a
  // `movable` pool can be released and restored.
  explicit Pool(int device, bool recorded = false, bool movable = false)
      : device_(device), recorded_(recorded), movable_(movable) {}
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Memory aligned to 512 bytes, which returns to the pool with its last owner. OutOfMemory if none is left.
  std::shared_ptr<void> take(std::size_t bytes);

  // Frees the device memory of a movable pool, in which no work may be running; blocks keep their addresses. If `keep`,
  // their contents are kept in host memory: OutOfMemory, and nothing freed, if that is too small.
  void release(bool keep);

  // Bytes of device memory that a movable pool has.
  std::size_t held_bytes();

  // Undoes release(). OutOfMemory if there is too little memory; it may be called again.
  void restore();

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
  void* allocate(std::size_t bytes);
  void free(void* data);
  bool give_back_segments();
  void rest(Block* block);
  void wake(Block* block);
  void give(Block* block);

  int device_;
  bool recorded_, movable_;
  std::mutex mutex_;
  Idle idle_[2];                                        // large blocks, small blocks
  std::map<void*, std::unique_ptr<Mapping>> mappings_;  // the segments of a movable pool
};

}  // namespace vllmlite::cuda
