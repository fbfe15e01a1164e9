// The attention of attention_prefilling.cu on sm_90a, after Shah et al. 2024 (FlashAttention-3).
//
// Grid: x thread blocks, as many as multiprocessors, each of which takes tiles of queries one after another
// (find_work). Block: kGroups + 1 warpgroups. One warp of the first copies queries, and keys and values in boxes of 16
// keys, where the block table says they are. Each other group has 64 queries; while its products of one tile of keys
// run, it computes the weights of the next. Groups issue their products in turn, so that one multiplies while another
// computes weights. Keys: tiles of kKeys keys, which begin at multiples of kKeys. Shared memory: HopperShared; a ring
// of kStages tiles of keys, one of values, and a tile of queries, whose successor is copied as soon as the last product
// with it is done. Products: scores [queries, keys] and sums [queries, elements]; a thread owns rows lane / 4 and lane
// / 4 + 8 of the 16 queries of its warp, columns 2 quad and 2 quad + 1 of each 8 keys or elements.
#include <algorithm>

#include "cuda/attention.cuh"
#include "cuda/hopper.cuh"
#include "cuda/tensor_map.cuh"

namespace vllmlite::cuda {

constexpr int kKeys = 128, kBox = 16, kColumns = 64, kRows = 64, kGroup = 128;

// Shared memory of a block, in rows of 64 columns, as they are swizzled. `keys` and `values` are rings.
template <typename T, int kSize, int kGroups>
struct HopperShared {
  static constexpr int kParts = kSize / kColumns, kStages = kSize == 64 ? 4 : 2, kQueries = kGroups * kRows;
  T q[kParts][kQueries][kColumns];
  T keys[kStages][kParts][kKeys][kColumns];
  T values[kStages][kParts][kKeys][kColumns];
  std::uint64_t q_full, q_empty, keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
};

// A thread's position in a ring of stages, and the parity of the round.
template <int kStages>
struct Place {
  int stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A tile of queries for a head, and the keys it sees.
struct Work {
  int head, count, token, slot, first, from_key, last;
};

// The blocks' `round`th pieces of work lie next to each other, the longest first: in turn forwards and backwards, so
// that no block has the longer of each.
__device__ __forceinline__ bool find_work(const Attention& given, const Tile* tiles, int num_tiles, int round,
                                          Work& work) {
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int index = round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
  if (index >= num_tiles * given.heads) return false;
  const Tile tile = tiles[index / given.heads];
  work.head = index % given.heads;
  work.count = tile.row < 0 ? 0 : tile.count;
  work.token = tile.first;
  if (tile.row < 0) return true;
  work.slot = given.batch.slot_ids[tile.row];
  work.first = given.batch.positions[tile.first];
  work.last = work.first + tile.count - 1;
  work.from_key = work.first >= given.window ? work.first - given.window + 1 : 0;
  return true;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The warp that copies.
template <typename Shared>
__device__ __forceinline__ void copy_all(Shared& shared, const Attention& given, const Tile* tiles, int num_tiles,
                                         const CUtensorMap& q_map, const CUtensorMap& kv_map) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int rows_of_block = 2 * given.kv_heads * given.block_size;
  Place<Shared::kStages> place;
  Work work;
  int q_parity = 0;
  for (int round = 0; find_work(given, tiles, num_tiles, round, work); ++round) {
    if (work.count == 0) continue;
    const std::int32_t* table = given.batch.block_table + static_cast<std::int64_t>(work.slot) * given.batch.max_blocks;
    const int kv_row = work.head / (given.heads / given.kv_heads) * given.block_size;
    // The row of this lane's keys of a tile; -1: none of them is seen.
    const auto find_row = [&](int at) {
      const int key = at + lane * kBox;
      if (lane >= kKeys / kBox || key + kBox <= work.from_key || key > work.last) return -1;
      return table[key / given.block_size] * rows_of_block + kv_row + key % given.block_size;
    };
    const int begin = work.from_key / kKeys * kKeys;
    int row = find_row(begin);
    wait(shared.q_empty, q_parity ^ 1);
    q_parity ^= 1;
    if (lane == 0) {
      arrive_expecting(shared.q_full, sizeof shared.q);
      for (int part = 0; part < Shared::kParts; ++part)
        copy_box(shared.q[part], q_map, shared.q_full, part * kColumns, work.head, work.token);
    }
    for (int at = begin; at <= work.last; at += kKeys, place.advance()) {
      const int next = find_row(at + kKeys);
      const int bytes =
          __popc(__ballot_sync(kAll, row >= 0)) * kBox * static_cast<int>(sizeof shared.keys[0][0][0]) * Shared::kParts;
      const auto copy_boxes = [&](auto& to, std::uint64_t& full, std::uint64_t& empty, int from) {
        wait(empty, place.parity ^ 1);
        if (lane == 0) arrive_expecting(full, bytes);
        __syncwarp();
        if (row >= 0)
          for (int part = 0; part < Shared::kParts; ++part)
            copy_box(to[part][lane * kBox], kv_map, full, part * kColumns, from);
      };
      const int stage = place.stage;
      copy_boxes(shared.keys[stage], shared.keys_full[stage], shared.keys_empty[stage], row);
      copy_boxes(shared.values[stage], shared.values_full[stage], shared.values_empty[stage],
                 row + given.kv_heads * given.block_size);
      row = next;
    }
  }
}

// A group that multiplies.
template <typename T, typename Shared, int kSize, int kGroups>
__device__ __forceinline__ void attend_all(Shared& shared, const Attention& given, const Tile* tiles, int num_tiles,
                                           int group) {
  constexpr int kTurns = 1, kOwn = kTurns + kGroups;  // names of barriers
  const int thread = static_cast<int>(threadIdx.x % kGroup), lane = thread % 32, warp = thread / 32;
  const int quad = lane % 4, own_row = group * kRows + warp * 16 + lane / 4;
  const float scale = given.scale * kLog2E;
  Place<Shared::kStages> keys_at, values_at;
  Work work{};
  int q_parity = 0;
  if (group == kGroups - 1) announce(kTurns, 2 * kGroup);  // The first group's turn.

  float scores[kKeys / 2], sums[kSize / 2], largest[2], total[2], kept[2];
  std::uint32_t weights[kKeys / 16][4];

  const auto multiply_keys = [&] {
    begin_products();
#pragma unroll
    for (int step = 0; step < kSize / 16; ++step) {
      const int part = step * 16 / kColumns, column = step * 16 % kColumns;
      multiply_rows<T>(scores, operand(&shared.q[part][group * kRows][column], 1024, 16),
                       operand(&shared.keys[keys_at.stage][part][0][column], 1024, 16), step == 0);
    }
    commit_products();
  };
  const auto multiply_values = [&] {
    begin_products();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
      multiply_columns<T>(
          sums, weights[step],
          operand(shared.values[values_at.stage][0][step * 16], 1024, sizeof shared.values[values_at.stage][0]));
    commit_products();
  };
  const auto release = [&](std::uint64_t& empty) {
    if (lane == 0) arrive(empty);
  };
  // Zeroes the values of keys that are not seen: a weight of 0 times a NaN in stale cache memory is NaN.
  const auto wait_for_values = [&](int at) {
    wait(shared.values_full[values_at.stage], values_at.parity);
    if (at >= work.from_key && at + kKeys - 1 <= work.last) return;
    auto& values = shared.values[values_at.stage];
    for (int i = thread; i < Shared::kParts * kKeys * 8; i += kGroup) {
      const int key = at + i / 8 % kKeys;
      if (key < work.from_key || key > work.last)
        *reinterpret_cast<uint4*>(&values[i / 8 / kKeys][i / 8 % kKeys][i % 8 * 8]) = make_uint4(0, 0, 0, 0);
    }
    stores_made();
    meet(kOwn + group, kGroup);
  };
  // Makes weights of a tile's scores; `kept` is what remains of sums so far.
  const auto weigh = [&](int at) {
    const int position = work.first + own_row;
    if (at + kKeys - 1 > work.first + group * kRows || work.last - at >= given.window) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int most = position + half * 8 - at - quad * 2;
        const int least = most >= given.window - kKeys ? most - given.window + 1 : -kKeys;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (n * 8 + j > most || n * 8 + j < least) scores[n * 4 + half * 2 + j] = -INFINITY;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float next = largest[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) next = fmaxf(next, scores[n * 4 + half * 2 + j]);
      next = fmaxf(next, __shfl_xor_sync(kAll, next, 1));
      next = fmaxf(next, __shfl_xor_sync(kAll, next, 2));
      const float base = next == -INFINITY ? 0 : next * scale;
      // One where a tile has nothing to see, so that it does not matter how many of those there are.
      kept[half] = largest[half] == next ? 1 : exp2_fast(largest[half] * scale - base);
      largest[half] = next;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[n * 4 + half * 2 + j];
          score = exp2_fast(fmaf(score, scale, -base));
          sum += score;
        }
      total[half] = total[half] * kept[half] + sum;
    }
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[step][i] = pair<T>(scores[step * 8 + i * 2], scores[step * 8 + i * 2 + 1]);
  };

  for (int round = 0; find_work(given, tiles, num_tiles, round, work); ++round) {
    if (work.count == 0) continue;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) sums[i] = 0;
    largest[0] = largest[1] = -INFINITY;
    total[0] = total[1] = 0;
    int at = work.from_key / kKeys * kKeys;
    wait(shared.q_full, q_parity);
    q_parity ^= 1;
    wait(shared.keys_full[keys_at.stage], keys_at.parity);
    multiply_keys();
    wait_for_products<0>();
    hold(scores);
    release(shared.keys_empty[keys_at.stage]);
    keys_at.advance();
    weigh(at);
    round_weights();
    for (at += kKeys; at <= work.last; at += kKeys) {
      wait(shared.keys_full[keys_at.stage], keys_at.parity);
      wait_for_values(at - kKeys);
      meet(kTurns + group, 2 * kGroup);
      hold(scores);
      hold(sums);
      multiply_keys();
      multiply_values();
      announce(kTurns + (group + 1) % kGroups, 2 * kGroup);
      wait_for_products<1>();
      hold(scores);
      release(shared.keys_empty[keys_at.stage]);
      keys_at.advance();
      weigh(at);
      wait_for_products<0>();
      hold(sums);
      release(shared.values_empty[values_at.stage]);
      values_at.advance();
      // Rescale only if the largest score of a row has changed, which soon becomes rare.
      if (__any_sync(kAll, kept[0] != 1 || kept[1] != 1))
#pragma unroll
        for (int i = 0; i < kSize / 2; ++i) sums[i] *= kept[i / 2 % 2];
      round_weights();
    }
    release(shared.q_empty);
    wait_for_values(at - kKeys);
    hold(sums);
    multiply_values();
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = total[half];
      all += __shfl_xor_sync(kAll, all, 1);
      all += __shfl_xor_sync(kAll, all, 2);
      factor[half] = 1 / all;
    }
    wait_for_products<0>();
    hold(sums);
    release(shared.values_empty[values_at.stage]);
    values_at.advance();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own_row + half * 8;
      if (row >= work.count) continue;
      T* out = static_cast<T*>(given.out) +
               (static_cast<std::int64_t>(work.token + row) * given.heads + work.head) * given.size;
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n)
        if (const int column = n * 8 + quad * 2; column < given.size)
          *reinterpret_cast<std::uint32_t*>(out + column) =
              pair<T>(sums[n * 4 + half * 2] * factor[half], sums[n * 4 + half * 2 + 1] * factor[half]);
    }
  }
}

#endif

template <typename T, int kSize, int kGroups>
static __global__ __launch_bounds__((kGroups + 1) * kGroup,
                                    1) void prefilling_hopper_kernel(const __grid_constant__ Attention given,
                                                                     const __grid_constant__ CUtensorMap q_map,
                                                                     const __grid_constant__ CUtensorMap kv_map,
                                                                     const Tile* tiles, int num_tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char dynamic[];
  using Shared = HopperShared<T, kSize, kGroups>;
  auto& shared = *reinterpret_cast<Shared*>(dynamic);
  // Of 65536 registers, by the whole of a block's threads at first.
  constexpr int kWarps = kGroups * kGroup / 32, kCopying = kGroups == 2 ? 24 : 32,
                kMultiplying = kGroups == 2 ? 240 : 160;
  let_next_begin();
  if (threadIdx.x == 0) {
    prefetch_map(q_map);
    prefetch_map(kv_map);
    barrier_init(shared.q_full, 1);
    barrier_init(shared.q_empty, kWarps);
    for (int stage = 0; stage < Shared::kStages; ++stage) {
      barrier_init(shared.keys_full[stage], 1);
      barrier_init(shared.keys_empty[stage], kWarps);
      barrier_init(shared.values_full[stage], 1);
      barrier_init(shared.values_empty[stage], kWarps);
    }
    barriers_made();
  }
  __syncthreads();
  wait_for_previous();
  const int group = __shfl_sync(kAll, static_cast<int>(threadIdx.x / kGroup), 0);
  if (group == 0) {
    give_registers_up<kCopying>();
    if (threadIdx.x < 32) copy_all(shared, given, tiles, num_tiles, q_map, kv_map);
  } else {
    take_registers<kMultiplying>();
    attend_all<T, Shared, kSize, kGroups>(shared, given, tiles, num_tiles, group - 1);
  }
#else
  __trap();  // takes_hopper() asks for the chip, and a driver may be told to take code for another
#endif
}

// ---- The host's part

template <typename T, int kSize, int kGroups>
static void run(const Runtime& runtime, const Attention& given) {
  using Shared = HopperShared<T, kSize, kGroups>;
  constexpr int kList = kGroups == 2 ? 0 : 2;
  static_assert(Shared::kQueries == kTileQueries[kList]);
  const auto kernel = prefilling_hopper_kernel<T, kSize, kGroups>;
  const std::int64_t size = given.size, width = given.width;
  const CUtensorMap q_map = tensor_map(
      given.q, given.dtype,
      {{size, 1, kColumns}, {given.heads, size, 1}, {given.num_tokens, given.heads * size, Shared::kQueries}});
  const CUtensorMap kv_map =
      tensor_map(given.kv, given.dtype,
                 {{width, 1, kColumns}, {given.num_blocks * 2 * given.kv_heads * given.block_size, width, kBox}});
  const int blocks = std::min(given.num_tiles[kList] * given.heads, runtime.multiprocessors());
  launch(runtime, kernel, static_cast<unsigned>(blocks), (kGroups + 1) * kGroup, sizeof(Shared), given, q_map, kv_map,
         given.batch.tiles[kList], given.num_tiles[kList]);
}

template <typename T>
static void run_sized(const Runtime& runtime, const Attention& given) {
  given.width <= 64 ? run<T, 64, 3>(runtime, given) : run<T, 128, 2>(runtime, given);
}

bool takes_hopper(const Runtime& runtime, const Attention& given) {
#ifdef VLLMLITE_HOPPER
  constexpr bool kBuilt = true;
#else
  constexpr bool kBuilt = false;
#endif
  return kBuilt && runtime.capability() == 90 && given.width <= 128 && given.block_size % kBox == 0 &&
         !given.quantized() && !edits_scores(given) &&
         !runtime.batch_invariant();  // for which one kernel does every size of block
}

void attend_prefilling_hopper(const Runtime& runtime, const Attention& given) {
  given.dtype == DType::float16 ? run_sized<f16>(runtime, given) : run_sized<bf16>(runtime, given);
}

}  // namespace vllmlite::cuda
