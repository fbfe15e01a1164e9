// Copies of whole blocks of the key/value cache.
#include <vector>

#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"

namespace vllmlite::cuda {

constexpr unsigned kCopyThreads = 256;

// Where the blocks of a pool are, in units of 8 bytes.
struct BlockMemory {
  std::uint64_t* data;
  std::int64_t layer_size;
};

// Grid: (pairs of blocks, layers). `pairs` holds a source and a target for each; `size` is that of a layer's block.
static __global__ __launch_bounds__(kCopyThreads) void copy_blocks_kernel(const std::int32_t* pairs, BlockMemory source,
                                                                          BlockMemory target, std::int64_t size) {
  let_next_begin();
  wait_for_previous();
  const std::int64_t from = pairs[2 * blockIdx.x], to = pairs[2 * blockIdx.x + 1], layer = blockIdx.y;
  const std::uint64_t* const read = source.data + layer * source.layer_size + from * size;
  std::uint64_t* const written = target.data + layer * target.layer_size + to * size;
  for (std::int64_t i = threadIdx.x; i < size; i += kCopyThreads) written[i] = read[i];
}

void copy_blocks(Runtime& runtime, const KVCache& source, std::span<const std::int32_t> sources, const KVCache& target,
                 std::span<const std::int32_t> targets) {
  source.check_same_form(target);
  check_copies(sources, source.num_blocks, targets, target.num_blocks, &source == &target);
  if (sources.empty()) return;
  const DeviceGuard guard(runtime.device());
  std::vector<std::int32_t> pairs;
  for (std::size_t i = 0; i < sources.size(); ++i) pairs.insert(pairs.end(), {sources[i], targets[i]});
  const Tensor uploaded = runtime.make({static_cast<std::int64_t>(pairs.size())}, DType::int32);
  runtime.upload(uploaded.data, pairs.data(), uploaded.bytes());
  const auto copy = [&](const Tensor& from, const Tensor& to) {
    const auto unit = static_cast<std::int64_t>(sizeof(std::uint64_t));
    const auto layer_size = [&](const Tensor& memory) {
      return static_cast<std::int64_t>(memory.bytes()) / source.layers / unit;
    };
    launch(runtime, copy_blocks_kernel,
           dim3(static_cast<unsigned>(sources.size()), static_cast<unsigned>(source.layers)), kCopyThreads, 0,
           static_cast<const std::int32_t*>(uploaded.data),
           BlockMemory{static_cast<std::uint64_t*>(from.data), layer_size(from)},
           BlockMemory{static_cast<std::uint64_t*>(to.data), layer_size(to)}, layer_size(from) / source.num_blocks);
  };
  copy(source.memory, target.memory);
  if (source.head_scales) copy(source.scales_memory, target.scales_memory);
  runtime.fence();  // attention reads keys and values of earlier steps before it waits for other kernels
}

}  // namespace vllmlite::cuda
