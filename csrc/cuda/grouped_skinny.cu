// Products of at most 8 rows of x with a weight in groups of integers (layout: grouped.hpp). Such products decode a few
// requests; they take the time of reading the weight, and of the instructions that unpack it.
//
// Grid: at most one block a multiprocessor, each of which takes every gridDim-th tile of kBands bands of 16 rows of w.
// Block: 8 warps, which divide the columns of a tile: of every 8 kWide stages of kStageColumns columns, warp i has the
// i-th kWide. Shared memory: each warp has a ring of kSlots slots, which asynchronous copies fill ahead, across tiles.
// The first copies of w start before the previous kernel has ended. A slot has kWide stages of w (Slot) and the columns
// of x that they multiply, in rows whose 16-byte words are swizzled over eight rows. Beside the rings are two buffers
// for the warps' sums of a tile, which the block adds in the order of the warps. Rows of w are the rows of the tensor
// cores' first operand, rows of x the columns of the second: of each band, a thread holds the sums of rows lane / 4 and
// lane / 4 + 8 of w, and of rows 2 (lane % 4) and the next of x.
//
// Integers minus their zero are exact in 16 bits. They are multiplied as they are, and the sum of a group is multiplied
// by the group's scale in float32.
#include <algorithm>

#include "cuda/grouped_integers.cuh"

namespace vllmlite::cuda {

constexpr int kWarps = 8, kMostRows = 8;

// kGroupsOfStage: groups that a stage meets. kStagesOfSlot: stages that a warp multiplies at a time.
template <int kBits, int kGroupsOfStage, int kBandsOfTile, int kStagesOfSlot, int kDepth>
struct SkinnyTile {
  static constexpr int kGroups = kGroupsOfStage, kBands = kBandsOfTile, kWide = kStagesOfSlot, kSlots = kDepth;
  static constexpr int kRows = kBands * 16;
  static constexpr int kWords = kBits / 2;                     // of 16 bytes that a lane has of a band and stage
  static constexpr int kRowBytes = kWide * kStageColumns * 2;  // of a row of x in a slot

  struct Slot {
    uint4 weight[kWide][kBands][kWords][32];
    std::uint32_t scales[kWide][kGroups][kBands][16];
  };
  struct Sums {
    alignas(128) float at[2][kWarps][kMostRows][kRows + 1];
  };
};

// The copies of one warp, in order: its stages of a tile, then those of the block's next tile.
template <typename T, typename S>
struct SkinnyCopies {
  static constexpr int kScaleWords = S::kBands * 4;  // of 16 bytes, of a group
  static constexpr int kScaleLanes = S::kGroups * kScaleWords;
  static constexpr int kChunks = S::kWide * kStageColumns / 8, kRowsAtOnce = 32 / kChunks;
  static constexpr std::int64_t kStage = S::kWords * 32 * kGroupedWarps;
  static_assert(S::kWide * kScaleLanes <= 32 && kRowsAtOnce >= 1);

  const GroupedProduct& given;
  int lane = static_cast<int>(threadIdx.x % 32), first = static_cast<int>(threadIdx.x / 32) * S::kWide;
  int tiles, tile = static_cast<int>(blockIdx.x), stage = first;
  const uint4* weight = nullptr;
  const std::uint32_t* scales = nullptr;
  const T* x = nullptr;

  __device__ __forceinline__ SkinnyCopies(const GroupedProduct& product, int number_of_tiles)
      : given(product), tiles(first < product.stages ? number_of_tiles : 0) {
    find();
  }

  // The addresses of a tile's first stages.
  __device__ __forceinline__ void find() {
    const int band = tile * S::kBands;
    weight = given.weight + (static_cast<std::int64_t>(band / kGroupedWarps) * given.stages + stage) * kStage +
             band % kGroupedWarps * (S::kWords * 32) + lane;
    find_scales();
    x = static_cast<const T*>(given.x) + static_cast<std::int64_t>(lane / kChunks) * given.k + stage * kStageColumns +
        lane % kChunks * 8;
  }

  __device__ __forceinline__ void find_scales() {
    const int band = tile * S::kBands, own = min(stage + lane / kScaleLanes, given.stages - 1);
    int group = own * S::kGroups;
    if (S::kGroups == 1 && given.stages_of_group != 1) group = own / given.stages_of_group;
    scales =
        given.scales +
        (static_cast<std::int64_t>(band / kGroupedWarps) * given.groups + group + lane % kScaleLanes / kScaleWords) *
            kTileRows +
        band % kGroupedWarps * 16 + lane % kScaleWords * 4;
  }

  __device__ __forceinline__ void copy_weight(char* to) const {
    if (tile >= tiles) return;
    auto& slot = *reinterpret_cast<typename S::Slot*>(to);
#pragma unroll
    for (int wide = 0; wide < S::kWide; ++wide) {
      // Beyond the last stage, the slot repeats it; the columns of x that multiply it are zero.
      const uint4* from = wide == 0 || stage + wide < given.stages ? weight + wide * kStage : weight;
#pragma unroll
      for (int i = 0; i < S::kBands * S::kWords; ++i)
        copy_async(&slot.weight[wide][0][0][0] + i * 32 + lane, from + i * 32, true);
    }
    if (lane < S::kWide * kScaleLanes) copy_async(&slot.scales[0][0][0][0] + lane * 4, scales, true);
  }

  __device__ __forceinline__ void copy_x(char* to) const {
    if (tile >= tiles) return;
    const int of_lane = lane / kChunks, chunk = lane % kChunks;
    const bool there = stage * kStageColumns + chunk * 8 < given.k;
    char* rows = to + sizeof(typename S::Slot) + of_lane * S::kRowBytes;
#pragma unroll
    for (int row = 0; row < kMostRows; row += kRowsAtOnce) {
      if (row >= given.m) break;
      if (kRowsAtOnce == 1 || row + of_lane < given.m)
        copy_async_through_cache(rows + row * S::kRowBytes + ((chunk ^ of_lane) * 16 ^ row * 16),
                                 there ? x + static_cast<std::int64_t>(row) * given.k : given.x, there);
    }
  }

  __device__ __forceinline__ void advance() {
    stage += kWarps * S::kWide;
    if (stage < given.stages) {
      weight += kWarps * S::kWide * kStage;
      x += kWarps * S::kWide * kStageColumns;
      if ((S::kGroups > 1 || given.stages_of_group == 1) && stage + S::kWide <= given.stages)
        scales += kWarps * S::kWide * S::kGroups * kTileRows;
      else
        find_scales();
    } else {
      stage = first;
      tile += static_cast<int>(gridDim.x);
      find();
    }
  }
};

template <typename T, int kBits, typename S>
static __global__ __launch_bounds__(kWarps *
                                    32) void grouped_skinny_kernel(const __grid_constant__ GroupedProduct given) {
#if __CUDA_ARCH__ >= 800
  using Slot = typename S::Slot;
  constexpr int kSteps = kStageColumns / 16 / S::kGroups;  // of a group in a stage
  extern __shared__ __align__(1024) char storage[];
  auto& partials = *reinterpret_cast<typename S::Sums*>(storage);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int slot_bytes = static_cast<int>(sizeof(Slot)) + given.m * S::kRowBytes;
  char* const ring = storage + sizeof(partials) + warp * S::kSlots * slot_bytes;
  const int tiles = (given.n + S::kRows - 1) / S::kRows;

  SkinnyCopies<T, S> next(given, tiles), of_x = next;
#pragma unroll
  for (int i = 0; i < S::kSlots - 1; ++i, next.advance()) next.copy_weight(ring + i * slot_bytes);
  let_next_begin();
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < S::kSlots - 1; ++i, of_x.advance()) {
    of_x.copy_x(ring + i * slot_bytes);
    commit_copies();  // with the first, all of the weight's
  }

  // Rows beyond the last of x repeat it; their products are not written.
  const int row_of_x = min(lane % 8, given.m - 1);
  int x_at[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    x_at[i] = static_cast<int>(sizeof(Slot)) + row_of_x * S::kRowBytes + ((i * 4 + lane / 8) ^ row_of_x) * 16;
  const int last = (S::kSlots - 1) * slot_bytes;
  int at = 0, buffer = 0;  // bytes into the ring
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x), buffer ^= 1) {
    float sums[S::kBands][4] = {};
    for (int stage = next.first; stage < given.stages; stage += kWarps * S::kWide) {
      char* const free = ring + (at == 0 ? last : at - slot_bytes);
      next.copy_weight(free);
      next.copy_x(free);
      commit_copies();
      next.advance();
      wait_for_copies<S::kSlots - 1>();
      __syncwarp();
      const char* const current = ring + at;
      const auto& slot = *reinterpret_cast<const Slot*>(current);
#pragma unroll
      for (int wide = 0; wide < S::kWide; ++wide) {
        std::uint32_t words[S::kBands][S::kWords * 4];
#pragma unroll
        for (int band = 0; band < S::kBands; ++band)
#pragma unroll
          for (int j = 0; j < S::kWords; ++j) {
            const uint4 four = slot.weight[wide][band][j][lane];
            words[band][4 * j] = four.x;
            words[band][4 * j + 1] = four.y;
            words[band][4 * j + 2] = four.z;
            words[band][4 * j + 3] = four.w;
          }
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group) {
          // Alternate sums: products that follow each other do not depend on each other.
          float products[2][S::kBands][4] = {};
          uint2 scales[S::kBands];
#pragma unroll
          for (int band = 0; band < S::kBands; ++band)
            scales[band] = *reinterpret_cast<const uint2*>(&slot.scales[wide][group][band][lane / 4 * 2]);
#pragma unroll
          for (int step = group * kSteps; step < (group + 1) * kSteps; step += 2) {
            std::uint32_t b[4];
            load_matrices(b, current + x_at[step / 2 % 2] + wide * kStageColumns * 2 + step / 4 * 128);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
              for (int band = 0; band < S::kBands; ++band) {
                const Integers<T, kBits> integers(scales[band].x & 0xffU, scales[band].y & 0xffU);
                std::uint32_t a[4];
                integers.fragment(words[band], step + half, a);
                multiply<T>(products[half][band], a, b[half * 2], b[half * 2 + 1]);
              }
          }
#pragma unroll
          for (int band = 0; band < S::kBands; ++band)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float scale = float_of_bits((j < 2 ? scales[band].x : scales[band].y) & 0xffffff00U);
              sums[band][j] = fmaf(scale, products[0][band][j] + products[1][band][j], sums[band][j]);
            }
        }
      }
      __syncwarp();
      at = at == last ? 0 : at + slot_bytes;
    }
    auto& of_tile = partials.at[buffer];
#pragma unroll
    for (int band = 0; band < S::kBands; ++band)
#pragma unroll
      for (int i = 0; i < 4; ++i) of_tile[warp][lane % 4 * 2 + i % 2][band * 16 + lane / 4 + i / 2 * 8] = sums[band][i];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < given.m * S::kRows; i += kWarps * 32) {
      const int row = i / S::kRows, place = i % S::kRows, out = tile * S::kRows + place;
      if (out >= given.n) continue;
      float sum = given.bias == nullptr ? 0 : to_float(static_cast<const T*>(given.bias)[out]);
#pragma unroll
      for (int part = 0; part < kWarps; ++part) sum += of_tile[part][row][place];
      static_cast<T*>(given.y)[static_cast<std::int64_t>(row) * given.stride + out] = from_float<T>(sum);
    }
  }
#endif
}

// Returns false, and multiplies nothing, if a block has less shared memory than these tiles need.
template <typename T, int kBits, typename S>
static bool run(const Runtime& runtime, const GroupedProduct& product) {
  const std::size_t slot = sizeof(typename S::Slot) + static_cast<std::size_t>(product.m) * S::kRowBytes;
  const std::size_t shared = sizeof(typename S::Sums) + kWarps * S::kSlots * slot;
  if (shared > static_cast<std::size_t>(runtime.shared_memory())) return false;
  const unsigned blocks = std::min(blocks_for(product.n, S::kRows), static_cast<unsigned>(runtime.multiprocessors()));
  launch(runtime, grouped_skinny_kernel<T, kBits, S>, blocks, kWarps * 32, shared, product);
  return true;
}

// With more rows of x, two slots are faster than three: they leave shared memory to a block of the next product, whose
// copies then start early, and to the first-level cache, which keeps x.
template <typename T>
static void run_sized(const Runtime& runtime, const GroupedProduct& product) {
  constexpr int kDeepRows = 3;
  with_groups(product, [&](auto bits, auto groups) {
    constexpr int kBits = decltype(bits)::value, kGroups = decltype(groups)::value, kWide = kGroups == 4 ? 1 : 2;
    (product.m <= kDeepRows && run<T, kBits, SkinnyTile<kBits, kGroups, 2, kWide, 3>>(runtime, product)) ||
        run<T, kBits, SkinnyTile<kBits, kGroups, 2, kWide, 2>>(runtime, product) ||
        run<T, kBits, SkinnyTile<kBits, kGroups, 1, 1, 2>>(runtime, product);
  });
}

void multiply_grouped_skinny(const Runtime& runtime, const GroupedProduct& product) {
  runtime.dtype() == DType::float16 ? run_sized<f16>(runtime, product) : run_sized<bf16>(runtime, product);
}

}  // namespace vllmlite::cuda
