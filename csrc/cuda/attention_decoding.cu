// Attention of rows that have one token: all the time goes into reading keys and values. A block has one item of a row
// for the query heads that share a key/value head; its warps take 16 keys in turn, which go from memory straight into
// the fragments of the tensor cores. The last of a row's blocks puts the items together.
#include <algorithm>

#include "cuda/attention.hpp"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

constexpr int kWarps = 4, kKeys = 16, kHeads = 16;
constexpr float kLog2E = 1.44269504088896341F;

__device__ __forceinline__ uint4 load_words(const void* from, bool there) {
  return there ? __ldg(static_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
}

template <typename T, int kSize>
static __global__ __launch_bounds__(kWarps * 32,
                                    kSize == 64 ? 4 : 2) void decoding_kernel(const __grid_constant__ Attention given,
                                                                              float* __restrict__ partial,
                                                                              float2* __restrict__ states,
                                                                              std::int32_t* __restrict__ counters) {
#if __CUDA_ARCH__ >= 800
  constexpr int kWords = kSize / 32;   // of 16 bytes that a lane has of a key or query: a quad has 32 numbers in each
  constexpr int kChunks = kSize / 64;  // of 64 numbers of a value: a lane has 8 in each
  __shared__ float sums_room[kWarps][kHeads][kSize + 1];
  __shared__ float largest_room[kWarps][kHeads], total_room[kWarps][kHeads];
  __shared__ bool last;
  wait_for_previous();
  let_next_begin();
  const Item item = given.batch.items[blockIdx.x];
  if (item.row < 0) return;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4, quad = lane % 4;
  const int sharing = given.heads / given.kv_heads, parts = (sharing + kHeads - 1) / kHeads;
  const int kv_head = static_cast<int>(blockIdx.y) / parts, part = static_cast<int>(blockIdx.y) % parts;
  const int first_head = kv_head * sharing + part * kHeads, num_heads = min(sharing - part * kHeads, kHeads);
  const std::int64_t token = given.batch.query_start_loc[item.row];
  const int slot = given.batch.slot_ids[item.row], context = given.batch.context_lens[item.row];
  const int from_key = context > given.window ? max(item.begin, context - given.window) : item.begin;
  const int size = given.size, width = given.width, block_size = given.block_size;
  const std::int32_t* table = given.batch.block_table + static_cast<std::int64_t>(slot) * given.batch.max_blocks;
  const std::int64_t plane = static_cast<std::int64_t>(block_size) * width;
  const std::int64_t block_stride = 2 * given.kv_heads * plane, values_at = given.kv_heads * plane;
  const T* cache = static_cast<const T*>(given.kv) + kv_head * plane;
  const bool whole = block_size % kKeys == 0;  // 16 keys are in one block

  uint4 q_low[kWords], q_high[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int at = i * 32 + quad * 8;
    const T* q = static_cast<const T*>(given.q) + (token * given.heads + first_head) * size + at;
    q_low[i] = load_words(q + group * size, at < size && group < num_heads);
    q_high[i] = load_words(q + (group + 8) * size, at < size && group + 8 < num_heads);
  }
  const float scale = given.scale * kLog2E;
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {}, sums[kChunks][8][4] = {};

  // Where 16 keys begin, if they are in one block.
  const auto find_tile = [&](int tile) {
    return whole && tile < item.end
               ? table[tile / block_size] * block_stride + static_cast<std::int64_t>(tile % block_size) * width
               : 0;
  };
  const auto find = [&](std::int64_t tile_place, int tile, int offset) {
    if (whole) return tile_place + static_cast<std::int64_t>(offset) * width;
    const int key = min(tile + offset, item.end - 1);
    return table[key / block_size] * block_stride + static_cast<std::int64_t>(key % block_size) * width;
  };
  uint4 keys[2][kWords];
  const auto load_keys = [&](std::int64_t tile_place, int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* key = cache + find(tile_place, tile, half * 8 + group);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int at = i * 32 + quad * 8;
        keys[half][i] = load_words(key + at, at < width && tile < item.end);
      }
    }
  };

  constexpr int kStride = kWarps * kKeys;
  int tile = from_key / kStride * kStride + warp * kKeys;
  std::int64_t place = find_tile(tile), next_place = find_tile(tile + kStride);
  if (tile < item.end) load_keys(place, tile);
  for (; tile < item.end; tile += kStride) {
    uint4 values[kChunks][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int offset = i / 2 * 8 + quad * 2 + i % 2, key = tile + offset;
      const T* value = cache + values_at + find(place, tile, offset);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int at = chunk * 64 + group * 8;
        values[chunk][i] = load_words(value + at, at < width && key >= from_key && key < item.end);
      }
    }
    float scores[2][4] = {};
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const std::uint32_t first[] = {q_low[i].x, q_high[i].x, q_low[i].y, q_high[i].y};
      const std::uint32_t second[] = {q_low[i].z, q_high[i].z, q_low[i].w, q_high[i].w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply<T>(scores[half], first, keys[half][i].x, keys[half][i].y);
        multiply<T>(scores[half], second, keys[half][i].z, keys[half][i].w);
      }
    }
    const std::int64_t after = find_tile(tile + 2 * kStride);
    if (tile + kStride < item.end) load_keys(next_place, tile + kStride);
    place = next_place;
    next_place = after;

    float next[2] = {largest[0], largest[1]};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = tile + half * 8 + quad * 2 + i % 2;
        scores[half][i] = key >= from_key && key < item.end ? scores[half][i] * scale : -INFINITY;
        next[i / 2] = fmaxf(next[i / 2], scores[half][i]);
      }
    float kept[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      next[row] = fmaxf(next[row], __shfl_xor_sync(kAll, next[row], 1));
      next[row] = fmaxf(next[row], __shfl_xor_sync(kAll, next[row], 2));
      kept[row] = next[row] == -INFINITY ? 1 : exp2_fast(largest[row] - next[row]);
      largest[row] = next[row];
      total[row] *= kept[row];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float score = scores[half][i];
        scores[half][i] = score == -INFINITY ? 0 : exp2_fast(score - largest[i / 2]);
        total[i / 2] += scores[half][i];
      }
    const std::uint32_t weights[] = {pair<T>(scores[0][0], scores[0][1]), pair<T>(scores[0][2], scores[0][3]),
                                     pair<T>(scores[1][0], scores[1][1]), pair<T>(scores[1][2], scores[1][3])};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const auto& v = values[chunk];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[chunk][j][i] *= kept[i / 2];
        const auto word = [&](const uint4& of) { return j < 2 ? of.x : j < 4 ? of.y : j < 6 ? of.z : of.w; };
        const unsigned halves = j % 2 == 0 ? 0x5410 : 0x7632;
        multiply<T>(sums[chunk][j], weights, __byte_perm(word(v[0]), word(v[1]), halves),
                    __byte_perm(word(v[2]), word(v[3]), halves));
      }
    }
  }

  // The warps' shares together.
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    total[row] += __shfl_xor_sync(kAll, total[row], 1);
    total[row] += __shfl_xor_sync(kAll, total[row], 2);
    if (quad == 0) {
      largest_room[warp][row * 8 + group] = largest[row];
      total_room[warp][row * 8 + group] = total[row];
    }
  }
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums_room[warp][i / 2 * 8 + group][chunk * 64 + (quad * 2 + i % 2) * 8 + j] = sums[chunk][j][i];
  __syncthreads();
  T* out = static_cast<T*>(given.out) + (token * given.heads + first_head) * size;
  const std::int64_t own = static_cast<std::int64_t>(blockIdx.x) * given.heads + first_head;
  for (int i = static_cast<int>(threadIdx.x); i < num_heads * size; i += kWarps * 32) {
    const int head = i / size, at = i % size;
    float most = -INFINITY, all = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, largest_room[w][head]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float share = largest_room[w][head] == -INFINITY ? 0 : exp2_fast(largest_room[w][head] - most);
      all += total_room[w][head] * share;
      sum += sums_room[w][head][at] * share;
    }
    if (item.count == 1) {
      out[i] = narrow<T>(sum / all);
    } else {
      partial[(own + head) * size + at] = sum;
      if (at == 0) states[own + head] = make_float2(most, all);
    }
  }
  if (item.count == 1) return;

  __threadfence();
  __syncthreads();
  std::int32_t* counter = counters + static_cast<std::int64_t>(item.row) * gridDim.y + blockIdx.y;
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == item.count - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = static_cast<int>(threadIdx.x); i < num_heads * size; i += kWarps * 32) {
    const std::int64_t head = first_head + i / size;
    float most = -INFINITY, all = 0, sum = 0;
    for (int n = item.first; n < item.first + item.count; ++n) {
      const std::int64_t there = static_cast<std::int64_t>(n) * given.heads + head;
      const float2 state = __ldcg(states + there);
      if (state.x == -INFINITY) continue;
      const float next = fmaxf(most, state.x);
      const float kept = most == -INFINITY ? 0 : exp2_fast(most - next), share = exp2_fast(state.x - next);
      all = all * kept + state.y * share;
      sum = sum * kept + __ldcg(partial + there * size + i % size) * share;
      most = next;
    }
    out[i] = narrow<T>(sum / all);
  }
#endif
}

bool takes_tensor_cores(const Runtime& runtime, const Attention& attention) {
  return runtime.capability() >= 80 && attention.dtype != DType::float32 && attention.dtype == attention.kv_dtype &&
         attention.size % 8 == 0 && attention.width <= 128;
}

template <typename T>
static void run(Runtime& runtime, const Attention& attention) {
  const int sharing = attention.heads / attention.kv_heads;
  const dim3 grid(static_cast<unsigned>(attention.num_items),
                  static_cast<unsigned>(attention.kv_heads * ((sharing + kHeads - 1) / kHeads)));
  const std::int64_t shares = static_cast<std::int64_t>(attention.num_items) * attention.heads;
  const Tensor partial = runtime.make({shares, attention.size}, DType::float32);
  const Tensor states = runtime.make({shares, 2}, DType::float32);
  launch(runtime, attention.width <= 64 ? decoding_kernel<T, 64> : decoding_kernel<T, 128>, grid, kWarps * 32, 0,
         attention, static_cast<float*>(partial.data), static_cast<float2*>(states.data),
         runtime.counters(static_cast<std::size_t>(attention.num_rows) * grid.y));
}

void attend_decoding(Runtime& runtime, const Attention& attention) {
  attention.dtype == DType::float16 ? run<f16>(runtime, attention) : run<bf16>(runtime, attention);
}

}  // namespace vllmlite::cuda
