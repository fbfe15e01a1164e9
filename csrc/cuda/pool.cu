#include <algorithm>

#include "cuda/check.cuh"
#include "cuda/pool.hpp"

namespace vllmlite::cuda {

constexpr std::size_t kUnit = 512;
constexpr std::size_t kSmall = 1U << 20;  // blocks up to this size have separate segments
constexpr std::size_t kSmallSegment = 8U << 20;
constexpr std::size_t kLargeSegment = 64U << 20;  // larger blocks have a segment each

static std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

Pool::~Pool() { (void)give_back_segments(); }

std::shared_ptr<void> Pool::take(std::size_t bytes) {
  bytes = round_up(std::max<std::size_t>(bytes, 1), kUnit);
  const bool small = bytes <= kSmall;
  const std::lock_guard lock(mutex_);
  Idle& idle = idle_[small ? 1 : 0];
  const auto found = idle.lower_bound(bytes);
  Block* block = found == idle.end() ? segment(bytes, small) : found->second;
  if (block->idle) wake(block);
  if (block->size - bytes >= (small ? kUnit : kSmall)) {
    auto* remainder = new Block{block->data + bytes, block->size - bytes, small};
    remainder->previous = block;
    remainder->next = block->next;
    if (block->next != nullptr) block->next->previous = remainder;
    block->next = remainder;
    block->size = bytes;
    rest(remainder);
  }
  return {block->data, [self = shared_from_this(), block](void*) { self->give(block); }};
}

Pool::Block* Pool::segment(std::size_t bytes, bool small) {
  const DeviceGuard guard(device_);
  std::size_t size = small ? kSmallSegment : std::max(round_up(bytes, 2U << 20), kLargeSegment);
  void* data = allocate(size);
  if (data == nullptr && !recorded_ && give_back_segments()) data = allocate(size);
  if (data == nullptr && !small) data = allocate(size = round_up(bytes, 2U << 20));
  if (data == nullptr) {
    std::size_t free = 0, total = 0;
    VLLMLITE_CUDA_CHECK(cudaMemGetInfo, &free, &total);
    throw OutOfMemory("out of GPU memory: " + std::to_string(bytes) + " bytes wanted, " + std::to_string(free) +
                      " of " + std::to_string(total) + " free; lower gpu_memory_utilization, max_num_batched_tokens " +
                      "or max_num_seqs");
  }
  return new Block{static_cast<char*>(data), size, small};
}

// Returns null if there is too little memory.
void* Pool::allocate(std::size_t bytes) {
  try {
    if (movable_) {
      auto mapping = std::make_unique<Mapping>(device_, bytes);
      void* const mapped = mapping->data();
      mappings_.emplace(mapped, std::move(mapping));
      return mapped;
    }
    void* data = nullptr;
    VLLMLITE_CUDA_CHECK(cudaMalloc, &data, bytes);
    return data;
  } catch (const OutOfMemory&) {
    return nullptr;
  }
}

void Pool::free(void* data) {
  if (movable_)
    mappings_.erase(data);
  else
    (void)cudaFree(data);  // waits for the device; fails only once the CUDA context is gone
}

void Pool::release(bool keep) {
  const std::lock_guard lock(mutex_);
  if (!movable_) throw Error("this memory cannot be released: it was allocated without sleep mode");
  if (!recorded_) (void)give_back_segments();
  try {
    for (const auto& [data, mapping] : mappings_) mapping->release(keep);
  } catch (...) {
    for (const auto& [data, mapping] : mappings_) mapping->restore();
    throw;
  }
}

std::size_t Pool::held_bytes() {
  const std::lock_guard lock(mutex_);
  std::size_t bytes = 0;
  for (const auto& [data, mapping] : mappings_)
    if (mapping->mapped()) bytes += mapping->size();
  return bytes;
}

void Pool::restore() {
  const std::lock_guard lock(mutex_);
  for (const auto& [data, mapping] : mappings_) mapping->restore();
}

bool Pool::give_back_segments() {
  bool any = false;
  for (Idle& idle : idle_)
    for (auto at = idle.begin(); at != idle.end();) {
      Block* block = (at++)->second;
      if (block->previous != nullptr || block->next != nullptr) continue;
      wake(block);
      free(block->data);
      delete block;
      any = true;
    }
  return any;
}

void Pool::rest(Block* block) {
  block->idle = true;
  block->place = idle_[block->small ? 1 : 0].emplace(block->size, block);
}

void Pool::wake(Block* block) {
  block->idle = false;
  idle_[block->small ? 1 : 0].erase(block->place);
}

void Pool::give(Block* block) {
  const std::lock_guard lock(mutex_);
  if (Block* next = block->next; next != nullptr && next->idle) {
    wake(next);
    block->size += next->size;
    block->next = next->next;
    if (block->next != nullptr) block->next->previous = block;
    delete next;
  }
  if (Block* previous = block->previous; previous != nullptr && previous->idle) {
    wake(previous);
    previous->size += block->size;
    previous->next = block->next;
    if (block->next != nullptr) block->next->previous = previous;
    delete block;
    block = previous;
  }
  rest(block);
}

}  // namespace vllmlite::cuda
