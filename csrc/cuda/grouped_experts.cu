// The products of a mixture's experts whose weights are in groups of integers (layout: grouped.hpp).
//
// Grid: (groups of pairs, tiles of w). A tile has 16 kBands rows of w; a group has at most kM pairs. Block: 8 warps, of
// which warp i has band i % kBands of the tile and every kParts-th stage of kStageColumns columns, from stage i /
// kBands on (8 = kBands kParts). Shared memory: a ring of kDepth slots that asynchronous copies fill ahead, each with
// kParts stages of w, of its scales and of x; the block synchronises once a slot. At the end the ring's memory holds
// the sums of the kParts parts, which are added in the order of the warps. grouped_stage.cuh says how a stage is
// multiplied.
#include "cuda/experts.cuh"
#include "cuda/grouped_stage.cuh"

namespace vllmlite::cuda {

// kGroups: groups that a stage meets.
template <int kBits, int kGroupsOfStage, int kRowsOfX, int kBandsOfTile>
struct ExpertTile {
  static constexpr int kM = kRowsOfX, kGroups = kGroupsOfStage, kBands = kBandsOfTile, kParts = kGroupedWarps / kBands;
  static constexpr int kRows = 16 * kBands, kDepth = kBits == 4 ? 3 : 2;
  static constexpr int kWords = kBits / 2;  // of 16 bytes that a lane has of a stage
  static constexpr int kThreads = kGroupedWarps * 32, kBlocksPerProcessor = kM == 8 ? 3 : 2;

  struct Slot {
    StageOfX<kM> x[kParts];
    uint4 weight[kGroupedWarps][kWords][32];
    std::uint32_t scales[kGroupedWarps][kGroups][16];
  };
  union Shared {
    Slot slots[kDepth];
    float sums[kParts][kM][kRows + 2];  // of which pairs are read
  };
};

// Few pairs, whose time is that of reading the weight, and more; the latter two add up in one order.
template <int kBits, int kGroups>
using FewPairs = ExpertTile<kBits, kGroups, 8, 2>;
template <int kBits, int kGroups>
using SomePairs = ExpertTile<kBits, kGroups, 16, 8>;
template <int kBits, int kGroups>
using ManyPairs = ExpertTile<kBits, kGroups, 64, 8>;

// Eight of a row's numbers, from the columns that `order` lists.
template <typename T>
__device__ __forceinline__ uint4 gathered(const T* row, const std::int32_t* order) {
  union {
    T numbers[8];
    uint4 word;
  } made;
#pragma unroll
  for (int i = 0; i < 8; ++i) made.numbers[i] = row[order[i]];
  return made.word;
}

template <typename T, int kBits, typename S>
static __global__ __launch_bounds__(S::kThreads, S::kBlocksPerProcessor) void grouped_experts_kernel(
    const __grid_constant__ ExpertProduct given, int stages, int groups, int stages_of_group) {
  extern __shared__ __align__(1024) char storage[];
  auto& shared = *reinterpret_cast<typename S::Shared*>(storage);
  let_next_begin();
  wait_for_previous();
  const Group group = given.mixture.groups[blockIdx.x];
  if (group.expert < 0) return;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int tile = static_cast<int>(blockIdx.y), band = tile * S::kBands + warp % S::kBands;
  const int part = warp / S::kBands;
  const std::int64_t tile_of_layout = band / kGroupedWarps;
  const int of_layout = band % kGroupedWarps;
  const auto* weight = static_cast<const uint4*>(given.w[group.expert]) +
                       (tile_of_layout * stages * kGroupedWarps + of_layout) * (S::kWords * 32);
  const auto* scales = static_cast<const std::uint32_t*>(given.w_scales[group.expert]) +
                       tile_of_layout * groups * kTileRows + of_layout * 16;
  const auto* order = static_cast<const std::int32_t*>(given.w_orders[group.expert]);
  const T* x = static_cast<const T*>(given.x);

  constexpr int kChunks = S::kParts * kStageColumns / 8, kCopies = kChunks * S::kM / S::kThreads;
  static_assert(kCopies >= 1 && S::kThreads % kChunks == 0);
  int rows[kCopies];  // of x, of which this thread copies words
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int row = (thread + i * S::kThreads) / kChunks;
    rows[i] = row < group.count ? row_of_x(given, group.first + row) : -1;
  }
  const auto copy = [&](typename S::Slot& to, int first_stage) {
    if (const int stage = first_stage + part; stage < stages) {
      const uint4* from = weight + static_cast<std::int64_t>(stage) * (kGroupedWarps * S::kWords * 32) + lane;
#pragma unroll
      for (int i = 0; i < S::kWords; ++i) copy_async(&to.weight[warp][i][lane], from + i * 32, true);
      const int first_group = S::kGroups > 1 ? stage * S::kGroups : stage / stages_of_group;
      if (lane < S::kGroups * 4)
        copy_async(&to.scales[warp][lane / 4][lane % 4 * 4],
                   scales + static_cast<std::int64_t>(first_group + lane / 4) * kTileRows + lane % 4 * 4, true);
    }
    const int chunk = thread % kChunks, column = first_stage * kStageColumns + chunk * 8;
    const bool there = column < given.k;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (rows[i] < 0) continue;
      const T* from = x + static_cast<std::int64_t>(rows[i]) * given.k;
      uint4& word = word_of_stage<S::kM>(to.x[chunk / 16], (thread + i * S::kThreads) / kChunks, chunk % 16);
      if (order == nullptr || !there)
        copy_async(&word, there ? from + column : x, there);
      else
        word = gathered(from, order + column);
    }
  };
#pragma unroll
  for (int i = 0; i < S::kDepth - 1; ++i) {
    copy(shared.slots[i], i * S::kParts);
    commit_copies();
  }
  float sums[S::kM / 2] = {};
  int slot = 0;
  for (int first = 0; first < stages; first += S::kParts, slot = slot + 1 == S::kDepth ? 0 : slot + 1) {
    wait_for_copies<S::kDepth - 2>();
    __syncthreads();
    copy(shared.slots[slot == 0 ? S::kDepth - 1 : slot - 1], first + (S::kDepth - 1) * S::kParts);
    commit_copies();
    if (first + part >= stages) continue;
    const auto& own = shared.slots[slot];
    multiply_stage<T, kBits, S::kGroups>(
        own.weight[warp], own.scales[warp][0], 16, sums,
        [&](int first_step, const auto& words, const auto& integers, float (&products)[S::kM / 2]) {
          multiply_steps<T, kBits, kStageColumns / 16 / S::kGroups, S::kM>(own.x[part], first_step, words, integers,
                                                                           products);
        });
  }
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < S::kM / 2; ++i)
    shared.sums[part][i / 4 * 8 + lane % 4 * 2 + i % 2][warp % S::kBands * 16 + lane / 4 + i / 2 % 2 * 8] = sums[i];
  __syncthreads();
  constexpr int kPairs = S::kRows / 2;
  for (int i = thread; i < group.count * kPairs; i += S::kThreads) {
    const int row = i / kPairs, place = i % kPairs * 2, column = tile * S::kRows + place;
    if (column >= given.n) continue;
    float2 total{};
#pragma unroll
    for (int j = 0; j < S::kParts; ++j) {
      const float2 two = *reinterpret_cast<const float2*>(&shared.sums[j][row][place]);
      total.x += two.x;
      total.y += two.y;
    }
    T* y = static_cast<T*>(given.y) + static_cast<std::int64_t>(row_of_y(given, group.first + row)) * given.n;
    *reinterpret_cast<std::uint32_t*>(y + column) = pair<T>(total.x, total.y);
  }
}

template <typename T, int kBits, typename S>
static void run(const Runtime& runtime, const ExpertProduct& product, const GroupedForm& form) {
  launch(runtime, grouped_experts_kernel<T, kBits, S>,
         dim3(static_cast<unsigned>(product.mixture.num_groups), blocks_for(product.n, S::kRows)), S::kThreads,
         sizeof(typename S::Shared), product, form.stages(), form.groups(), form.stages_of_group);
}

int pairs_of_group(const Runtime& runtime, std::int64_t pairs_of_expert) {
  constexpr int kFew = 4, kSome = 16;  // pairs of an expert up to which tiles of few and of some pairs are faster
  if (pairs_of_expert <= kFew && !runtime.batch_invariant()) return FewPairs<4, 1>::kM;
  const bool fits = sizeof(ManyPairs<8, 4>::Shared) <= static_cast<std::size_t>(runtime.shared_memory());
  return pairs_of_expert <= kSome || !fits ? SomePairs<4, 1>::kM : ManyPairs<4, 1>::kM;
}

void multiply_grouped_experts(const Runtime& runtime, const ExpertProduct& product, const GroupedForm& form) {
  with_groups(form, [&](auto bits, auto groups) {
    constexpr int kBits = decltype(bits)::value, kGroups = decltype(groups)::value;
    const auto go = [&](auto* type) {
      using T = Pointee<decltype(type)>;
      switch (product.mixture.rows_of_group) {
        case FewPairs<kBits, kGroups>::kM:
          return run<T, kBits, FewPairs<kBits, kGroups>>(runtime, product, form);
        case SomePairs<kBits, kGroups>::kM:
          return run<T, kBits, SomePairs<kBits, kGroups>>(runtime, product, form);
        default:
          return run<T, kBits, ManyPairs<kBits, kGroups>>(runtime, product, form);
      }
    };
    runtime.dtype() == DType::float16 ? go(static_cast<f16*>(nullptr)) : go(static_cast<bf16*>(nullptr));
  });
}

}  // namespace vllmlite::cuda
