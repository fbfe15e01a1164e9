#include <algorithm>
#include <array>
#include <cstdint>
#include <unordered_set>
#include <utility>

#include "cuda/check.cuh"

namespace vllmlite::cuda {

using Pair = std::pair<std::int64_t, std::int64_t>;

constexpr unsigned kThreads = 256;
constexpr unsigned kMaxChunks = 64;

// Block numbers travel as a kernel argument (4 KiB at most), so a launch needs no device memory of its own.
struct PairBatch {
  static constexpr std::size_t kCapacity = 248;
  std::int64_t source[kCapacity];
  std::int64_t target[kCapacity];
};

template <typename Word>
static __global__ void copy_blocks_kernel(const Word* __restrict__ source, Word* __restrict__ target,
                                          std::int64_t words_per_block, const __grid_constant__ PairBatch pairs) {
  const Word* from = source + pairs.source[blockIdx.y] * words_per_block;
  Word* to = target + pairs.target[blockIdx.y] * words_per_block;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < words_per_block;
       i += stride)
    to[i] = from[i];
}

template <typename Word>
static void launch(const Tensor& source, const Tensor& target, std::size_t block_bytes,
                   const std::vector<Pair>& pairs) {
  const std::size_t words = block_bytes / sizeof(Word);
  const auto chunks = static_cast<unsigned>(std::min<std::size_t>((words + kThreads - 1) / kThreads, kMaxChunks));
  for (std::size_t begin = 0; begin < pairs.size(); begin += PairBatch::kCapacity) {
    const std::size_t count = std::min(pairs.size() - begin, PairBatch::kCapacity);
    PairBatch batch{};
    for (std::size_t i = 0; i < count; ++i) {
      batch.source[i] = pairs[begin + i].first;
      batch.target[i] = pairs[begin + i].second;
    }
    copy_blocks_kernel<Word><<<dim3(chunks, static_cast<unsigned>(count)), kThreads>>>(
        static_cast<const Word*>(source.data), static_cast<Word*>(target.data), static_cast<std::int64_t>(words),
        batch);
    VLLMLITE_CUDA_CHECK(cudaGetLastError);
  }
}

static std::int64_t element(const Tensor& pairs, std::int64_t index) {
  return pairs.dtype == DType::int64 ? static_cast<const std::int64_t*>(pairs.data)[index]
                                     : static_cast<const std::int32_t*>(pairs.data)[index];
}

static void check_block(const char* side, std::int64_t row, std::int64_t block, std::int64_t num_blocks) {
  if (block < 0 || block >= num_blocks)
    throw std::out_of_range("copy_blocks: pair " + std::to_string(row) + " names " + side + " block " +
                            std::to_string(block) + " of " + std::to_string(num_blocks));
}

static void check_tensors(const Tensor& source, const Tensor& target, const Tensor& pairs) {
  const std::string both = "source is " + describe(source) + ", target is " + describe(target);
  if (source.dtype != target.dtype) throw TypeError("copy_blocks: " + both);
  if (source.device.type != DeviceType::cuda || source.device != target.device)
    throw std::invalid_argument("copy_blocks needs both tensors on one CUDA device: " + both);
  if (source.shape.empty() || target.shape.empty() ||
      !std::equal(source.shape.begin() + 1, source.shape.end(), target.shape.begin() + 1, target.shape.end()))
    throw std::invalid_argument("copy_blocks needs [num_blocks, ...] with equal blocks: " + both);
  if (target.readonly) throw std::invalid_argument("copy_blocks: the target is read-only");
  if (pairs.dtype != DType::int64 && pairs.dtype != DType::int32)
    throw TypeError("copy_blocks: pairs must be int32 or int64, not " + std::string(name(pairs.dtype)));
  if (pairs.device.type != DeviceType::cpu || pairs.shape.size() != 2 || pairs.shape[1] != 2)
    throw std::invalid_argument("copy_blocks: pairs must be [n, 2] on the CPU, not " + describe(pairs));
}

static bool overlap(const Tensor& a, const Tensor& b) {
  const auto* a_begin = static_cast<const char*>(a.data);
  const auto* b_begin = static_cast<const char*>(b.data);
  return a_begin < b_begin + b.bytes() && b_begin < a_begin + a.bytes();
}

static std::vector<Pair> checked_pairs(const Tensor& source, const Tensor& target, const Tensor& pairs) {
  std::vector<Pair> checked;
  std::unordered_set<std::int64_t> written;
  for (std::int64_t row = 0; row < pairs.shape[0]; ++row) {
    const std::int64_t from = element(pairs, 2 * row);
    const std::int64_t to = element(pairs, 2 * row + 1);
    check_block("source", row, from, source.shape[0]);
    check_block("target", row, to, target.shape[0]);
    if (!written.insert(to).second)
      throw std::invalid_argument("copy_blocks: target block " + std::to_string(to) + " is written twice");
    checked.emplace_back(from, to);
  }
  if (!overlap(source, target)) return checked;
  if (source.data != target.data)
    throw std::invalid_argument("copy_blocks: source and target overlap without being one pool");
  for (const auto& [from, to] : checked)
    if (written.contains(from))
      throw std::invalid_argument("copy_blocks: block " + std::to_string(from) + " is both read and written");
  return checked;
}

static bool aligned(const void* pointer, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0;
}

void copy_blocks(const Tensor& source, const Tensor& target, const Tensor& pairs) {
  check_tensors(source, target, pairs);
  const std::vector<Pair> checked = checked_pairs(source, target, pairs);
  if (checked.empty() || source.bytes() == 0) return;
  const std::size_t block_bytes = source.bytes() / static_cast<std::size_t>(source.shape[0]);
  const DeviceGuard guard(source.device.index);
  if (block_bytes % sizeof(uint4) == 0 && aligned(source.data, sizeof(uint4)) && aligned(target.data, sizeof(uint4)))
    launch<uint4>(source, target, block_bytes, checked);
  else
    launch<std::uint8_t>(source, target, block_bytes, checked);
}

}  // namespace vllmlite::cuda
