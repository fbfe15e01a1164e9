#include <algorithm>
#include <cstring>
#include <mutex>
#include <thread>
#include <unordered_set>

#include "cuda/check.cuh"
#include "cuda/runtime.hpp"

namespace vllmlite::cuda {

constexpr std::size_t kRing = 16;            // small copies that may be in flight at once
constexpr std::size_t kLargeCopy = 1 << 20;  // copies of at least this size are split into pieces
constexpr std::size_t kPiece = 16 << 20;
constexpr std::size_t kLargeBuffers = 4;
constexpr int kCopyThreads = 4;
constexpr std::size_t kCounters = 1 << 16;

Pinned::~Pinned() {
  if (done != nullptr) {
    (void)cudaEventSynchronize(done);
    (void)cudaEventDestroy(done);
  }
  if (data != nullptr) (void)cudaFreeHost(data);
}

void* Pinned::reserve(std::size_t bytes) {
  if (done == nullptr)
    VLLMLITE_CUDA_CHECK(cudaEventCreateWithFlags, &done, cudaEventDisableTiming);
  else
    VLLMLITE_CUDA_CHECK(cudaEventSynchronize, done);
  if (bytes <= size) return data;
  if (data != nullptr) VLLMLITE_CUDA_CHECK(cudaFreeHost, data);
  data = nullptr;
  size = 0;
  std::size_t wanted = 4096;
  while (wanted < bytes) wanted *= 2;
  VLLMLITE_CUDA_CHECK(cudaHostAlloc, &data, wanted, cudaHostAllocDefault);
  size = wanted;
  return data;
}

// The tensors marked by copied_to_host, by the addresses of their owners. Any thread may create and destroy them.
struct Runtime::HostCopies {
  std::mutex mutex;
  std::unordered_set<const void*> live;
  std::vector<HostCopy*> waiting;  // for start_host_copies()
  std::vector<std::unique_ptr<Pinned>> spare;
};

// The owner of a tensor marked by copied_to_host: keeps its memory and the pinned memory of the copy.
struct Runtime::HostCopy {
  HostCopy(std::shared_ptr<HostCopies> the_copies, const Tensor& tensor)
      : copies(std::move(the_copies)),
        memory(tensor.owner),
        begin(static_cast<const char*>(tensor.data)),
        bytes(tensor.bytes()) {
    const std::lock_guard lock(copies->mutex);
    if (copies->spare.empty()) {
      pinned = std::make_unique<Pinned>();
    } else {
      pinned = std::move(copies->spare.back());
      copies->spare.pop_back();
    }
    pinned->reserve(bytes);
    copies->live.insert(this);
    copies->waiting.push_back(this);
  }
  ~HostCopy() {
    const std::lock_guard lock(copies->mutex);
    copies->live.erase(this);
    std::erase(copies->waiting, this);
    copies->spare.push_back(std::move(pinned));
  }

  std::shared_ptr<HostCopies> copies;
  std::shared_ptr<void> memory;
  const char* begin;
  std::size_t bytes;
  std::unique_ptr<Pinned> pinned;
};

struct Runtime::Graph {
  ~Graph() {
    if (executable != nullptr) (void)cudaGraphExecDestroy(executable);
  }
  cudaGraphExec_t executable = nullptr;
  std::shared_ptr<Pool> memory;
  std::vector<std::unique_ptr<Pinned>> uploads;  // copied to the device at each replay
};

Runtime::Runtime(int device, DType dtype, bool batch_invariant, bool movable)
    : device_(device),
      dtype_(dtype),
      batch_invariant_(batch_invariant),
      pool_(std::make_shared<Pool>(device, false, movable)),
      graph_pool_(std::make_shared<Pool>(device, true, movable)),
      cache_pool_(movable ? std::make_shared<Pool>(device, false, true) : pool_),
      host_copies_(std::make_shared<HostCopies>()) {
  const DeviceGuard guard(device);
  cudaDeviceProp properties;
  VLLMLITE_CUDA_CHECK(cudaGetDeviceProperties, &properties, device);
  capability_ = properties.major * 10 + properties.minor;
  multiprocessors_ = properties.multiProcessorCount;
  shared_memory_ = static_cast<int>(properties.sharedMemPerBlockOptin);
  // This stream and the legacy default stream, on which other libraries use shared tensors, wait for each other.
  VLLMLITE_CUDA_CHECK(cudaStreamCreate, &stream_);
  for (std::size_t i = 0; i < kRing; ++i) ring_.push_back(std::make_unique<Pinned>());
  for (std::size_t i = 0; i < kLargeBuffers; ++i) large_.push_back(std::make_unique<Pinned>());
  products_ = make_products(*this);
}

Runtime::~Runtime() {
  (void)cudaStreamSynchronize(stream_);
  (void)cudaStreamDestroy(stream_);
}

Tensor Runtime::make(std::vector<std::int64_t> shape, DType dtype) {
  return make_in(recording_ ? *graph_pool_ : *pool_, std::move(shape), dtype);
}

Tensor Runtime::make_cache(std::vector<std::int64_t> shape, DType dtype) {
  return make_in(*cache_pool_, std::move(shape), dtype);
}

void Runtime::release() {
  const DeviceGuard guard(device_);
  VLLMLITE_CUDA_CHECK(cudaDeviceSynchronize);
  pool_->release(true);
  try {
    graph_pool_->release(true);
  } catch (...) {
    pool_->restore();
    throw;
  }
  cache_pool_->release(false);
}

void Runtime::restore() {
  for (Pool* pool : {pool_.get(), graph_pool_.get(), cache_pool_.get()}) pool->restore();
}

Tensor Runtime::make_in(Pool& pool, std::vector<std::int64_t> shape, DType dtype) {
  Tensor tensor;
  tensor.dtype = dtype;
  tensor.device = {DeviceType::cuda, device_};
  tensor.shape = std::move(shape);
  const std::size_t bytes = checked_bytes(tensor.shape, dtype);
  if (bytes == 0) return tensor;
  tensor.owner = pool.take(bytes);
  tensor.data = tensor.owner.get();
  return tensor;
}

Pinned& Runtime::stage(std::size_t bytes) {
  Pinned& staged = *ring_[next_ring_++ % kRing];
  staged.reserve(bytes);
  return staged;
}

void Runtime::send(Pinned& staged, void* target, std::size_t bytes) {
  VLLMLITE_CUDA_CHECK(cudaMemcpyAsync, target, staged.data, bytes, cudaMemcpyHostToDevice, stream_);
  VLLMLITE_CUDA_CHECK(cudaEventRecord, staged.done, stream_);
}

static void copy_by_threads(void* target, const void* source, std::size_t bytes) {
  const std::size_t share = bytes / kCopyThreads;
  std::vector<std::jthread> threads;
  for (int i = 1; i < kCopyThreads; ++i)
    threads.emplace_back([=] {
      const std::size_t begin = share * static_cast<std::size_t>(i);
      std::memcpy(static_cast<char*>(target) + begin, static_cast<const char*>(source) + begin,
                  i == kCopyThreads - 1 ? bytes - begin : share);
    });
  std::memcpy(target, source, share);
}

void Runtime::upload(void* target, const void* source, std::size_t bytes) {
  if (bytes == 0) return;
  const DeviceGuard guard(device_);
  if (recording_) {
    recorded_uploads_.push_back(std::make_unique<Pinned>());
    std::memcpy(recorded_uploads_.back()->reserve(bytes), source, bytes);
    VLLMLITE_CUDA_CHECK(cudaMemcpyAsync, target, recorded_uploads_.back()->data, bytes, cudaMemcpyHostToDevice,
                        stream_);
    return;
  }
  if (bytes < kLargeCopy) {
    Pinned& staged = stage(bytes);
    std::memcpy(staged.data, source, bytes);
    send(staged, target, bytes);
    return;
  }
  for (std::size_t at = 0; at < bytes; at += kPiece) {
    const std::size_t piece = std::min(kPiece, bytes - at);
    Pinned& staged = *large_[next_large_++ % kLargeBuffers];
    copy_by_threads(staged.reserve(kPiece), static_cast<const char*>(source) + at, piece);
    send(staged, static_cast<char*>(target) + at, piece);
  }
}

void Runtime::download(void* target, const void* source, std::size_t bytes) {
  const DeviceGuard guard(device_);
  if (bytes != 0) VLLMLITE_CUDA_CHECK(cudaMemcpyAsync, target, source, bytes, cudaMemcpyDeviceToHost, stream_);
  VLLMLITE_CUDA_CHECK(cudaStreamSynchronize, stream_);
}

void Runtime::synchronize() { VLLMLITE_CUDA_CHECK(cudaStreamSynchronize, stream_); }

Tensor Runtime::copied_to_host(const Tensor& tensor) {
  if (recording_ || tensor.bytes() == 0) return tensor;
  const DeviceGuard guard(device_);
  Tensor found = tensor;
  found.owner = std::make_shared<HostCopy>(host_copies_, tensor);
  return found;
}

void Runtime::start_host_copies() {
  const DeviceGuard guard(device_);
  const std::lock_guard lock(host_copies_->mutex);
  for (const HostCopy* copy : host_copies_->waiting) {
    VLLMLITE_CUDA_CHECK(cudaMemcpyAsync, copy->pinned->data, copy->begin, copy->bytes, cudaMemcpyDeviceToHost, stream_);
    VLLMLITE_CUDA_CHECK(cudaEventRecord, copy->pinned->done, stream_);
  }
  host_copies_->waiting.clear();
}

const void* Runtime::host_copy(const Tensor& tensor) {
  {
    const std::lock_guard lock(host_copies_->mutex);
    if (!host_copies_->live.contains(tensor.owner.get())) return nullptr;
  }
  start_host_copies();
  const auto* copy = static_cast<const HostCopy*>(tensor.owner.get());
  VLLMLITE_CUDA_CHECK(cudaEventSynchronize, copy->pinned->done);
  return static_cast<const char*>(copy->pinned->data) + (static_cast<const char*>(tensor.data) - copy->begin);
}

std::int32_t* Runtime::counters(std::size_t count) {
  if (counters_.empty() || counters_.back().size() < static_cast<std::int64_t>(count)) {
    if (recording_) throw Error("counters are too few for a step that is being recorded");
    // The old memory is kept, since recorded graphs still use it.
    counters_.push_back(make({static_cast<std::int64_t>(std::max(count, kCounters))}, DType::int32));
    VLLMLITE_CUDA_CHECK(cudaMemsetAsync, counters_.back().data, 0, counters_.back().bytes(), stream_);
  }
  return static_cast<std::int32_t*>(counters_.back().data);
}

void Runtime::begin_recording() {
  const DeviceGuard guard(device_);
  synchronize();  // a graph that still runs may use the graphs' memory
  VLLMLITE_CUDA_CHECK(cudaStreamBeginCapture, stream_, cudaStreamCaptureModeRelaxed);
  recording_ = true;
}

std::shared_ptr<Runtime::Graph> Runtime::end_recording() {
  const DeviceGuard guard(device_);
  recording_ = false;
  cudaGraph_t recorded = nullptr;
  VLLMLITE_CUDA_CHECK(cudaStreamEndCapture, stream_, &recorded);
  auto graph = std::make_shared<Graph>();
  graph->memory = graph_pool_;
  graph->uploads = std::move(recorded_uploads_);
  const cudaError_t status = cudaGraphInstantiate(&graph->executable, recorded, 0);
  (void)cudaGraphDestroy(recorded);
  check(status, "cudaGraphInstantiate");
  return graph;
}

void Runtime::abandon_recording() {
  recording_ = false;
  recorded_uploads_.clear();
  cudaGraph_t recorded = nullptr;
  (void)cudaStreamEndCapture(stream_, &recorded);
  if (recorded != nullptr) (void)cudaGraphDestroy(recorded);
  (void)cudaGetLastError();
}

void Runtime::replay(const Graph& graph) {
  VLLMLITE_CUDA_CHECK(cudaGraphLaunch, graph.executable, stream_);
  fence();
}

}  // namespace vllmlite::cuda
