// One device as a backend uses it: a stream that all work goes through in order, memory, and the way to and from the
// host. Plain C++: only the .cu files see CUDA's headers.
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

// A piece of pinned memory, and the event after which the copy that uses it is done.
struct Pinned {
  Pinned() = default;
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

  // Waits for the last copy, and makes sure of the size.
  void* reserve(std::size_t bytes);

  void* data = nullptr;
  std::size_t size = 0;
  CUevent_st* done = nullptr;
};

class Products;  // cuBLASLt's handle and plans, in linear.cu

class Runtime {
 public:
  // A backend of activations and weights of `dtype`, whose rows are the same however many others there are if it is
  // `batch_invariant`; they always are in float32.
  Runtime(int device, DType dtype, bool batch_invariant);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  int device() const { return device_; }
  int capability() const { return capability_; }  // 90 for 9.0
  int multiprocessors() const { return multiprocessors_; }
  int shared_memory() const { return shared_memory_; }  // bytes that a block may have
  DType dtype() const { return dtype_; }
  bool batch_invariant() const { return batch_invariant_; }
  CUstream_st* stream() const { return stream_; }
  // Whether the next kernel may be made resident while the one before it is still running: not the first after a
  // fence, so that what came before that is there for all kernels after it from their very start.
  bool overlap_next() const { return !std::exchange(fenced_, false) && capability_ >= 90; }
  void fence() { fenced_ = true; }

  // Uninitialised memory; while a graph is recorded, of the graphs' own.
  Tensor make(std::vector<std::int64_t> shape, DType dtype);

  // Copies to the device through pinned memory: the source may change as soon as this returns.
  void upload(void* target, const void* source, std::size_t bytes);
  // Pinned memory to fill, and its copy to the device.
  Pinned& stage(std::size_t bytes);
  void send(Pinned& staged, void* target, std::size_t bytes);

  // Waits for everything issued so far.
  void download(void* target, const void* source, std::size_t bytes);
  void synchronize();

  // The tensor, which is to be copied to pinned memory. start_host_copies() issues such copies, together and after the
  // kernels that need not wait for them; host_copy() then does not wait for what is issued later.
  Tensor copied_to_host(const Tensor& tensor);
  void start_host_copies();
  // Where the contents of such a tensor, or of a part of it, are on the host, once they are there; null for others.
  const void* host_copy(const Tensor& tensor);

  // `count` ints that are zero whenever no kernel is using them.
  std::int32_t* counters(std::size_t count);

  Products& products() { return *products_; }

  // Between the two, what is issued is recorded, not run. The graphs share their memory: they run one after another,
  // and what is to outlast a run is copied.
  void begin_recording();
  bool recording() const { return recording_; }
  struct Graph;
  std::shared_ptr<Graph> end_recording();
  void abandon_recording();
  void replay(const Graph& graph);

 private:
  struct HostCopy;
  struct HostCopies;

  int device_;
  DType dtype_;
  bool batch_invariant_;
  int capability_ = 0, multiprocessors_ = 0, shared_memory_ = 0;
  CUstream_st* stream_ = nullptr;
  std::shared_ptr<Pool> pool_, graph_pool_;
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
