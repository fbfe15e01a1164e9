// Copies between the pool of key/value blocks and pinned host memory, which the kernel reads and writes directly.
#include <algorithm>
#include <utility>

#include "cuda/check.cuh"
#include "cuda/host_blocks.hpp"

namespace vllmlite::cuda {

constexpr int kCopyThreads = 512;
constexpr int kCopiesOfLaunch = 256;  // their indices are arguments of the kernel
constexpr int kSavingBlocks = 16;     // beside the kernels of a step
constexpr int kLoadingBlocks = 128;   // while the step waits
constexpr int kVectorsInFlight = 8;   // loads of a thread before its first store

struct BlockCopies {
  char* pool;    // elements: [layers, num_blocks, bytes]
  char* scales;  // head scales: [layers, num_blocks, scale_bytes]; null without
  char* host;    // [places, block_bytes]
  std::size_t bytes, scale_bytes, block_bytes;
  std::int64_t num_blocks;
  int layers, count;
  std::int32_t blocks[kCopiesOfLaunch], places[kCopiesOfLaunch];
};

// Copies units of type T; thread t owns every kCopyThreads-th one.
template <typename T>
static __device__ void copy_units(const char* from, char* to, std::size_t bytes) {
  const auto* source = reinterpret_cast<const T*>(from);
  auto* target = reinterpret_cast<T*>(to);
  const std::size_t count = bytes / sizeof(T);
  for (std::size_t first = threadIdx.x; first < count; first += std::size_t{kCopyThreads} * kVectorsInFlight) {
    T held[kVectorsInFlight];
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i)
      if (first + i * kCopyThreads < count) held[i] = source[first + i * kCopyThreads];
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i)
      if (first + i * kCopyThreads < count) target[first + i * kCopyThreads] = held[i];
  }
}

// Grid: any; a block takes every gridDim.x-th pair of a copy and a layer. Block: kCopyThreads threads.
template <bool kToHost>
static __global__ __launch_bounds__(kCopyThreads) void copy_blocks_kernel(const __grid_constant__ BlockCopies given) {
  for (int pair = blockIdx.x; pair < given.count * given.layers; pair += gridDim.x) {
    const int copy = pair / given.layers, layer = pair % given.layers;
    const std::size_t at = static_cast<std::size_t>(layer) * given.num_blocks + given.blocks[copy];
    char* row = given.host + given.places[copy] * given.block_bytes;
    char* elements = given.pool + at * given.bytes;
    char* stored = row + layer * given.bytes;
    copy_units<uint4>(kToHost ? elements : stored, kToHost ? stored : elements, given.bytes);
    if (given.scales == nullptr) continue;
    char* scales = given.scales + at * given.scale_bytes;
    char* stored_scales = row + given.layers * given.bytes + layer * given.scale_bytes;
    copy_units<float2>(kToHost ? scales : stored_scales, kToHost ? stored_scales : scales, given.scale_bytes);
  }
}

static std::size_t bytes_of(const Tensor& memory, const KVCache& kv) {  // of one layer of a block
  return memory.bytes() / static_cast<std::size_t>(kv.layers * std::max<std::int64_t>(kv.num_blocks, 1));
}

static std::size_t scale_bytes_of(const KVCache& kv) { return kv.head_scales ? bytes_of(kv.scales_memory, kv) : 0; }

HostBlocks::HostBlocks(Runtime& runtime, std::shared_ptr<KVCache> kv, std::int64_t places)
    : runtime_(runtime),
      kv_(std::move(kv)),
      places_(places),
      block_bytes_((static_cast<std::size_t>(kv_->layers) * (bytes_of(kv_->memory, *kv_) + scale_bytes_of(*kv_)) +
                    sizeof(uint4) - 1) /
                   sizeof(uint4) * sizeof(uint4)) {
  const DeviceGuard guard(runtime.device());
  const std::size_t bytes = std::max<std::size_t>(static_cast<std::size_t>(places) * block_bytes_, 1);
  VLLMLITE_CUDA_CHECK(cudaHostAlloc, &data_, bytes, cudaHostAllocPortable);
  VLLMLITE_CUDA_CHECK(cudaStreamCreateWithFlags, &stream_, cudaStreamNonBlocking);
  VLLMLITE_CUDA_CHECK(cudaEventCreateWithFlags, &ready_, cudaEventDisableTiming);
  VLLMLITE_CUDA_CHECK(cudaEventCreateWithFlags, &copied_, cudaEventDisableTiming);
}

HostBlocks::~HostBlocks() {
  if (stream_ != nullptr) {
    (void)cudaStreamSynchronize(stream_);
    (void)cudaStreamDestroy(stream_);
  }
  if (ready_ != nullptr) (void)cudaEventDestroy(ready_);
  if (copied_ != nullptr) (void)cudaEventDestroy(copied_);
  if (data_ != nullptr) (void)cudaFreeHost(data_);
}

void HostBlocks::copy(std::span<const std::int32_t> blocks, std::span<const std::int32_t> places, bool to_host) {
  if (to_host)
    check_copies(blocks, kv_->num_blocks, places, places_, false);
  else
    check_copies(places, places_, blocks, kv_->num_blocks, false);
  const DeviceGuard guard(runtime_.device());
  VLLMLITE_CUDA_CHECK(cudaEventRecord, ready_, runtime_.stream());
  VLLMLITE_CUDA_CHECK(cudaStreamWaitEvent, stream_, ready_, 0);
  BlockCopies copies{};
  copies.pool = static_cast<char*>(kv_->memory.data);
  copies.scales = kv_->head_scales ? static_cast<char*>(kv_->scales_memory.data) : nullptr;
  copies.host = static_cast<char*>(data_);
  copies.bytes = bytes_of(kv_->memory, *kv_);
  copies.scale_bytes = scale_bytes_of(*kv_);
  copies.block_bytes = block_bytes_;
  copies.num_blocks = kv_->num_blocks;
  copies.layers = kv_->layers;
  for (std::size_t first = 0; first < blocks.size(); first += kCopiesOfLaunch) {
    copies.count = static_cast<int>(std::min<std::size_t>(blocks.size() - first, kCopiesOfLaunch));
    std::copy_n(blocks.data() + first, copies.count, copies.blocks);
    std::copy_n(places.data() + first, copies.count, copies.places);
    const int grid = std::min(copies.count * copies.layers, to_host ? kSavingBlocks : kLoadingBlocks);
    if (to_host)
      copy_blocks_kernel<true><<<grid, kCopyThreads, 0, stream_>>>(copies);
    else
      copy_blocks_kernel<false><<<grid, kCopyThreads, 0, stream_>>>(copies);
    VLLMLITE_CUDA_CHECK(cudaGetLastError);
  }
  VLLMLITE_CUDA_CHECK(cudaEventRecord, copied_, stream_);
  if (!to_host) join();
}

void HostBlocks::join() {
  VLLMLITE_CUDA_CHECK(cudaStreamWaitEvent, runtime_.stream(), copied_, 0);
  runtime_.fence();
}

void HostBlocks::wait() { VLLMLITE_CUDA_CHECK(cudaEventSynchronize, copied_); }

}  // namespace vllmlite::cuda
