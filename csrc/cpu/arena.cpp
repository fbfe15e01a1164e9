#include "cpu/arena.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace vllmlite::cpu {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

void* get(std::size_t bytes) {
  const std::size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

// Gives the whole pages of anonymous memory back to the system; they are zero when they are next read.
void discard_pages(void* memory, std::size_t bytes) {
#ifdef MADV_DONTNEED
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (first < end) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
#endif
}

// A free piece of up to this many times the size is reused. So smaller steps use the pieces of larger ones; otherwise
// pieces of every size in between would add up to several times the largest step.
constexpr std::size_t kMaxOversize = 8;

// Rounds up to one of four sizes per power of two.
std::size_t size_class(std::size_t bytes) {
  if (bytes <= 256) return 256;
  const std::size_t step = std::bit_floor(bytes - 1) / 4;
  return (bytes + step - 1) / step * step;
}

}  // namespace

struct Arena::Return {
  std::shared_ptr<Arena> arena;
  std::size_t size;

  void operator()(void* memory) const { arena->free_[size].push_back(memory); }
};

Arena::~Arena() {
  for (const auto& [size, pieces] : free_)
    for (void* piece : pieces) std::free(piece);
}

Tensor Arena::make(std::vector<std::int64_t> shape, DType dtype) {
  Tensor tensor;
  const std::size_t size = size_class(checked_bytes(shape, dtype));
  tensor.dtype = dtype;
  tensor.shape = std::move(shape);
  auto fit = free_.lower_bound(size);
  while (fit != free_.end() && fit->first <= kMaxOversize * size && fit->second.empty()) ++fit;
  std::size_t taken = size;
  if (fit == free_.end() || fit->first > kMaxOversize * size) {
    tensor.data = get(size);
  } else {
    taken = fit->first;
    tensor.data = fit->second.back();
    fit->second.pop_back();
  }
  tensor.owner = std::shared_ptr<void>(tensor.data, Return{shared_from_this(), taken});
  return tensor;
}

void Arena::discard() {
  for (const auto& [size, pieces] : free_)
    for (void* piece : pieces) discard_pages(piece, size);
}

bool Arena::owns(const Tensor& tensor) { return std::get_deleter<Return>(tensor.owner) != nullptr; }

Tensor allocate(std::vector<std::int64_t> shape, DType dtype) {
  Tensor tensor;
  tensor.data = get(std::max(checked_bytes(shape, dtype), std::size_t{1}));
  tensor.dtype = dtype;
  tensor.shape = std::move(shape);
  tensor.owner = std::shared_ptr<void>(tensor.data, std::free);
  return tensor;
}

void discard(const Tensor& tensor) { discard_pages(tensor.data, tensor.bytes()); }

}  // namespace vllmlite::cpu
