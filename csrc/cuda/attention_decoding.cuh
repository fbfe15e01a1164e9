// Attention of rows of up to kDecodingQueries tokens on 16-bit tensor cores. All the time goes into reading keys and
// values, which a row's queries and the query heads that share a key/value head read once, together.
//
// Grid: x a key/value head and a part of its columns, y a work list. Block: kWarps warps.
// A column is a query and a query head, queries outermost: column c of a key/value head is query c / sharing, head
// c % sharing. A block has kColumns = 8 * kColumnTiles of them; a row of more is read by several blocks.
// Keys: a warp takes tiles of kKeys keys; tiles begin at multiples of kKeys, warps take them in turn. Each warp has
// kStages stages of its own in shared memory, which it fills ahead by asynchronous copies, across work items, and as
// far as earlier steps wrote the keys, before the kernel that writes the newest keys has ended. Shared memory:
// DecodingShared. Products: scores [keys, columns] = keys [16 x 16] x queries [16 x 8], sums [elements, columns] =
// values^T x weights; a thread owns the elements of C of mma.cuh: of each column tile, columns 2 quad and 2 quad + 1;
// of scores, keys group and group + 8; of sums, elements group and group + 8 of each 16. Queries are in registers for
// one column tile and in shared memory for more. Split-KV, after Dao et al. 2023 (Flash-Decoding): where a row has
// several work items, each leaves partial sums and the last block to end combines them.
#pragma once

#include "cuda/attention_fragments.cuh"
#include "cuda/attention_walk.cuh"

namespace vllmlite::cuda {

constexpr int kColumnsOfTile = 8, kMostColumnTiles = 4, kStages = 2;
constexpr int kPartialsAtOnce = 16;  // work items whose partial sums a thread reads at a time

template <typename E, int kSize, int kWarps, int kColumnTiles>
struct DecodingShared {
  static constexpr int kColumns = kColumnTiles * kColumnsOfTile;
  Stage<E, kSize> stages[kWarps][kStages];
  Multiplied<E> queries[kColumnTiles == 1 ? 1 : kColumns][kSize + 8];
  // Elements whose sums are combined at a time: all but where twice as many warps as usual leave less room.
  static constexpr int kChunk = kSize * kWarps > 512 ? kSize / 2 : kSize;
  float sums[kWarps][kColumnsOfTile][kChunk + 4];
  float largest[kWarps][kColumnsOfTile], total[kWarps][kColumnsOfTile];
  int query_of[kColumns], head_of[kColumns];  // of a column: query of its row, query head of the model
  bool last;
};

// `kEdits`: whether scores are edited; see edits_scores.
template <typename E, int kSize, int kWarps, int kColumnTiles, bool kEdits>
static __global__ __launch_bounds__(kWarps * 32,
                                    kWarps > 4 ? 2 : 1) void decoding_kernel(const __grid_constant__ Attention given,
                                                                             float* partial, float2* states,
                                                                             std::int32_t* counters) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char dynamic[];
  using Shared = DecodingShared<E, kSize, kWarps, kColumnTiles>;
  auto& shared = *reinterpret_cast<Shared*>(dynamic);
  using Tiles = Walk<E, kSize, kWarps>;
  using M = Multiplied<E>;
  using Pieces = Fragments<E>;
  constexpr int kKeys = Tiles::kKeys, kParts = Tiles::kParts, kColumns = Shared::kColumns;
  let_next_begin();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4, quad = lane % 4, thread = static_cast<int>(threadIdx.x);
  const int sharing = given.heads / given.kv_heads, size = given.size;
  const int columns_of_head = sharing * given.num_queries, parts = (columns_of_head + kColumns - 1) / kColumns;
  const int kv_head = static_cast<int>(blockIdx.x) / parts;
  const int first_column = static_cast<int>(blockIdx.x) % parts * kColumns;
  const int first_item = given.batch.work_lists[blockIdx.y], last_item = given.batch.work_lists[blockIdx.y + 1];
  if (first_item == last_item) return;  // never all blocks, or the next kernel would not wait for the previous
  Tiles tiles(given, kv_head, first_column, first_item, last_item, warp);
  int filled = 0;
  for (; filled < kStages && tiles.settled(); ++filled) tiles.fetch(shared.stages[warp][filled], lane);
  if (thread < kColumns) {
    shared.query_of[thread] = (first_column + thread) / sharing;
    shared.head_of[thread] = kv_head * sharing + (first_column + thread) % sharing;
  }
  wait_for_previous();
  for (; filled < kStages; ++filled) tiles.fetch(shared.stages[warp][filled], lane);
  __syncthreads();

  const float scale = kEdits ? kLog2E : given.scale * kLog2E;
  int index = 0;
  for (int item_index = first_item; item_index < last_item; ++item_index) {
    const WorkItem item = given.batch.work_items[item_index];
    const int columns = min(item.queries * sharing - first_column, kColumns);
    if (columns <= 0) continue;
    const int from_key = first_key(item, given.window), first_position = item.context - item.queries;
    const auto place_of = [&](int column) {  // of a column's query, and of its result
      return (static_cast<std::int64_t>(item.token + shared.query_of[column]) * given.heads + shared.head_of[column]) *
             size;
    };

    std::uint32_t q[kColumnTiles == 1 ? kSize / 16 : 1][2];
    if constexpr (kColumnTiles == 1) {
      const std::int64_t from = group < columns ? place_of(group) : 0;
#pragma unroll
      for (int i = 0; i < kSize / 16; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int at = i * 16 + Pieces::dimension(quad, j);
          q[i][j] = group < columns && at < size ? query_pair<E>(given, from + at) : 0;
        }
    } else {
      constexpr int kPairs = kSize / 2;
      for (int i = thread; i < kColumns * kPairs; i += kWarps * 32) {
        const int column = i / kPairs, pair = i % kPairs;
        const int at = pair / 8 * 16 + Pieces::dimension(pair % 4, pair / 4 % 2);
        *reinterpret_cast<std::uint32_t*>(&shared.queries[column][pair * 2]) =
            column < columns && at < size ? query_pair<E>(given, place_of(column) + at) : 0;
      }
      __syncthreads();
    }
    // Of columns 2 quad and the next of each column tile.
    float largest[kColumnTiles][2], total[kColumnTiles][2] = {}, sums[kColumnTiles][kSize / 16][4] = {};
    // With head scales, the largest exponent of a weight times the scale of its value, which `sums` are relative to.
    float largest_scaled[kColumnTiles][2];
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int column = 0; column < 2; ++column) largest[n][column] = largest_scaled[n][column] = -INFINITY;
    for (int tile = from_key / Tiles::kStep * Tiles::kStep + warp * kKeys; tile < item.end; tile += Tiles::kStep) {
      wait_for_copies<kStages - 1>();
      __syncwarp();
      Stage<E, kSize>& stage = shared.stages[warp][index];
      float scores[kColumnTiles][kParts][4] = {};
#pragma unroll
      for (int load = 0; load < kSize / 16; load += Pieces::kSteps) {
        std::uint32_t keys[kParts][Pieces::kSteps][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) Pieces::keys(keys[part], &stage.keys[part * 16], load * 16, lane);
#pragma unroll
        for (int step = 0; step < Pieces::kSteps; ++step) {
          const int i = load + step;
          std::uint32_t query[kColumnTiles][2];
          if constexpr (kColumnTiles == 1) {
            query[0][0] = q[i][0];
            query[0][1] = q[i][1];
          } else {
#pragma unroll
            for (int n = 0; n < kColumnTiles; n += 2) {
              std::uint32_t both[4];
              load_matrices(both, &shared.queries[n * 8 + lane / 16 * 8 + lane % 8][i * 16 + lane / 8 % 2 * 8]);
              query[n][0] = both[0];
              query[n][1] = both[1];
              query[n + 1][0] = both[2];
              query[n + 1][1] = both[3];
            }
          }
#pragma unroll
          for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int n = 0; n < kColumnTiles; ++n)
              multiply<M>(scores[n][part], keys[part][step], query[n][0], query[n][1]);
        }
      }
      float value_exponents[kParts][2];  // binary logarithms of the scales of values of keys group and group + 8
      const bool scaled = kQuantized<E> && given.head_scales != nullptr;
      if constexpr (kQuantized<E>)
        if (scaled)
#pragma unroll
          for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int key = part * 16 + half * 8 + group;
              value_exponents[part][half] = __log2f(stage.scale(stage.values[key]));
              const float key_scale = stage.scale(stage.keys[key]);
#pragma unroll
              for (int n = 0; n < kColumnTiles; ++n) {
                scores[n][part][half * 2] *= key_scale;
                scores[n][part][half * 2 + 1] *= key_scale;
              }
            }
      // Whether all queries see all keys: from the last one's first key up to the first one's own.
      const bool all_seen =
          tile >= max(from_key, item.context - given.window) && tile + kKeys <= min(item.end, first_position + 1);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!kEdits && all_seen) break;
          const int column = n * kColumnsOfTile + quad * 2 + i % 2;
          const int position = first_position + shared.query_of[column];
          const float slope = kEdits ? slope_of(given, min(shared.head_of[column], given.heads - 1)) : 0;
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const int key = tile + part * 16 + i / 2 * 8 + group;
            float& score = scores[n][part][i];
            if constexpr (kEdits) score = edited_score(given, score, slope, key - position);
            if (!all_seen && (key < from_key || key >= item.end || key > position || position - key >= given.window))
              score = -INFINITY;
          }
        }
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        float base[2], kept[2], base_scaled[2];
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          float next = largest[n][column];
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            next = fmaxf(next, fmaxf(scores[n][part][column], scores[n][part][column + 2]));
#pragma unroll
          for (int offset = 4; offset < 32; offset *= 2) next = fmaxf(next, __shfl_xor_sync(kAll, next, offset));
          base[column] = next == -INFINITY ? 0 : next * scale;
          kept[column] = largest[n][column] == next ? 1 : exp2_fast(largest[n][column] * scale - base[column]);
          largest[n][column] = next;
          total[n][column] *= kept[column];
          if (!scaled) continue;
          next = largest_scaled[n][column];
#pragma unroll
          for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              next = fmaxf(next, fmaf(scores[n][part][half * 2 + column], scale, value_exponents[part][half]));
#pragma unroll
          for (int offset = 4; offset < 32; offset *= 2) next = fmaxf(next, __shfl_xor_sync(kAll, next, offset));
          base_scaled[column] = next == -INFINITY ? 0 : next;
          kept[column] =
              largest_scaled[n][column] == next ? 1 : exp2_fast(largest_scaled[n][column] - base_scaled[column]);
          largest_scaled[n][column] = next;
        }
        if (__any_sync(kAll, kept[0] != 1 || kept[1] != 1))
#pragma unroll
          for (auto& sum : sums[n])
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] *= kept[i % 2];
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& score = scores[n][part][i];
            const float weight = exp2_fast(fmaf(score, scale, -base[i % 2]));
            total[n][i % 2] += weight;
            score = scaled ? exp2_fast(fmaf(score, scale, value_exponents[part][i / 2] - base_scaled[i % 2])) : weight;
          }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        std::uint32_t weights[kColumnTiles][2];
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          const float (&of)[4] = scores[n][part];
          weights[n][0] = transposed(pair<M>(of[0], of[1]));
          weights[n][1] = transposed(pair<M>(of[2], of[3]));
        }
#pragma unroll
        for (int i = 0; i < kSize / 16; i += Pieces::kSteps) {
          std::uint32_t values[Pieces::kSteps][4];
          Pieces::values(values, &stage.values[part * 16], i * 16, lane);
#pragma unroll
          for (int step = 0; step < Pieces::kSteps; ++step)
#pragma unroll
            for (int n = 0; n < kColumnTiles; ++n)
              multiply<M>(sums[n][i + step], values[step], weights[n][0], weights[n][1]);
        }
      }
      __syncwarp();
      tiles.fetch(stage, lane);
      index = index + 1 == kStages ? 0 : index + 1;
    }

    // The warps' sums together, one column tile after another.
    const auto place_of_partial = [&](int item_partial, int column) {
      return (static_cast<std::int64_t>(item_partial) * given.kv_heads + kv_head) * columns_of_head + first_column +
             column;
    };
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      const int begin = n * kColumnsOfTile, count = min(columns - begin, kColumnsOfTile);
      if (count <= 0) break;
      float factor[2] = {1, 1};
      if (kQuantized<E> && given.head_scales != nullptr)
#pragma unroll
        for (int column = 0; column < 2; ++column)
          factor[column] = largest_scaled[n][column] == -INFINITY
                               ? 0
                               : exp2_fast(largest_scaled[n][column] - largest[n][column] * scale);
#pragma unroll
      for (int column = 0; column < 2; ++column)
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2)
          total[n][column] += __shfl_xor_sync(kAll, total[n][column], offset);
#pragma unroll
      for (int chunk = 0; chunk < kSize / Shared::kChunk; ++chunk) {
        __syncthreads();
        if (chunk == 0 && group == 0)
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            shared.largest[warp][quad * 2 + column] = largest[n][column] * scale;
            shared.total[warp][quad * 2 + column] = total[n][column];
          }
#pragma unroll
        for (int part = 0; part < Shared::kChunk / 16; ++part)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            shared.sums[warp][quad * 2 + i % 2][part * 16 + Pieces::element(group, i / 2)] =
                sums[n][chunk * (Shared::kChunk / 16) + part][i] * factor[i % 2];
        __syncthreads();
        for (int i = thread * 2; i < count * Shared::kChunk; i += kWarps * 32 * 2) {
          const int column = i / Shared::kChunk, in_chunk = i % Shared::kChunk, at = chunk * Shared::kChunk + in_chunk;
          if (at >= size) continue;
          float most = -INFINITY, all = 0;
          float2 sum = make_float2(0, 0);
#pragma unroll
          for (int w = 0; w < kWarps; ++w) most = fmaxf(most, shared.largest[w][column]);
#pragma unroll
          for (int w = 0; w < kWarps; ++w) {
            const float largest_of_warp = shared.largest[w][column];
            const float part = largest_of_warp == -INFINITY ? 0 : exp2_fast(largest_of_warp - most);
            all += shared.total[w][column] * part;
            sum.x += shared.sums[w][column][in_chunk] * part;
            sum.y += shared.sums[w][column][in_chunk + 1] * part;
          }
          if (item.count == 1) {
            store_results<E>(given, place_of(begin + column) + at, sum.x / all, sum.y / all);
          } else {
            const std::int64_t own = place_of_partial(item.partial, begin + column);
            *reinterpret_cast<float2*>(partial + own * size + at) = sum;
            if (at == 0) states[own] = make_float2(most, all);
          }
        }
      }
    }
    if (item.count == 1) continue;

    __threadfence();
    __syncthreads();
    std::int32_t* counter = counters + static_cast<std::int64_t>(item.row) * gridDim.x + blockIdx.x;
    if (thread == 0) {
      shared.last = atomicAdd(counter, 1) == item.count - 1;
      if (shared.last) *counter = 0;
    }
    __syncthreads();
    if (!shared.last) continue;
    __threadfence();
    // Each thread takes four elements at a time, and reads the partial sums of several items before it uses them.
    for (int i = thread * 4; i < columns * size; i += kWarps * 32 * 4) {
      const int column = i / size, at = i % size;
      float most = -INFINITY, all = 0;
      float4 sum = make_float4(0, 0, 0, 0);
      for (int begin = 0; begin < item.count; begin += kPartialsAtOnce) {
        float2 found_states[kPartialsAtOnce];
        float4 found[kPartialsAtOnce];
#pragma unroll
        for (int n = 0; n < kPartialsAtOnce; ++n) {
          const bool there = begin + n < item.count;
          const std::int64_t place = place_of_partial(item.first + begin + n, column);
          found_states[n] = there ? __ldcg(states + place) : make_float2(-INFINITY, 0);
          found[n] = there ? __ldcg(reinterpret_cast<const float4*>(partial + place * size + at)) : float4{};
        }
        float next = most;
#pragma unroll
        for (const float2& state : found_states) next = fmaxf(next, state.x);
        if (next == -INFINITY) continue;
        const float kept = exp2_fast(most - next);
        all *= kept;
        sum = make_float4(sum.x * kept, sum.y * kept, sum.z * kept, sum.w * kept);
#pragma unroll
        for (int n = 0; n < kPartialsAtOnce; ++n) {
          const float factor = exp2_fast(found_states[n].x - next);
          all += found_states[n].y * factor;
          sum.x += found[n].x * factor;
          sum.y += found[n].y * factor;
          sum.z += found[n].z * factor;
          sum.w += found[n].w * factor;
        }
        most = next;
      }
      const std::int64_t place = place_of(column) + at;
      store_results<E>(given, place, sum.x / all, sum.y / all);
      store_results<E>(given, place + 2, sum.z / all, sum.w / all);
    }
  }
#endif
}

template <typename E, int kSize, int kWarps, int kColumnTiles>
static void run(Runtime& runtime, const Attention& attention) {
  using Shared = DecodingShared<E, kSize, kWarps, kColumnTiles>;
  static_assert(sizeof(Shared) <= kMostSharedMemory);
  const std::int64_t columns = std::int64_t{attention.heads / attention.kv_heads} * attention.num_queries;
  const dim3 grid(static_cast<unsigned>(attention.kv_heads) * blocks_for(columns, Shared::kColumns),
                  static_cast<unsigned>(attention.num_work_lists));
  // Between two lists at most one row is split.
  const std::int64_t partials = std::int64_t{2} * attention.num_work_lists * attention.kv_heads * columns;
  const Tensor partial = runtime.make({partials, attention.size}, DType::float32);
  const Tensor states = runtime.make({partials, 2}, DType::float32);
  const auto kernel = edits_scores(attention) ? decoding_kernel<E, kSize, kWarps, kColumnTiles, true>
                                              : decoding_kernel<E, kSize, kWarps, kColumnTiles, false>;
  launch(runtime, kernel, grid, kWarps * 32, sizeof(Shared), attention, static_cast<float*>(partial.data),
         static_cast<float2*>(states.data), runtime.counters(static_cast<std::size_t>(attention.num_rows) * grid.x));
}

template <typename E, int kSize>
static void run_columns(Runtime& runtime, const Attention& attention) {
  // Bytes take half as long to read, and more instructions each: twice as many warps, where registers allow it.
  constexpr int kWarps = kSize > 128 ? 2 : 4, kFewWarps = kQuantized<E> ? 2 * kWarps : kWarps;
  constexpr int kMost = kSize > 128 ? 2 : kMostColumnTiles;
  const int columns = attention.heads / attention.kv_heads * attention.num_queries;
  const DecodingBlocks blocks = decoding_blocks(runtime, attention.num_rows, attention.num_queries, attention.kv_heads);
  if (columns > 2 * kColumnsOfTile && attention.num_queries > 1)
    run<E, kSize, kWarps, kMost>(runtime, attention);
  else if (columns > kColumnsOfTile && attention.num_queries > 1)
    run<E, kSize, kWarps, 2>(runtime, attention);
  else if (blocks.warps == 2)
    run<E, kSize, 2, 1>(runtime, attention);
  else
    run<E, kSize, kFewWarps, 1>(runtime, attention);
}

template <typename E>
void attend_decoding_over(Runtime& runtime, const Attention& attention) {
  if (attention.width <= 64)
    run_columns<E, 64>(runtime, attention);
  else if (attention.width <= 128)
    run_columns<E, 128>(runtime, attention);
  else
    run_columns<E, kMostSize>(runtime, attention);
}

}  // namespace vllmlite::cuda
