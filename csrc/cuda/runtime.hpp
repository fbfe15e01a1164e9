// A device as the backend uses it: one stream, on which all work runs in order, memory, and copies from and to the
// host. Plain C++: only the .cu files include CUDA's headers.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/pool.hpp"
#include "tensor/tensor.hpp"

struct CUstream_st;
struct CUevent_st;

namespace vllmlite::cuda {

// A buffer of pinned host memory, and the event of the last copy that uses it.
struct Pinned {
  Pinned() = default;
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

  // Waits for the last copy, and grows the buffer to at least `bytes`.
  void* reserve(std::size_t bytes);

  void* data = nullptr;
  std::size_t size = 0;
  CUevent_st* done = nullptr;
};

class Products;  // cuBLASLt's handle and plans, in linear.cu

class Runtime {
 public:
  // `dtype` is that of activations and weights. If `batch_invariant`, or in float32, a row's result does not depend on
  // the other rows of a step. If `movable`, device memory can be released and restored.
  Runtime(int device, DType dtype, bool batch_invariant, bool movable);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  int device() const { return device_; }
  int capability() const { return capability_; }  // 90 for 9.0
  int multiprocessors() const { return multiprocessors_; }
  int shared_memory() const { return shared_memory_; }  // bytes that a block of threads may use
  DType dtype() const { return dtype_; }
  bool batch_invariant() const { return batch_invariant_; }
  CUstream_st* stream() const { return stream_; }
  // Whether the next kernel may become resident while the one before it still runs. The first kernel after a fence may
  // not, so that all later kernels see everything from before the fence as soon as they start.
  bool overlap_next() const { return !std::exchange(fenced_, false) && capability_ >= 90; }
  void fence() { fenced_ = true; }

  // An uninitialised tensor; while a graph is recorded, from the memory that graphs share.
  Tensor make(std::vector<std::int64_t> shape, DType dtype);

  // An uninitialised tensor whose contents release() loses.
  Tensor make_cache(std::vector<std::int64_t> shape, DType dtype);

  // Waits for all work, and frees the memory of all tensors; no work may be issued until restore(). Contents are kept
  // in pinned host memory, except those of make_cache(). Tensors and recorded steps keep their addresses. OutOfMemory,
  // and nothing freed, if host memory is too small; restore() throws it too, and can be called again.
  void release();
  void restore();
  std::size_t bytes_to_keep() { return pool_->held_bytes() + graph_pool_->held_bytes(); }

  // Copies to the device through pinned memory; the source may change as soon as this returns.
  void upload(void* target, const void* source, std::size_t bytes);
  // stage returns pinned memory of at least `bytes` to fill; send copies it to the device.
  Pinned& stage(std::size_t bytes);
  void send(Pinned& staged, void* target, std::size_t bytes);

  // Both wait for everything issued so far; download also copies from the device.
  void download(void* target, const void* source, std::size_t bytes);
  void synchronize();

  // Marks a tensor to be copied to pinned memory, and returns it. start_host_copies() issues these copies together,
  // after kernels that need not wait for them; host_copy() then does not wait for anything issued later.
  Tensor copied_to_host(const Tensor& tensor);
  void start_host_copies();
  // Waits for the copy of such a tensor, or of a view of one, and returns it; null for other tensors.
  const void* host_copy(const Tensor& tensor);

  // At least `count` ints in device memory, which are zero whenever no kernel is using them.
  std::int32_t* counters(std::size_t count);

  Products& products() { return *products_; }

  // Between begin_recording and end_recording, work is recorded instead of run. Graphs share their memory: they run one
  // after another, and results that must outlast a run are copied.
  void begin_recording();
  bool recording() const { return recording_; }
  struct Graph;
  std::shared_ptr<Graph> end_recording();
  void abandon_recording();
  void replay(const Graph& graph);

 private:
  struct HostCopy;
  struct HostCopies;

  Tensor make_in(Pool& pool, std::vector<std::int64_t> shape, DType dtype);

  int device_;
  DType dtype_;
  bool batch_invariant_;
  int capability_ = 0, multiprocessors_ = 0, shared_memory_ = 0;
  CUstream_st* stream_ = nullptr;
  std::shared_ptr<Pool> pool_, graph_pool_, cache_pool_;
  bool recording_ = false;
  mutable bool fenced_ = false;
  std::vector<std::unique_ptr<Pinned>> ring_, large_, recorded_uploads_;
  std::size_t next_ring_ = 0, next_large_ = 0;
  std::shared_ptr<HostCopies> host_copies_;
  std::vector<Tensor> counters_;
  std::shared_ptr<Products> products_;
};

std::shared_ptr<Products> make_products(Runtime& runtime);

}  // namespace vllmlite::cuda
