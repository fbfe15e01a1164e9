// Choosing token ids from logits. Probabilities are integers, so that their sums are exact in any order and a draw does
// not depend on the rest of the batch.
#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"
#include "cuda/select.cuh"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

constexpr unsigned kThreads = 256;
constexpr unsigned kParts = 16;  // blocks that search a row for its largest logit

// ---- Bias, mask and penalties, in this order

// Grid: (rows, blocks of 8 * kThreads ids). `from` and `to`, [rows, size], may be the same. A block edits the row of a
// sampled position: positions[blockIdx.x], or blockIdx.x if `positions` is null.
static __global__ void edit_kernel(const float* from, float* to, int size, const std::int32_t* positions,
                                   const __grid_constant__ BatchView batch) {
  let_next_begin();
  wait_for_previous();
  const int row = positions != nullptr ? positions[blockIdx.x] : static_cast<int>(blockIdx.x);
  const SlotState state = batch.states[batch.sample_slots[row]];
  const int place = batch.mask_places != nullptr ? batch.mask_places[row] : -1;
  const std::int32_t* bits = batch.mask_bits + static_cast<std::int64_t>(place) * ((size + 31) / 32);
  const bool penalised = state.counts != nullptr;
  if (from == to && state.bias_count == 0 && place < 0 && !penalised) return;
  from += static_cast<std::int64_t>(blockIdx.x) * size;
  to += static_cast<std::int64_t>(blockIdx.x) * size;
  // No other block writes this block's ids, so it can add their biases, which come first, by itself.
  const int begin = static_cast<int>(blockIdx.y * blockDim.x * 8),
            end = min(begin + static_cast<int>(blockDim.x * 8), size);
  for (int id = begin + static_cast<int>(threadIdx.x); id < end; id += static_cast<int>(blockDim.x)) to[id] = from[id];
  if (state.bias_count > 0) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < state.bias_count; i += static_cast<int>(blockDim.x))
      if (const int id = state.bias_ids[i]; id >= begin && id < end) to[id] += state.biases[i];
    __syncthreads();
  }
  if (place < 0 && !penalised) return;
  const int first_draft = batch.first_sampled[row] + 1, last_draft = batch.logits_rows[row];
  for (int id = begin + static_cast<int>(threadIdx.x); id < end; id += static_cast<int>(blockDim.x)) {
    float logit = to[id];
    if (place >= 0 && (static_cast<std::uint32_t>(bits[id / 32]) >> id % 32 & 1) == 0) logit = -INFINITY;
    if (penalised) {
      std::int32_t count = state.counts[id];
      for (int draft = first_draft; draft <= last_draft; ++draft)
        count += static_cast<int>(batch.token_ids[draft] == id);
      if (state.in_prompt[id] != 0 || count > 0)
        logit = logit > 0 ? logit / state.repetition_penalty : logit * state.repetition_penalty;
      if (count > 0) logit = logit - state.frequency_penalty * static_cast<float>(count) - state.presence_penalty;
    }
    to[id] = logit;
  }
}

// ---- Greedy: the largest logit

__device__ __forceinline__ std::uint64_t larger(std::uint64_t a, std::uint64_t b) { return a > b ? a : b; }

__device__ __forceinline__ int id_of(std::uint64_t rank) {
  return static_cast<int>(0xffffffffU - static_cast<std::uint32_t>(rank));
}

// Grid: (rows, parts of a row). Each block writes its part's best key to `best` [rows, parts]; the last block of a row
// to finish combines them. `counters` [rows] are zero before and after.
static __global__ void greedy_kernel(const float* logits, int size, std::uint64_t* best, std::int32_t* counters,
                                     std::int32_t* ids) {
  __shared__ std::uint64_t shared[32];
  let_next_begin();
  wait_for_previous();
  const int row = static_cast<int>(blockIdx.x), parts = static_cast<int>(gridDim.y);
  const float* from = logits + static_cast<std::int64_t>(row) * size;
  std::uint64_t rank = 0;
  const int begin = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x),
            stride = parts * static_cast<int>(blockDim.x);
  if (size % 4 == 0) {
    const auto* packs = reinterpret_cast<const float4*>(from);
    for (int i = begin; i < size / 4; i += stride) {
      const float4 pack = packs[i];
      rank = larger(larger(larger(rank, ranked(pack.x, 4 * i)), ranked(pack.y, 4 * i + 1)),
                    larger(ranked(pack.z, 4 * i + 2), ranked(pack.w, 4 * i + 3)));
    }
  } else {
    for (int id = begin; id < size; id += stride) rank = larger(rank, ranked(from[id], id));
  }
  rank = block_reduce(rank, shared, [](std::uint64_t a, std::uint64_t b) { return larger(a, b); });
  if (threadIdx.x != 0) return;
  best += static_cast<std::int64_t>(row) * parts;
  best[blockIdx.y] = rank;
  __threadfence();
  if (atomicAdd(counters + row, 1) != parts - 1) return;
  counters[row] = 0;
  __threadfence();
  for (int part = 0; part < parts; ++part) rank = larger(rank, __ldcg(best + part));
  ids[row] = id_of(rank);
}

// ---- Drawing

__device__ __forceinline__ std::uint64_t mix(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return z ^ (z >> 31);
}

// The random number of uniform() in vllmlite/backends/sampling.py, in units of 2^-24.
__device__ __forceinline__ std::uint64_t uniform(std::uint64_t seed, std::int64_t position) {
  constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15U;
  return mix(mix(seed + kGolden) + (static_cast<std::uint64_t>(position) + 1) * kGolden) >> 40;
}

// exp(x), for x <= 0, in units of 2^-44, so that sums of 2^19 of them fit 64 bits.
__device__ __forceinline__ unsigned long long mass_of(float x) {
  if (x < -30.5F) return 0;
  const std::uint32_t bits = __float_as_uint(expf(x));
  const unsigned long long mantissa = (bits & 0x7fffffU) | 0x800000U;
  const int shift = static_cast<int>(bits >> 23) - 127 - 23 + 44;
  return shift >= 0 ? mantissa << shift : mantissa >> -shift;
}

// A histogram of numbers <= 0: it is fine where they are large, which separates them without sorting.
constexpr int kBins = 2048;
constexpr float kBinsPerUnit = 64;
constexpr int kListed = 1024;  // once at most this many numbers are left, they are kept in shared memory

__device__ __forceinline__ int bin_of(float x) {
  return static_cast<int>(fminf(-x * kBinsPerUnit, static_cast<float>(kBins - 1)));
}

struct DrawShared {
  SelectShared select;
  unsigned long long bins[kBins];
  unsigned long long sums[32];
  std::uint64_t ranks[32];
  std::uint64_t keys[kListed];
  float close[kListed], logits[kListed];
  std::int32_t ids[kListed];
  Reached found;
  int count, place;
};

// Logits as numbers <= 0: their distance from the largest, divided by the temperature.
struct Numbers {
  const float* logits;
  int size;
  float largest, factor;

  __device__ __forceinline__ float of(float logit) const { return fminf((logit - largest) * factor, 0.0F); }
  __device__ __forceinline__ float at(int place) const { return of(without_nan(logits[place])); }
};

// The largest number for which the masses of all numbers not below it reach `aim`; the least number with a mass if the
// total does not. Called by the whole block.
template <typename Mass>
__device__ float cut(const Numbers& numbers, unsigned long long aim, Mass mass, DrawShared& shared) {
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSelectThreads) shared.bins[i] = 0;
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for_each(numbers.logits, numbers.size, [&](int, float logit) {
    const float x = numbers.of(logit);
    if (const unsigned long long weight = mass(x); weight != 0) atomicAdd(&shared.bins[bin_of(x)], weight);
  });
  __syncthreads();
  if (threadIdx.x < 32) {
    const Reached found = reach(shared.bins, kBins, aim, [](int i) { return i; });
    if (threadIdx.x == 0) shared.found = found;
  }
  __syncthreads();
  const auto [bin, before] = shared.found;
  for_each(numbers.logits, numbers.size, [&](int, float logit) {
    const float x = numbers.of(logit);
    if (bin_of(x) != bin || mass(x) == 0) return;
    if (const int place = atomicAdd(&shared.count, 1); place < kListed) shared.close[place] = x;
  });
  __syncthreads();
  const unsigned long long rest = aim > before ? aim - before : 0;
  const auto key = [](float x) { return static_cast<std::uint64_t>(ordered(x)); };
  const std::uint64_t found =
      shared.count <= kListed
          ? select<32>(
                shared.count, rest, [&](int i) { return key(shared.close[i]); },
                [&](int i) { return mass(shared.close[i]); }, shared.select)
          : select<32>(
                numbers.size, rest, [&](int i) { return key(numbers.at(i)); },
                [&, bin = bin](int i) { return bin_of(numbers.at(i)) == bin ? mass(numbers.at(i)) : 0ULL; },
                shared.select);
  const auto bits = static_cast<std::uint32_t>(found);
  return __uint_as_float((bits & 0x80000000U) != 0 ? bits & 0x7fffffffU : ~bits);
}

// If at most kListed numbers are >= `least`, makes `numbers` those, in shared memory, by ascending id. Returns whether
// it did, to every thread.
__device__ bool list(Numbers& numbers, float least, DrawShared& shared) {
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kListed; i += kSelectThreads) shared.keys[i] = 0;
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for_each(numbers.logits, numbers.size, [&](int id, float logit) {
    if (numbers.of(logit) < least) return;
    if (const int place = atomicAdd(&shared.count, 1); place < kListed)
      shared.keys[place] =
          static_cast<std::uint64_t>(0xffffffffU - static_cast<std::uint32_t>(id)) << 32 | __float_as_uint(logit);
  });
  __syncthreads();
  if (shared.count > kListed) return false;
  sort_descending(shared.keys, kListed);
  for (int i = static_cast<int>(threadIdx.x); i < shared.count; i += kSelectThreads) {
    shared.ids[i] = static_cast<int>(0xffffffffU - static_cast<std::uint32_t>(shared.keys[i] >> 32));
    shared.logits[i] = __uint_as_float(static_cast<std::uint32_t>(shared.keys[i]));
  }
  __syncthreads();
  numbers.logits = shared.logits;
  numbers.size = shared.count;
  return true;
}

// Grid: (rows), kSelectThreads threads each. Every filter becomes a minimum, so that equal logits are kept or dropped
// together.
static __global__ __launch_bounds__(kSelectThreads) void draw_kernel(const float* logits, int size,
                                                                     const __grid_constant__ BatchView batch,
                                                                     std::int32_t* ids) {
  __shared__ DrawShared shared;
  let_next_begin();
  wait_for_previous();
  const int row = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const SlotState& state = batch.states[batch.sample_slots[row]];
  Numbers numbers{logits + static_cast<std::int64_t>(row) * size, size, 0, 0};
  std::uint64_t rank = 0;
  for_each(numbers.logits, size, [&](int id, float logit) { rank = larger(rank, ranked(logit, id)); });
  rank = block_reduce(rank, shared.ranks, [](std::uint64_t a, std::uint64_t b) { return larger(a, b); });
  const int best = id_of(rank);
  numbers.largest = without_nan(numbers.logits[best]);
  if (state.temperature <= 0 || !isfinite(numbers.largest)) {
    if (thread == 0) ids[row] = best;
    return;
  }
  numbers.factor = fminf(1 / state.temperature, 1e30F);
  float least = state.log_min_p;
  bool listed = false;
  if (state.top_k > 0 && state.top_k < size) {
    const auto aim = static_cast<unsigned long long>(state.top_k);
    least = fmaxf(least, cut(numbers, aim, [](float) { return 1ULL; }, shared));
    listed = list(numbers, least, shared);
  }
  const auto mass = [&](float x) { return x < least ? 0ULL : mass_of(x); };
  const auto sum_up = [&] {
    unsigned long long sum = 0;
    for_each(numbers.logits, numbers.size, [&](int, float logit) { sum += mass(numbers.of(logit)); });
    return block_reduce(sum, shared.sums, [](unsigned long long a, unsigned long long b) { return a + b; });
  };
  unsigned long long total = sum_up();
  if (state.top_p < 1) {
    const auto aim = static_cast<unsigned long long>(__double2ull_ru(static_cast<double>(total) * state.top_p));
    least = fmaxf(least, cut(numbers, aim, mass, shared));
    total = sum_up();
  }
  // Finds the first id at which the cumulative mass exceeds `aim`: first the warp whose share of the row holds it, then
  // the id within the share.
  const std::uint64_t draw = uniform(state.seed, batch.sample_positions[row]);
  const std::uint64_t aim = __umul64hi(draw, total) << 40 | draw * total >> 24;
  const int lane = thread % 32, warp = thread / 32;
  const int share = ((numbers.size + 31) / 32 + 31) / 32 * 32;
  const int begin = warp * share, end = min(begin + share, numbers.size);
  unsigned long long own = 0;
#pragma unroll 4
  for (int i = begin + lane; i < end; i += 32) own += mass(numbers.at(i));
  for (int offset = 16; offset > 0; offset /= 2) own += __shfl_xor_sync(kAll, own, offset);
  __syncthreads();
  if (lane == 0) shared.sums[warp] = own;
  if (thread == 0) shared.place = -1;
  __syncthreads();
  unsigned long long before = 0;
  for (int i = 0; i < warp; ++i) before += shared.sums[i];
  if (before <= aim && before + own > aim) {
    for (int at = begin; at < end; at += 32) {
      const int i = at + lane;
      unsigned long long sum = i < end ? mass(numbers.at(i)) : 0;
      for (int offset = 1; offset < 32; offset *= 2) {
        const unsigned long long other = __shfl_up_sync(kAll, sum, offset);
        if (lane >= offset) sum += other;
      }
      const unsigned passed = __ballot_sync(kAll, before + sum > aim);
      if (passed != 0) {
        if (lane == 0) shared.place = at + __ffs(static_cast<int>(passed)) - 1;
        break;
      }
      before += __shfl_sync(kAll, sum, 31);
    }
  }
  __syncthreads();
  if (thread != 0) return;
  const int place = shared.place;
  ids[row] = place < 0 ? best : listed ? shared.ids[place] : place;
}

// ---- Accepting drafts: one thread per slot, that of its first sampled position

static __global__ void accept_kernel(const std::int32_t* ids, int count, const __grid_constant__ BatchView batch,
                                     std::int32_t* accepted) {
  let_next_begin();
  wait_for_previous();
  const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (first >= count) return;
  const std::int32_t token = batch.first_sampled[first];
  if (batch.logits_rows[first] != token) return;
  const int slot = batch.sample_slots[first];
  std::int32_t* counts = batch.states[slot].counts;
  bool goes_on = true;
  for (int i = first; i < count && batch.first_sampled[i] == token; ++i) {
    goes_on = goes_on && (i == first || ids[i - 1] == batch.token_ids[batch.logits_rows[i]]);
    accepted[i] = static_cast<int>(goes_on);
    if (!goes_on) continue;
    batch.last_id[slot] = ids[i];
    if (counts != nullptr) ++counts[ids[i]];
  }
}

// ---- The op

static void check_logits(const Tensor& logits) {
  if (logits.dtype != DType::float32 || logits.shape.size() != 2 || logits.shape[1] == 0)
    throw std::invalid_argument("logits must be float32 [rows, vocabulary], not " + describe(logits));
}

void check_logits(const Tensor& logits, const Batch& batch) {
  check_logits(logits);
  if (logits.shape[0] != batch.num_samples || logits.shape[1] != batch.slots->vocab_size)
    throw std::invalid_argument("logits " + describe(logits.shape) + " do not fit the batch's " +
                                std::to_string(batch.num_samples) + " rows and " +
                                std::to_string(batch.slots->vocab_size) + " ids");
}

void edit(Runtime& runtime, const float* from, float* to, std::int64_t rows, const Batch& batch,
          const std::int32_t* positions) {
  const int size = batch.slots->vocab_size;
  launch(runtime, edit_kernel, dim3(static_cast<unsigned>(rows), blocks_for(size, kThreads * 8)), kThreads, 0, from, to,
         size, positions, batch.view);
}

Sampled sample(Runtime& runtime, const Tensor& logits, const Batch& batch) {
  check_logits(logits, batch);
  const std::int64_t rows = logits.shape[0];
  const auto size = static_cast<int>(logits.shape[1]);
  const DeviceGuard guard(runtime.device());
  Sampled out{runtime.make({rows}, DType::int32), std::nullopt};
  auto* ids = static_cast<std::int32_t*>(out.ids.data);
  const bool wanted = batch.num_logprobs >= 0;
  Tensor edited = logits;
  if (rows > 0) {
    const auto count = static_cast<unsigned>(rows);
    if ((batch.needs & kEditing) != 0) {
      if (wanted) edited = runtime.make(logits.shape, logits.dtype);
      edit(runtime, static_cast<const float*>(logits.data), static_cast<float*>(edited.data), rows, batch, nullptr);
    }
    const auto* from = static_cast<const float*>(edited.data);
    if ((batch.needs & kDrawing) != 0) {
      launch(runtime, draw_kernel, count, kSelectThreads, 0, from, size, batch.view, ids);
    } else {
      const Tensor best = runtime.make({rows, kParts}, DType::int64);
      launch(runtime, greedy_kernel, dim3(count, kParts), kThreads, 0, from, size,
             static_cast<std::uint64_t*>(best.data), runtime.counters(static_cast<std::size_t>(rows)), ids);
    }
  }
  if (wanted) out.logprobs = logprobs(runtime, logits, out.ids, batch.num_logprobs);
  out.ids = runtime.copied_to_host(out.ids);
  if (out.logprobs)
    for (Tensor* tensor : {&out.logprobs->chosen, &out.logprobs->rank, &out.logprobs->top_ids, &out.logprobs->top})
      *tensor = runtime.copied_to_host(*tensor);
  return out;
}

Tensor accept(Runtime& runtime, const Tensor& ids, const Batch& batch) {
  check_dtype(ids, DType::int32, "ids of accept");
  check_shape(ids, {batch.num_samples}, "ids of accept");
  const DeviceGuard guard(runtime.device());
  Tensor accepted = runtime.make(ids.shape, DType::int32);
  launch(runtime, accept_kernel, blocks_for(batch.num_samples, kThreads), kThreads, 0,
         static_cast<const std::int32_t*>(ids.data), batch.num_samples, batch.view,
         static_cast<std::int32_t*>(accepted.data));
  runtime.start_host_copies();
  return accepted;
}

}  // namespace vllmlite::cuda
