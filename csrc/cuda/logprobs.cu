// Log-probabilities of given ids and of the most likely ids; one block a row.
#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"
#include "cuda/select.cuh"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

struct LogprobsShared {
  SelectShared select;
  double sums[32];
  float largest[32];
  int counts[32];
  int taken;
};

// Grid: (rows), kSelectThreads threads each. Writes the log-probability and rank of the row's id and, if k > 0, the top
// k ids and log-probabilities; `sort_keys` has k_padded keys a row, the power of two that holds k.
static __global__ __launch_bounds__(kSelectThreads) void logprobs_kernel(const float* logits, int size,
                                                                         const std::int32_t* ids, int k, int k_padded,
                                                                         std::uint64_t* sort_keys, float* chosen,
                                                                         std::int32_t* rank, std::int32_t* top_ids,
                                                                         float* top) {
  __shared__ LogprobsShared shared;
  let_next_begin();
  wait_for_previous();
  const std::int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const float* from = logits + row * size;
  const int own = min(max(ids[row], 0), size - 1);
  const std::uint64_t own_rank = ranked(from[own], own);
  float largest = -INFINITY;
  int above = 0;
  for_each(from, size, [&](int id, float logit) {
    largest = fmaxf(largest, logit);
    above += static_cast<int>(ranked(logit, id) > own_rank);
  });
  largest = block_reduce(largest, shared.largest, [](float a, float b) { return fmaxf(a, b); });
  above = block_reduce(above, shared.counts, [](int a, int b) { return a + b; });
  double log_sum = static_cast<double>(largest);
  if (isfinite(largest)) {
    double sum = 0;
    for_each(from, size, [&](int, float logit) { sum += static_cast<double>(expf(logit - largest)); });
    log_sum += log(block_reduce(sum, shared.sums, [](double a, double b) { return a + b; }));
  }
  const auto logprob = [&](float logit) {
    logit = without_nan(logit);
    if (isinf(logit)) return logit > 0 ? 0.0F : logit;
    return static_cast<float>(static_cast<double>(logit) - log_sum);
  };
  if (thread == 0) {
    chosen[row] = logprob(from[own]);
    rank[row] = above + 1;
    shared.taken = 0;
  }
  if (k == 0) return;
  const std::uint64_t least = select<64>(
      size, static_cast<unsigned long long>(k), [&](int id) { return ranked(from[id], id); }, [](int) { return 1ULL; },
      shared.select);
  std::uint64_t* keys = sort_keys + row * k_padded;
  for (int i = thread; i < k_padded; i += kSelectThreads) keys[i] = 0;
  __syncthreads();
  for (int id = thread; id < size; id += kSelectThreads)
    if (const std::uint64_t key = ranked(from[id], id); key >= least) keys[atomicAdd(&shared.taken, 1)] = key;
  sort_descending(keys, k_padded);
  for (int i = thread; i < k; i += kSelectThreads) {
    const int id = static_cast<int>(0xffffffffU - static_cast<std::uint32_t>(keys[i]));
    top_ids[row * k + i] = id;
    top[row * k + i] = logprob(from[id]);
  }
}

Logprobs logprobs(Runtime& runtime, const Tensor& logits, const Tensor& ids, int k) {
  check_dtype(logits, DType::float32, "logits");
  check_rank(logits, 2, "logits");
  check_dtype(ids, DType::int32, "ids of logprobs");
  const std::int64_t rows = logits.shape[0], size = logits.shape[1];
  check_shape(ids, {rows}, "ids of logprobs");
  k = static_cast<int>(std::min<std::int64_t>(k, size));
  const DeviceGuard guard(runtime.device());
  Logprobs out{runtime.make({rows}, DType::float32), runtime.make({rows}, DType::int32),
               runtime.make({rows, k}, DType::int32), runtime.make({rows, k}, DType::float32)};
  if (rows == 0 || size == 0) return out;
  std::int64_t k_padded = 1;
  while (k_padded < k) k_padded *= 2;
  const Tensor sort_keys = runtime.make({rows, k_padded}, DType::int64);
  launch(runtime, logprobs_kernel, static_cast<unsigned>(rows), kSelectThreads, 0,
         static_cast<const float*>(logits.data), static_cast<int>(size), static_cast<const std::int32_t*>(ids.data), k,
         static_cast<int>(k_padded), static_cast<std::uint64_t*>(sort_keys.data), static_cast<float*>(out.chosen.data),
         static_cast<std::int32_t*>(out.rank.data), static_cast<std::int32_t*>(out.top_ids.data),
         static_cast<float*>(out.top.data));
  return out;
}

}  // namespace vllmlite::cuda
