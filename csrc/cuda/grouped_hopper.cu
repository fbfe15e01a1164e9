// Products of more than 64 rows of x with a weight in groups of integers (layout: grouped.hpp), for sm_90a.
//
// Grid: an item is kBands tiles of kTileRows rows of w and a tile of kM rows of x. A cluster of `splits` blocks
// computes an item by split-K: block i multiplies the i-th part of the stages. There are as many clusters as items. If
// splits is 1, there are at most as many blocks as run at a time, and each takes every gridDim-th item.
//
// Block: two warpgroups that multiply, and one whose first thread starts the copies. Multiplying warp i has rows 16 i
// to 16 i + 15 of each tile of w, and all rows of the tile of x. Rows of w are the rows of the tensor cores' first
// operand, from registers, rows of x the columns of the second, from shared memory: a thread holds the sums of rows
// lane / 4 and lane / 4 + 8 of its warp's, and of rows 8 j + 2 (lane % 4) and the next of x, for each j < kM / 8.
//
// Shared memory: a ring of kStages stages, which TMA copies fill ahead. The first copies of w start before the previous
// kernel has ended. mbarriers signal that a stage is full or empty. With splits, each block then stores its sums over
// the ring; the blocks of the cluster read them through distributed shared memory, and each adds a part of them, in the
// order of the splits.
//
// Integers minus their zero are multiplied by the group's scale and rounded to T, as dequantise() does.
#include <algorithm>
#include <array>

#include "cuda/grouped_fragment.cuh"
#include "cuda/hopper.cuh"
#include "cuda/tensor_map.cuh"

namespace vllmlite::cuda {

constexpr int kMostSplits = 4;  // blocks of a cluster

struct HopperProduct : GroupedProduct {
  CUtensorMap x_map;
  int splits;
};

// kGroupsOfStage: that a stage meets.
template <int kBits, int kBandsOfBlock, int kGroupsOfStage, int kDepth>
struct HopperTile {
  static constexpr int kM = 128, kBands = kBandsOfBlock, kGroups = kGroupsOfStage, kStages = kDepth;
  static constexpr int kWords = kBits / 2;  // of 16 bytes that a thread has of a stage of a tile
  static constexpr int kMultiplying = kGroupedWarps * 32, kThreads = kMultiplying + 128;
  static constexpr int kCopyingRegisters = 24, kMultiplyingRegisters = 240;  // of a thread
  static constexpr int kParts = kM / 8;                                      // of the sums of a tile, 8 rows of x each

  struct Shared {
    union {
      struct {
        uint4 x[kStages][kStageColumns / 64][kM][8];
        uint4 weight[kStages][kBands][kGroupedWarps][kWords][32];
        std::uint32_t scales[kStages][kBands][kGroups][kTileRows];
      };
      float4 sums[kBands][kParts][kMultiplying];
    };
    std::uint64_t full[kStages], empty[kStages];
  };
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int kBits, typename S>
struct HopperBlock {
  const HopperProduct& given;
  typename S::Shared& shared;
  int split = static_cast<int>(blockIdx.x) % given.splits, begin = split * given.stages / given.splits,
      end = (split + 1) * given.stages / given.splits;
  int tiles_of_x = (given.m + S::kM - 1) / S::kM;
  int items = (given.tiles + S::kBands - 1) / S::kBands * tiles_of_x;
  int first = static_cast<int>(blockIdx.x) / given.splits, step = static_cast<int>(gridDim.x) / given.splits;
  int slot = 0, parity = 0;

  __device__ __forceinline__ HopperBlock(const HopperProduct& product, typename S::Shared& memory)
      : given(product), shared(memory) {}

  __device__ __forceinline__ void advance() {
    if (++slot == S::kStages) {
      slot = 0;
      parity ^= 1;
    }
  }

  // ---- Copies

  __device__ __forceinline__ void copy_weight(int item, int stage, int to) const {
    constexpr int kOfTile = sizeof(shared.weight[0][0]), kOfScales = sizeof(shared.scales[0][0]);
    arrive_expecting(shared.full[to], S::kBands * (kOfTile + kOfScales) + static_cast<int>(sizeof(shared.x[0])));
    const int group = S::kGroups > 1 ? stage * S::kGroups : stage / given.stages_of_group;
#pragma unroll
    for (int band = 0; band < S::kBands; ++band) {
      const std::int64_t tile = min(item / tiles_of_x * S::kBands + band, given.tiles - 1);
      copy_bytes(&shared.weight[to][band], given.weight + (tile * given.stages + stage) * (kOfTile / 16), kOfTile,
                 shared.full[to]);
      copy_bytes(&shared.scales[to][band], given.scales + (tile * given.groups + group) * kTileRows, kOfScales,
                 shared.full[to]);
    }
  }

  __device__ __forceinline__ void copy_x(int item, int stage, int to) const {
#pragma unroll
    for (int part = 0; part < kStageColumns / 64; ++part)
      copy_box(&shared.x[to][part], given.x_map, shared.full[to], stage * kStageColumns + part * 64,
               item % tiles_of_x * S::kM);
  }

  __device__ __forceinline__ void copy() {
    prefetch_map(given.x_map);
    int item = first;
    const int early = min(S::kStages, end - begin);
    if (item < items)
      for (int i = 0; i < early; ++i) copy_weight(item, begin + i, i);
    wait_for_previous();
    int stage = begin;
    if (item < items)
      for (int i = 0; i < early; ++i, ++stage, advance()) copy_x(item, stage, i);
    for (; item < items; item += step, stage = begin)
      for (; stage < end; ++stage, advance()) {
        wait(shared.empty[slot], parity ^ 1);
        copy_weight(item, stage, slot);
        copy_x(item, stage, slot);
      }
  }

  // ---- Products

  // Adds the products of a stage; the last ones are still running when it returns. It releases `before`, the slot of
  // the previous stage, as soon as all products of that stage have ended.
  template <typename T>
  __device__ __forceinline__ void multiply_stage(float (&sums)[S::kBands][S::kM / 2], int before) const {
    constexpr int kSteps = kStageColumns / 16 / S::kGroups;
    constexpr int kInFlight = 3;  // fragments have registers at a time
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    std::uint32_t words[S::kBands][S::kWords * 4];
#pragma unroll
    for (int band = 0; band < S::kBands; ++band) load_words(shared.weight[slot][band][warp], lane, words[band]);
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      ScaledIntegers<T, kBits> integers[S::kBands];
#pragma unroll
      for (int band = 0; band < S::kBands; ++band)
        integers[band].set(
            *reinterpret_cast<const uint2*>(&shared.scales[slot][band][group][warp * 16 + lane / 4 * 2]));
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int step = group * kSteps + i;
        const std::uint64_t x = operand(&shared.x[slot][step / 4][0][step % 4 * 2], 1024, 0);
#pragma unroll
        for (int band = 0; band < S::kBands; ++band) {
          std::uint32_t a[4];
          integers[band].fragment(words[band], step, a);
          begin_products();
          multiply_fragment<T>(sums[band], a, x, false);
          commit_products();
          wait_for_products<kInFlight - 1>();
          if (step * S::kBands + band == kInFlight - 1 && before >= 0 && lane == 0) arrive(shared.empty[before]);
        }
      }
    }
  }

  // ---- Results

  // Writes the sums of 16 rows of w and 8 rows of x, from n0 and m0 on; a thread has four of them.
  template <typename T>
  __device__ __forceinline__ void write(const float4& sums, int n0, int m0) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const T* bias = static_cast<const T*>(given.bias);
    const float of_half[2][2] = {{sums.x, sums.y}, {sums.z, sums.w}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = n0 + half * 8 + lane / 4;
      const float added = bias != nullptr && row < given.n ? to_float(bias[row]) : 0;
      // Transposed, a thread has a row of x and two neighbouring rows of w.
      union {
        std::uint32_t bits;
        T values[2];
      } two{transposed(pair<T>(of_half[half][0] + added, of_half[half][1] + added))};
      const int m = m0 + lane / 4, n = n0 + half * 8 + lane % 4 * 2;
      if (m >= given.m || n >= given.n) continue;
      T* to = static_cast<T*>(given.y) + static_cast<std::int64_t>(m) * given.stride + n;
      if (n + 1 < given.n && reinterpret_cast<std::uintptr_t>(to) % 4 == 0) {
        *reinterpret_cast<std::uint32_t*>(to) = two.bits;
      } else {
        to[0] = two.values[0];
        if (n + 1 < given.n) to[1] = two.values[1];
      }
    }
  }

  template <typename T>
  __device__ __forceinline__ void finish(int item, const float (&sums)[S::kBands][S::kM / 2]) const {
    const int warp = static_cast<int>(threadIdx.x / 32), m0 = item % tiles_of_x * S::kM;
    const int n0 = item / tiles_of_x * S::kBands * kTileRows + warp * 16;
    if (given.splits == 1) {
#pragma unroll
      for (int band = 0; band < S::kBands; ++band)
#pragma unroll
        for (int j = 0; j < S::kParts; ++j)
          if (m0 + j * 8 < given.m)
            write<T>(
                make_float4(sums[band][4 * j], sums[band][4 * j + 1], sums[band][4 * j + 2], sums[band][4 * j + 3]),
                n0 + band * kTileRows, m0 + j * 8);
      return;
    }
    meet(1, S::kMultiplying);  // no warp reads the ring any more
#pragma unroll
    for (int band = 0; band < S::kBands; ++band)
#pragma unroll
      for (int j = 0; j < S::kParts; ++j)
        if (m0 + j * 8 < given.m)
          shared.sums[band][j][threadIdx.x] =
              make_float4(sums[band][4 * j], sums[band][4 * j + 1], sums[band][4 * j + 2], sums[band][4 * j + 3]);
    meet_cluster();
    for (int part = split; part < S::kBands * S::kParts; part += given.splits) {
      const int band = part / S::kParts, j = part % S::kParts;
      if (m0 + j * 8 >= given.m) continue;
      float4 total = make_float4(0, 0, 0, 0);
      for (int block = 0; block < given.splits; ++block) {
        const float4 theirs = load_of_cluster(&shared.sums[band][j][threadIdx.x], block);
        total.x += theirs.x;
        total.y += theirs.y;
        total.z += theirs.z;
        total.w += theirs.w;
      }
      write<T>(total, n0 + band * kTileRows, m0 + j * 8);
    }
    meet_cluster();  // no block reads these sums any more
  }
};

#endif

template <typename T, int kBits, typename S>
static __global__ __launch_bounds__(S::kThreads,
                                    1) void grouped_hopper_kernel(const __grid_constant__ HopperProduct given) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char storage[];
  auto& shared = *reinterpret_cast<typename S::Shared*>(storage);
  HopperBlock<kBits, S> block(given, shared);
  let_next_begin();
  init_ring(shared.full, shared.empty, kGroupedWarps);
  if (threadIdx.x >= S::kMultiplying) {
    give_registers_up<S::kCopyingRegisters>();
    if (threadIdx.x == S::kMultiplying) block.copy();
    return;
  }
  take_registers<S::kMultiplyingRegisters>();
  wait_for_previous();
  for (int item = block.first; item < block.items; item += block.step) {
    float sums[S::kBands][S::kM / 2] = {};
    int before = -1;
    for (int stage = block.begin; stage < block.end; ++stage, block.advance()) {
      wait(shared.full[block.slot], block.parity);
      block.template multiply_stage<T>(sums, before);
      before = block.slot;
    }
    wait_for_products<0>();
#pragma unroll
    for (int band = 0; band < S::kBands; ++band) hold(sums[band]);
    if (threadIdx.x % 32 == 0) arrive(shared.empty[before]);
    block.template finish<T>(item, sums);
  }
#else
  __trap();  // such kernels are launched where they were built for the chip
#endif
}

// Returns how many clusters of each number of blocks run at a time: fewer than there is room for, since a cluster runs
// within one of the groups in which multiprocessors are built.
template <typename T, int kBits, typename S>
static std::array<int, kMostSplits + 1> clusters_at_a_time(const Runtime& runtime) {
  const auto kernel = grouped_hopper_kernel<T, kBits, S>;
  VLLMLITE_CUDA_CHECK(cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                      static_cast<int>(sizeof(typename S::Shared)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = sizeof(typename S::Shared);
  config.attrs = &cluster;
  config.numAttrs = 1;
  std::array<int, kMostSplits + 1> found{1, runtime.multiprocessors()};
  for (int blocks = 2; blocks <= kMostSplits; ++blocks) {
    int& count = found[static_cast<std::size_t>(blocks)];
    cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    VLLMLITE_CUDA_CHECK(cudaOccupancyMaxActiveClusters, &count, kernel, &config);
    count = std::max(1, count);
  }
  return found;
}

// The fastest number of splits, and an estimate of its time in microseconds.
struct HopperPlan {
  int splits;
  double time;
};

template <typename T, int kBits, typename S>
static HopperPlan plan(const Runtime& runtime, const GroupedProduct& product) {
  // Microseconds of a stage, of the start and end of a block, and of adding the splits, as measured on an H200.
  constexpr double kStage = S::kBands == 1 ? 0.71 : 1.3, kBlock = S::kBands == 1 ? 4 : 6, kAdding = 1.5;
  const int items = ((product.tiles + S::kBands - 1) / S::kBands) * ((product.m + S::kM - 1) / S::kM);
  static const auto clusters = clusters_at_a_time<T, kBits, S>(runtime);
  HopperPlan best{};
  for (int splits = 1; splits <= std::min(kMostSplits, product.stages); ++splits) {
    const unsigned rounds = blocks_for(items, clusters[static_cast<std::size_t>(splits)]);
    const double own = blocks_for(product.stages, splits) * kStage;
    const double time = splits == 1 ? rounds * own + kBlock : rounds * (own + kBlock + kAdding);
    if (splits == 1 || time < best.time) best = {splits, time};
  }
  return best;
}

template <typename T, int kBits, typename S>
static void run(const Runtime& runtime, const GroupedProduct& product, int splits) {
  const int items = ((product.tiles + S::kBands - 1) / S::kBands) * ((product.m + S::kM - 1) / S::kM);
  HopperProduct given{
      product, tensor_map(product.x, runtime.dtype(), {{product.k, 1, 64}, {product.m, product.k, S::kM}}), splits};
  const int clusters = splits == 1 ? std::min(items, runtime.multiprocessors()) : items;
  launch_clusters(runtime, grouped_hopper_kernel<T, kBits, S>, static_cast<unsigned>(splits),
                  static_cast<unsigned>(clusters * splits), S::kThreads, sizeof(typename S::Shared), given);
}

template <typename T>
static void run_sized(const Runtime& runtime, const GroupedProduct& product) {
  with_groups(product, [&](auto bits, auto groups) {
    constexpr int kBits = decltype(bits)::value, kGroups = decltype(groups)::value;
    using Low = HopperTile<kBits, 1, kGroups, 4>;
    using High = HopperTile<kBits, 2, kGroups, kBits == 4 ? 4 : 3>;
    const HopperPlan low = plan<T, kBits, Low>(runtime, product), high = plan<T, kBits, High>(runtime, product);
    if (low.time <= high.time)
      run<T, kBits, Low>(runtime, product, low.splits);
    else
      run<T, kBits, High>(runtime, product, high.splits);
  });
}

void multiply_grouped_on_hopper(const Runtime& runtime, const GroupedProduct& product) {
  runtime.dtype() == DType::float16 ? run_sized<f16>(runtime, product) : run_sized<bf16>(runtime, product);
}

}  // namespace vllmlite::cuda
