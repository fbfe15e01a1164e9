// Beam search: the best continuations of groups of sequences.
#include <algorithm>
#include <bit>
#include <iterator>
#include <vector>

#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"
#include "cuda/select.cuh"

namespace vllmlite::cuda {

// BeamRows on the device.
struct BeamView {
  const std::int32_t *rows, *group_of_row, *groups;
  const float *scores, *temperatures;
};

struct SoftmaxShared {
  double sums[32];
  float largest[32];
};

// Grid: (rows), kSelectThreads threads each. Writes the logarithms of the softmax of a row's logits divided by its
// temperature to `logprobs` [rows, size].
static __global__ __launch_bounds__(kSelectThreads) void log_softmax_kernel(const float* logits, int size,
                                                                            BeamView beams, float* logprobs) {
  __shared__ SoftmaxShared shared;
  let_next_begin();
  wait_for_previous();
  const std::int64_t row = blockIdx.x;
  const float* from = logits + static_cast<std::int64_t>(beams.rows[row]) * size;
  const float temperature = beams.temperatures[row];
  float largest = -INFINITY;
  for_each(from, size, [&](int, float logit) { largest = fmaxf(largest, logit / temperature); });
  largest = block_reduce(largest, shared.largest, [](float a, float b) { return fmaxf(a, b); });
  double log_sum = 0;
  if (isfinite(largest)) {
    double sum = 0;
    for_each(from, size, [&](int, float logit) { sum += static_cast<double>(expf(logit / temperature - largest)); });
    log_sum =
        static_cast<double>(largest) + log(block_reduce(sum, shared.sums, [](double a, double b) { return a + b; }));
  }
  float* to = logprobs + row * size;
  for_each(from, size, [&](int id, float logit) {
    logit /= temperature;
    if (isfinite(largest))
      to[id] = static_cast<float>(static_cast<double>(logit) - log_sum);
    else
      to[id] = logit == INFINITY ? 0 : -INFINITY;
  });
}

// Grid: (rows), kSelectThreads threads each. Writes the keys of a row's k best continuations to its group's part of
// `keys`, [groups, padded]: the score, and among equals the descending index of the continuation in the group.
static __global__ __launch_bounds__(kSelectThreads) void best_of_row_kernel(const float* logprobs, int size,
                                                                            BeamView beams, int k, int padded,
                                                                            std::uint64_t* keys) {
  __shared__ SelectShared shared;
  __shared__ int taken;
  let_next_begin();
  wait_for_previous();
  const std::int64_t row = blockIdx.x;
  const int group = beams.group_of_row[row], place = static_cast<int>(row) - beams.groups[group];
  const float score = beams.scores[row];
  const float* from = logprobs + row * size;
  const auto key_of = [&](int id) { return ranked(score + from[id], place * size + id); };
  std::uint64_t* to = keys + static_cast<std::int64_t>(group) * padded + place * k;
  for (int i = static_cast<int>(threadIdx.x); i < k; i += kSelectThreads) to[i] = 0;
  if (threadIdx.x == 0) taken = 0;
  const std::uint64_t least =
      select<64>(size, static_cast<unsigned long long>(k), key_of, [](int) { return 1ULL; }, shared);
  __syncthreads();
  for (int id = static_cast<int>(threadIdx.x); id < size; id += kSelectThreads)
    if (const std::uint64_t key = key_of(id); key >= least) to[atomicAdd(&taken, 1)] = key;
}

// Grid: (groups), kSelectThreads threads each. Sorts a group's keys and writes its k best continuations.
static __global__ __launch_bounds__(kSelectThreads) void best_of_group_kernel(std::uint64_t* keys, int size,
                                                                              BeamView beams, int k, int padded,
                                                                              std::int32_t* rows, std::int32_t* ids,
                                                                              float* scores) {
  let_next_begin();
  wait_for_previous();
  const std::int64_t group = blockIdx.x;
  std::uint64_t* own = keys + group * padded;
  const int count = (beams.groups[group + 1] - beams.groups[group]) * k;
  for (int i = count + static_cast<int>(threadIdx.x); i < padded; i += kSelectThreads) own[i] = 0;
  sort_descending(own, padded);
  for (int i = static_cast<int>(threadIdx.x); i < k; i += kSelectThreads) {
    const std::uint64_t key = i < padded ? own[i] : 0;
    const auto bits = static_cast<std::uint32_t>(key >> 32);
    const bool found = bits > ordered(-INFINITY);
    const auto index = static_cast<int>(0xffffffffU - static_cast<std::uint32_t>(key));
    rows[group * k + i] = found ? index / size : -1;
    ids[group * k + i] = found ? index % size : -1;
    scores[group * k + i] = found ? __uint_as_float((bits & 0x80000000U) != 0 ? bits ^ 0x80000000U : ~bits) : -INFINITY;
  }
}

// Copies the rows to the device; `memory` keeps them.
static BeamView uploaded(Runtime& runtime, const BeamRows& beams, Tensor& memory) {
  std::vector<std::int32_t> words = beams.rows;
  for (std::int32_t group = 0; group < beams.num_groups(); ++group) {
    const auto at = static_cast<std::size_t>(group);
    words.insert(words.end(), static_cast<std::size_t>(beams.groups[at + 1] - beams.groups[at]), group);
  }
  for (const auto* floats : {&beams.scores, &beams.temperatures})
    std::ranges::transform(*floats, std::back_inserter(words), [](float x) { return std::bit_cast<std::int32_t>(x); });
  words.insert(words.end(), beams.groups.begin(), beams.groups.end());
  memory = runtime.make({static_cast<std::int64_t>(words.size())}, DType::int32);
  runtime.upload(memory.data, words.data(), memory.bytes());
  const auto* data = static_cast<const std::int32_t*>(memory.data);
  const std::int64_t count = beams.count();
  const auto* floats = reinterpret_cast<const float*>(data + 2 * count);
  return {data, data + count, data + 4 * count, floats, floats + count};
}

Continuations choose_beams(Runtime& runtime, const Tensor& logits, const Batch& batch, const BeamRows& beams, int k) {
  check_logits(logits, batch);
  const auto size = static_cast<int>(logits.shape[1]);
  beams.check(logits.shape[0], size, k);
  const DeviceGuard guard(runtime.device());
  const std::int64_t groups = beams.num_groups();
  Continuations out{runtime.make({groups, k}, DType::int32), runtime.make({groups, k}, DType::int32),
                    runtime.make({groups, k}, DType::float32)};
  if (groups == 0) return out;
  const auto rows = static_cast<unsigned>(beams.count());
  Tensor memory;
  const BeamView view = uploaded(runtime, beams, memory);
  const Tensor logprobs = runtime.make({beams.count(), size}, DType::float32);
  auto* values = static_cast<float*>(logprobs.data);
  launch(runtime, log_softmax_kernel, rows, kSelectThreads, 0, static_cast<const float*>(logits.data), size, view,
         values);
  if ((batch.needs & kEditing) != 0) edit(runtime, values, values, beams.count(), batch, view.rows);
  const auto padded = static_cast<int>(std::bit_ceil(static_cast<unsigned>(std::max(beams.largest_group(), 1) * k)));
  const Tensor keys = runtime.make({groups, padded}, DType::int64);
  auto* own = static_cast<std::uint64_t*>(keys.data);
  launch(runtime, best_of_row_kernel, rows, kSelectThreads, 0, values, size, view, k, padded, own);
  launch(runtime, best_of_group_kernel, static_cast<unsigned>(groups), kSelectThreads, 0, own, size, view, k, padded,
         static_cast<std::int32_t*>(out.rows.data), static_cast<std::int32_t*>(out.ids.data),
         static_cast<float*>(out.scores.data));
  for (Tensor* tensor : {&out.rows, &out.ids, &out.scores}) *tensor = runtime.copied_to_host(*tensor);
  return out;
}

}  // namespace vllmlite::cuda
