// Exact selection in a row of numbers by one block of threads: a radix select, which counts the keys by digit, the
// highest digit first, and goes on with those that share the digits found so far.
#pragma once

#include "cuda/kernel.cuh"

namespace vllmlite::cuda {

constexpr int kSelectThreads = 1024;
constexpr int kDigits = 256;  // values of a digit of 8 bits

// A logit, or -inf for a NaN.
__device__ __forceinline__ float without_nan(float x) { return fmaxf(x, -INFINITY); }

// A key in the order of the numbers; -0 equals 0, and a NaN equals -inf.
__device__ __forceinline__ std::uint32_t ordered(float x) {
  const auto bits = __float_as_uint(without_nan(x) + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

// A key in ascending order of the number and, among equals, descending order of the id; unique in a row.
__device__ __forceinline__ std::uint64_t ranked(float x, int id) {
  return static_cast<std::uint64_t>(ordered(x)) << 32 | (0xffffffffU - static_cast<std::uint32_t>(id));
}

// Calls visit(id, number) for all numbers of a row, spread over kSelectThreads threads; a NaN is passed as -inf.
template <typename Visit>
__device__ __forceinline__ void for_each(const float* row, int size, Visit visit) {
  if (size % 4 != 0) {
    for (int id = static_cast<int>(threadIdx.x); id < size; id += kSelectThreads) visit(id, without_nan(row[id]));
    return;
  }
  const auto* packs = reinterpret_cast<const float4*>(row);
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < size / 4; i += kSelectThreads) {
    const float4 pack = packs[i];
    visit(4 * i, without_nan(pack.x));
    visit(4 * i + 1, without_nan(pack.y));
    visit(4 * i + 2, without_nan(pack.z));
    visit(4 * i + 3, without_nan(pack.w));
  }
}

// Sorts `size` keys, a power of two, in descending order, with kSelectThreads threads (bitonic sort, Batcher 1968).
__device__ inline void sort_descending(std::uint64_t* keys, int size) {
  for (int run = 2; run <= size; run *= 2)
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < size / 2; i += kSelectThreads) {
        const int low = i / distance * 2 * distance + i % distance, high = low + distance;
        const std::uint64_t a = keys[low], b = keys[high];
        if ((a < b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  __syncthreads();
}

struct Reached {
  int place;
  unsigned long long before;
};

// Adds up `masses` in the order at(0), at(1), …, at(count - 1), with `count` a multiple of 32. Returns the first place
// where the sum reaches `aim` and the sum before it; if none does, the last place with a mass, or at(0). Called by one
// whole warp.
template <typename At>
__device__ Reached reach(const unsigned long long* masses, int count, unsigned long long aim, At at) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  unsigned long long before = 0;
  Reached found{at(0), 0};
  for (int base = 0; base < count; base += 32) {
    const unsigned long long own = masses[at(base + lane)];
    unsigned long long sum = own;
    for (int offset = 1; offset < 32; offset *= 2) {
      const unsigned long long other = __shfl_up_sync(kAll, sum, offset);
      if (lane >= offset) sum += other;
    }
    const unsigned filled = __ballot_sync(kAll, own != 0);
    const unsigned reached = __ballot_sync(kAll, own != 0 && before + sum >= aim);
    if (filled != 0) {
      const int which = reached != 0 ? __ffs(static_cast<int>(reached)) - 1 : 31 - __clz(static_cast<int>(filled));
      found = {at(base + which), before + __shfl_sync(kAll, sum - own, which)};
    }
    if (reached != 0) break;
    before += __shfl_sync(kAll, sum, 31);
  }
  return found;
}

struct SelectShared {
  unsigned long long masses[kDigits];
  Reached found;
};

// The largest key for which the masses of all keys not below it reach `aim`; the least key with a mass if the total
// does not. `key` and `mass` are functions of an index below `size`; keys are below 2^kBits. Every thread gets the
// result.
template <int kBits, typename Key, typename Mass>
__device__ std::uint64_t select(int size, unsigned long long aim, Key key, Mass mass, SelectShared& shared) {
  std::uint64_t prefix = 0;
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += static_cast<int>(blockDim.x)) shared.masses[i] = 0;
    __syncthreads();
    for (int id = static_cast<int>(threadIdx.x); id < size; id += static_cast<int>(blockDim.x)) {
      const std::uint64_t own = key(id);
      const bool inside = shift + 8 >= 64 || own >> (shift + 8) == prefix;
      const unsigned long long weight = inside ? mass(id) : 0;
      if (weight != 0) atomicAdd(&shared.masses[own >> shift & (kDigits - 1)], weight);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      const Reached found = reach(shared.masses, kDigits, aim, [](int i) { return kDigits - 1 - i; });
      if (threadIdx.x == 0) shared.found = found;
    }
    __syncthreads();
    prefix = prefix << 8 | static_cast<std::uint64_t>(shared.found.place);
    aim = aim > shared.found.before ? aim - shared.found.before : 0;
  }
  return prefix;
}

}  // namespace vllmlite::cuda
