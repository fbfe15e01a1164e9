// y = x @ w.T of 16-bit x [m, k] and a weight in groups of 4-bit or 8-bit integers, whose layout grouped.hpp describes.
//
// Grid: (blocks, tiles of x). A tile of x has kM rows. Tiles of w have kTileRows rows; their stages of kStageColumns
// columns, counted through all tiles, are dealt out in equal runs, one a block (stream-K: Osama et al. 2023). Where a
// block has only some stages of a tile, each warp stores float32 partial sums, and that of the tile's last block to
// arrive adds them in the order of the columns. The runs depend on the weight and the grid alone, not on x.
//
// Block: 8 warps that multiply, and on Hopper one or four more, of which one thread starts the copies. Multiplying warp
// i has rows 16 i to 16 i + 15 of the tile of w and all rows of the tile of x. Rows of w are the rows of the tensor
// cores' first operand, rows of x the columns of the second: a thread holds the sums of rows lane / 4 and lane / 4 + 8
// of its warp's, and of rows 8 j + 2 (lane % 4) and the next of x, for each j < kM / 8.
//
// Shared memory: a ring of kStages stages that asynchronous copies fill ahead. Each has a tile of x, in rows of 128
// bytes whose 16-byte words are swizzled over eight rows; the packed integers of w, of which every thread reads its
// own; and the scales and zeros of the tile's rows for each group that the stage meets. On Hopper the copies are those
// of the tensor memory accelerator, and barriers say that a stage is full or empty; elsewhere every thread copies some
// words (before sm_80 without overlap), and the block synchronises once a stage.
//
// grouped_stage.cuh says how a stage is multiplied.
#include <algorithm>

#include "cuda/grouped_stage.cuh"
#include "cuda/hopper.cuh"
#include "cuda/tensor_map.cuh"

namespace vllmlite::cuda {

struct TiledProduct : GroupedProduct {
  CUtensorMap x_map;       // of x, on Hopper
  float* partials;         // [tiles of x][blocks][2][kTileRows][kM]
  std::int32_t* arrivals;  // [tiles of x][tiles][warps], zero before and after
};

// kGroups: that a stage meets. kHopper: the tensor memory accelerator copies, and warpgroups multiply, not warps.
template <int kBits, int kTileOfX, int kGroupsOfStage, int kDepth, bool kOnHopper>
struct GroupedTile {
  static constexpr int kM = kTileOfX, kGroups = kGroupsOfStage, kStages = kDepth;
  static constexpr bool kHopper = kOnHopper;
  static constexpr int kWords = kBits / 2;  // of 16 bytes that a thread has of a stage
  static constexpr int kMultiplying = kGroupedWarps * 32, kThreads = kMultiplying + (!kHopper   ? 0
                                                                                     : kM <= 16 ? 32
                                                                                                : 128);
  // With few rows of x, there is room for blocks of the next kernel, which fetch weights meanwhile.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  static constexpr int kOfHopper = kM == 16 ? 3 : kM <= 64 ? 2 : 1;
#else
  static constexpr int kOfHopper = 1;
#endif
  static constexpr int kBlocksPerProcessor = kHopper ? kOfHopper : 2;
  // A thread's, where those that copy hand theirs to those that multiply.
  static constexpr int kCopyingRegisters = 24, kMultiplyingRegisters = kM <= 16 ? 0 : kM <= 64 ? 104 : 240;

  struct Shared {
    StageOfX<kM> x[kStages];
    uint4 weight[kStages][kGroupedWarps][kWords][32];
    std::uint32_t scales[kStages][kGroups][kTileRows];
    std::uint64_t full[kStages], empty[kStages];
  };
};

// Adds one, after all that the warp has written before is there for others; what they wrote before is there after it.
__device__ __forceinline__ int arrive_at(std::int32_t* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Stages of tiles are numbered through the whole weight and dealt out in runs, to the first blocks one more each.
struct GroupedRuns {
  int each, longer;  // stages of a run, and runs that have one more

  __device__ __forceinline__ GroupedRuns(int stages, int blocks) : each(stages / blocks), longer(stages % blocks) {}
  __device__ __forceinline__ int first_stage(int block) const { return block * each + min(block, longer); }
  __device__ __forceinline__ int block_of(int stage) const {
    const int of_longer = longer * (each + 1);
    return stage < of_longer ? stage / (each + 1) : longer + (stage - of_longer) / each;
  }
};

// A stage of a tile, and the place in the ring where it is.
template <int kStages>
struct GroupedStage {
  int number, tile, of_tile, slot = 0, parity = 0;

  __device__ __forceinline__ GroupedStage(int first, int stages)
      : number(first), tile(first / stages), of_tile(first % stages) {}

  __device__ __forceinline__ void advance(int stages) {
    ++number;
    if (++of_tile == stages) {
      of_tile = 0;
      ++tile;
    }
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <typename T, int kBits, typename S>
struct GroupedBlock {
  using Stage = GroupedStage<S::kStages>;
  static constexpr int kM = S::kM, kSums = kM / 2, kSteps = kStageColumns / 16 / S::kGroups;

  const TiledProduct& given;
  typename S::Shared& shared;
  int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int own = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  int m0 = static_cast<int>(blockIdx.y) * kM, rows = min(given.m - m0, kM);
  GroupedRuns runs{given.tiles * given.stages, blocks};
  int begin = runs.first_stage(own), end = runs.first_stage(own + 1);

  __device__ __forceinline__ GroupedBlock(const TiledProduct& product, typename S::Shared& memory)
      : given(product), shared(memory) {}

  // ---- Copies

  __device__ __forceinline__ const uint4* weight_of(const Stage& at) const {
    return given.weight + static_cast<std::int64_t>(at.number) * (kGroupedWarps * S::kWords * 32);
  }

  __device__ __forceinline__ const std::uint32_t* scales_of(const Stage& at) const {
    const int group = S::kGroups > 1 ? at.of_tile * S::kGroups : at.of_tile / given.stages_of_group;
    return given.scales + (static_cast<std::int64_t>(at.tile) * given.groups + group) * kTileRows;
  }

  __device__ __forceinline__ void copy_weight(const Stage& at) const {
    const uint4* from = weight_of(at) + warp * S::kWords * 32 + lane;
#pragma unroll
    for (int i = 0; i < S::kWords; ++i) copy_async(&shared.weight[at.slot][warp][i][lane], from + i * 32, true);
    constexpr int kCopies = S::kGroups * kTileRows / 4;
    static_assert(kCopies <= S::kMultiplying);
    if (thread < kCopies) copy_async(&shared.scales[at.slot][0][thread * 4], scales_of(at) + thread * 4, true);
  }

  __device__ __forceinline__ void copy_x(const Stage& at) const {
    constexpr int kChunks = kStageColumns / 8;
#pragma unroll
    for (int i = 0; i < (kM * kChunks + S::kMultiplying - 1) / S::kMultiplying; ++i) {
      const int row = (thread + i * S::kMultiplying) / kChunks, chunk = thread % kChunks,
                column = at.of_tile * kStageColumns + chunk * 8;
      if (kM * kChunks % S::kMultiplying != 0 && row >= kM) break;
      const bool there = row < rows && column < given.k;
      const T* from =
          static_cast<const T*>(given.x) + (there ? static_cast<std::int64_t>(m0 + row) * given.k + column : 0);
      copy_async(&word_of_stage(shared.x[at.slot], row, chunk), from, there);
    }
  }

  // ---- Products

  // Adds those of a stage.
  __device__ __forceinline__ void multiply(int slot, float (&sums)[kSums]) const {
    multiply_stage<T, kBits, S::kGroups>(
        shared.weight[slot][warp], &shared.scales[slot][0][warp * 16], kTileRows, sums,
        [&](int first_step, const auto& words, const auto& integers, float (&products)[kSums]) {
          if constexpr (S::kHopper)
            multiply_on_hopper(slot, first_step, words, integers, products);
          else
            multiply_steps<T, kBits, kSteps, kM>(shared.x[slot], first_step, words, integers, products);
        });
  }

  // Adds the products of the columns of a group, with the weights as integers.
  __device__ __forceinline__ void multiply_on_hopper(int slot, int first_step,
                                                     const std::uint32_t (&words)[S::kWords * 4],
                                                     const Integers<T, kBits>& integers,
                                                     float (&products)[kSums]) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int kInFlight = 3;  // number of fragments that are in registers at a time
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = first_step + i;
      std::uint32_t a[4];
      if (i >= kInFlight) wait_for_products<kInFlight - 1>();
      integers.fragment(words, step, a);
      begin_products();
      multiply_fragment<T>(products, a, operand(&shared.x[slot][step / 4][0][step % 4 * 2], 1024, 0), i == 0);
      commit_products();
    }
    wait_for_products<0>();
    hold(products);
#endif
  }

  // ---- Results

  static __device__ __forceinline__ bool aligned_pair(const T* at) {
    return reinterpret_cast<std::uintptr_t>(at) % 4 == 0;
  }

  __device__ __forceinline__ void write(const float (&sums)[kSums], int tile) const {
    const int n0 = tile * kTileRows + warp * 16;
    const T* bias = static_cast<const T*>(given.bias);
    float added[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = n0 + half * 8 + lane / 4;
      added[half] = bias != nullptr && row < given.n ? to_float(bias[row]) : 0;
    }
#pragma unroll
    for (int j = 0; j < kM / 8; ++j) {
      if (j * 8 >= rows) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Transposed, a thread has a row of x and two neighbouring rows of w.
        union {
          std::uint32_t bits;
          T values[2];
        } two{transposed(pair<T>(sums[j * 4 + half * 2] + added[half], sums[j * 4 + half * 2 + 1] + added[half]))};
        const int m = j * 8 + lane / 4, n = n0 + half * 8 + lane % 4 * 2;
        if (m >= rows || n >= given.n) continue;
        T* to = static_cast<T*>(given.y) + static_cast<std::int64_t>(m0 + m) * given.stride + n;
        if (n + 1 < given.n && aligned_pair(to)) {
          *reinterpret_cast<std::uint32_t*>(to) = two.bits;
        } else {
          to[0] = two.values[0];
          if (n + 1 < given.n) to[1] = two.values[1];
        }
      }
    }
  }

  // Address of a block's partial sums of a tile. A block has partial sums of at most two tiles: the one that it begins
  // with, and the one that it ends in.
  __device__ __forceinline__ float4* partials(int block, int tile) const {
    const int place = runs.first_stage(block) >= tile * given.stages ? 0 : 1;
    const std::int64_t slot = (static_cast<std::int64_t>(blockIdx.y) * blocks + block) * 2 + place;
    return reinterpret_cast<float4*>(given.partials) + slot * (kSums / 4 * S::kMultiplying) + thread;
  }

  // A warp's sums of a tile of which this block has some stages only; true in the last block, with the total in `sums`.
  __device__ __forceinline__ bool combine(float (&sums)[kSums], int tile) const {
    const int first = tile * given.stages, from = runs.block_of(first), to = runs.block_of(first + given.stages - 1);
    float4* ours = partials(own, tile);
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i)
      __stcg(ours + i * S::kMultiplying, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
    __syncwarp();
    int before = 0;
    if (lane == 0) {
      std::int32_t* arrivals =
          given.arrivals + (blockIdx.y * static_cast<unsigned>(given.tiles) + tile) * kGroupedWarps + warp;
      before = arrive_at(arrivals);
      if (before == to - from) *arrivals = 0;
    }
    if (__shfl_sync(kAll, before, 0) != to - from) return false;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0;
#pragma unroll 4
    for (int block = from; block <= to; ++block) {
      const float4* theirs = partials(block, tile);
#pragma unroll
      for (int i = 0; i < kSums / 4; ++i) {
        const float4 four = __ldcg(theirs + i * S::kMultiplying);
        sums[4 * i] += four.x;
        sums[4 * i + 1] += four.y;
        sums[4 * i + 2] += four.z;
        sums[4 * i + 3] += four.w;
      }
    }
    return true;
  }

  // After the products of a stage: results, where it is the last of its tile or of the block's.
  __device__ __forceinline__ void finish_stage(const Stage& at, float (&sums)[kSums]) const {
    const bool ends = at.of_tile == given.stages - 1;
    if (!ends && at.number + 1 < end) return;
    const bool whole = ends && begin <= at.number - at.of_tile;
    if (whole || combine(sums, at.tile)) write(sums, at.tile);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0;
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <typename B, typename S>
__device__ __forceinline__ void copy_on_hopper(const B& block, const TiledProduct& given, typename S::Shared& shared) {
  using Stage = GroupedStage<S::kStages>;
  constexpr int kOfWeight = sizeof(shared.weight[0]), kOfScales = sizeof(shared.scales[0]), kOfX = sizeof(shared.x[0]);
  const auto copy_weight = [&](const Stage& at) {
    arrive_expecting(shared.full[at.slot], kOfWeight + kOfScales + kOfX);
    copy_bytes(&shared.weight[at.slot], block.weight_of(at), kOfWeight, shared.full[at.slot]);
    copy_bytes(&shared.scales[at.slot], block.scales_of(at), kOfScales, shared.full[at.slot]);
  };
  const auto copy_x = [&](const Stage& at) {
#pragma unroll
    for (int part = 0; part < kStageColumns / 64; ++part)
      copy_box(&shared.x[at.slot][part], given.x_map, shared.full[at.slot], at.of_tile * kStageColumns + part * 64,
               block.m0);
  };
  prefetch_map(given.x_map);
  Stage at(block.begin, given.stages), of_x = at;
  for (; at.number < min(block.begin + S::kStages, block.end); at.advance(given.stages)) copy_weight(at);
  wait_for_previous();
  for (; of_x.number < at.number; of_x.advance(given.stages)) copy_x(of_x);
  for (; at.number != block.end; at.advance(given.stages)) {
    wait(shared.empty[at.slot], at.parity ^ 1);
    copy_weight(at);
    copy_x(at);
  }
}

#endif

template <typename T, int kBits, typename S>
static __global__ __launch_bounds__(S::kThreads, S::kBlocksPerProcessor) void grouped_kernel(
    const __grid_constant__ TiledProduct given) {
  extern __shared__ __align__(1024) char storage[];
  auto& shared = *reinterpret_cast<typename S::Shared*>(storage);
  const GroupedBlock<T, kBits, S> block(given, shared);
  using Stage = GroupedStage<S::kStages>;
  float sums[S::kM / 2] = {};
  Stage at(block.begin, given.stages);
  if constexpr (S::kHopper) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    let_next_begin();
    init_ring(shared.full, shared.empty, kGroupedWarps);
    if (threadIdx.x >= S::kMultiplying) {
      if constexpr (S::kMultiplyingRegisters != 0) give_registers_up<S::kCopyingRegisters>();
      if (threadIdx.x == S::kMultiplying) copy_on_hopper<GroupedBlock<T, kBits, S>, S>(block, given, shared);
      return;
    }
    if constexpr (S::kMultiplyingRegisters != 0) take_registers<S::kMultiplyingRegisters>();
    wait_for_previous();
    for (; at.number != block.end; at.advance(given.stages)) {
      wait(shared.full[at.slot], at.parity);
      block.multiply(at.slot, sums);
      if (block.lane == 0) arrive(shared.empty[at.slot]);
      block.finish_stage(at, sums);
    }
#else
    __trap();  // such kernels are launched where they were built for the chip
#endif
  } else {
    Stage next = at, of_x = at;
    for (int i = 0; i < S::kStages - 1; ++i, next.advance(given.stages))
      if (next.number < block.end) block.copy_weight(next);
    let_next_begin();
    wait_for_previous();
    for (int i = 0; i < S::kStages - 1; ++i, of_x.advance(given.stages)) {
      if (of_x.number < block.end) block.copy_x(of_x);
      commit_copies();  // with the first, all of the weight's
    }
    for (; at.number != block.end; at.advance(given.stages)) {
      wait_for_copies<S::kStages - 2>();
      __syncthreads();
      if (next.number < block.end) {
        block.copy_weight(next);
        block.copy_x(next);
      }
      next.advance(given.stages);
      commit_copies();
      block.multiply(at.slot, sums);
      block.finish_stage(at, sums);
    }
  }
}

template <typename T, int kBits, typename S>
static void run(Runtime& runtime, const GroupedProduct& whole, int blocks_of_processor) {
  TiledProduct product{whole, {}, nullptr, nullptr};
  constexpr int kMostTiles = 4;  // of x in a launch, for the sake of the memory that partial sums take
  const unsigned blocks =
      static_cast<unsigned>(std::min(product.tiles * product.stages, runtime.multiprocessors() * blocks_of_processor));
  const int tiles_of_x = std::min((product.m + S::kM - 1) / S::kM, kMostTiles);
  const Tensor partials = runtime.make({tiles_of_x, blocks, 2, kTileRows, S::kM}, DType::float32);
  product.partials = static_cast<float*>(partials.data);
  product.arrivals = runtime.counters(static_cast<std::size_t>(tiles_of_x) * product.tiles * kGroupedWarps);
  const int m = product.m;
  for (int first = 0; first < m; first += kMostTiles * S::kM) {
    product.m = std::min(m - first, kMostTiles * S::kM);
    if constexpr (S::kHopper)
      product.x_map = tensor_map(product.x, runtime.dtype(), {{product.k, 1, 64}, {product.m, product.k, S::kM}});
    launch(runtime, grouped_kernel<T, kBits, S>, dim3(blocks, blocks_for(product.m, S::kM)), S::kThreads,
           sizeof(typename S::Shared), product);
    product.x = static_cast<const T*>(product.x) + static_cast<std::int64_t>(product.m) * product.k;
    product.y = static_cast<T*>(product.y) + static_cast<std::int64_t>(product.m) * product.stride;
  }
}

// The smallest tile that takes all rows of x, or the largest that there is room for. Those of 8 rows add in an order of
// their own.
template <typename T, int kBits, int kGroups>
static void run_sized(Runtime& runtime, const GroupedProduct& product) {
  const bool invariant = runtime.batch_invariant();
  const int m = product.m;
  if (on_hopper(runtime)) {
    if (m <= 16)
      run<T, kBits, GroupedTile<kBits, 16, kGroups, 4, true>>(runtime, product, 1);
    else if (m <= 32)
      run<T, kBits, GroupedTile<kBits, 32, kGroups, 4, true>>(runtime, product, invariant ? 1 : 2);
    else if (m <= 64)
      run<T, kBits, GroupedTile<kBits, 64, kGroups, 3, true>>(runtime, product, invariant ? 1 : 2);
    else
      run<T, kBits, GroupedTile<kBits, 128, kGroups, 4, true>>(runtime, product, 1);
    return;
  }
  using Tile8 = GroupedTile<kBits, 8, kGroups, kBits == 4 ? 4 : 3, false>;
  using Tile16 = GroupedTile<kBits, 16, kGroups, kBits == 4 ? 4 : 3, false>;
  using Tile32 = GroupedTile<kBits, 32, kGroups, kBits == 4 ? 4 : 3, false>;
  using Tile64 = GroupedTile<kBits, 64, kGroups, kBits == 4 ? 3 : 2, false>;
  const auto fits = [&](std::size_t bytes) { return bytes <= static_cast<std::size_t>(runtime.shared_memory()); };
  if (m > 32 && fits(sizeof(typename Tile64::Shared)))
    run<T, kBits, Tile64>(runtime, product, 1);
  else if (m > 16 && fits(sizeof(typename Tile32::Shared)))
    run<T, kBits, Tile32>(runtime, product, 1);
  else if ((m > 8 || invariant) && fits(sizeof(typename Tile16::Shared)))
    run<T, kBits, Tile16>(runtime, product, 1);
  else
    run<T, kBits, Tile8>(runtime, product, 1);
}

void multiply_in_tiles(Runtime& runtime, const GroupedProduct& product) {
  with_groups(product, [&](auto bits, auto groups) {
    constexpr int kBits = decltype(bits)::value, kGroups = decltype(groups)::value;
    runtime.dtype() == DType::float16 ? run_sized<f16, kBits, kGroups>(runtime, product)
                                      : run_sized<bf16, kBits, kGroups>(runtime, product);
  });
}

}  // namespace vllmlite::cuda
