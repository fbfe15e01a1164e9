// Measure two limits of this machine with all given threads: memory read bandwidth, and bfloat16 multiply-adds.
//
//   c++ -O2 -std=c++20 -march=native -pthread scripts/cpu_probe.cpp -o cpu_probe && ./cpu_probe THREADS
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

using Lanes = long long __attribute__((vector_size(64)));

volatile long long sink;

template <typename Work>
double seconds(int threads, Work work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::jthread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  others.clear();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Reads four pages side by side, prefetching each line `distance` bytes ahead.
void read(const char* from, std::size_t bytes, std::size_t distance) {
  constexpr std::size_t kPage = 4096, kStreams = 4;
  Lanes sums[kStreams] = {};
  for (std::size_t at = 0; at + kStreams * kPage <= bytes; at += kStreams * kPage)
    for (std::size_t line = 0; line < kPage; line += 64)
      for (std::size_t stream = 0; stream < kStreams; ++stream) {
        const char* const address = from + at + stream * kPage + line;
        __builtin_prefetch(address + distance, 0, 2);
        Lanes value;
        std::memcpy(&value, address, sizeof value);
        sums[stream] += value;
      }
  const Lanes all = sums[0] + sums[1] + sums[2] + sums[3];
  sink = sink + all[0];
}

#if defined(__AVX512BF16__)
constexpr int kAccumulators = 24;

void multiply(long rounds) {
  __m512 acc[kAccumulators];
  for (int j = 0; j < kAccumulators; ++j)
    acc[j] = _mm512_set1_ps(static_cast<float>(j));  // distinct: or they are merged
  const auto ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kAccumulators; ++j) acc[j] = _mm512_dpbf16_ps(acc[j], ones, ones);
    asm volatile("" ::"x"(acc[0]));
  }
  __m512 all = acc[0];
  for (int j = 1; j < kAccumulators; ++j) all = _mm512_add_ps(all, acc[j]);
  sink = sink + static_cast<long long>(_mm512_reduce_add_ps(all));
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  constexpr std::size_t kBytes = std::size_t{1} << 30, kHugePage = std::size_t{2} << 20;
  auto* const memory = static_cast<char*>(std::aligned_alloc(kHugePage, kBytes));
  if (memory == nullptr) return 1;
  madvise(memory, kBytes, MADV_HUGEPAGE);
  std::memset(memory, 1, kBytes);
  double bandwidth = 0, products = 0;
  for (int round = 0; round < 3; ++round) {
    for (const std::size_t distance : {1024, 12288, 65536}) {
      const std::size_t share = kBytes / static_cast<std::size_t>(threads);
      const double taken =
          seconds(threads, [&](int i) { read(memory + static_cast<std::size_t>(i) * share, share, distance); });
      bandwidth = std::max(bandwidth, static_cast<double>(kBytes) / taken / 1e9);
    }
#if defined(__AVX512BF16__)
    constexpr long kRounds = 2'000'000;
    const double taken = seconds(threads, [](int) { multiply(kRounds); });
    products = std::max(products, 64.0 * kAccumulators * kRounds * threads / taken / 1e9);
#endif
  }
  std::printf("{\"read_gb_s\": %.1f, \"bf16_gflop_s\": %.0f}\n", bandwidth, products);
}
