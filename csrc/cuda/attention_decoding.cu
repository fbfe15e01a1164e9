// Attention of rows that have one token: all the time goes into reading keys and values. A block has one item of a row
// for the query heads that share a key/value head; its warps take 16 keys in turn, each with stages of its own in
// shared memory that are filled ahead in the background. The last of a row's blocks puts the items together.
#include <algorithm>

#include "cuda/attention.hpp"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

constexpr int kWarps = 4, kKeys = 16, kHeads = 16;

// Rows are padded by one access, so that eight of them lie in different banks.
template <typename T, int kSize>
struct Stage {
  static constexpr int kStride = kSize + 8;
  T keys[kKeys][kStride];
  T values[kKeys][kStride];
};

template <typename T, int kSize, int kStages>
union Room {
  Stage<T, kSize> stages[kWarps][kStages];
  struct {
    float sums[kWarps][kHeads][kSize + 4];
    float largest[kWarps][kHeads], total[kWarps][kHeads];
    bool last;
  } end;
};

template <typename T, int kSize, int kStages>
static __global__ __launch_bounds__(kWarps * 32, 2) void decoding_kernel(const __grid_constant__ Attention given,
                                                                         float* partial, float2* states,
                                                                         std::int32_t* counters) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  auto& room = *reinterpret_cast<Room<T, kSize, kStages>*>(shared);
  constexpr int kWords = kSize / 8;  // of 16 bytes in a key
  let_next_begin();
  wait_for_previous();
  const Item item = given.batch.items[blockIdx.x];
  if (item.row < 0) return;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4, quad = lane % 4;
  const int sharing = given.heads / given.kv_heads, parts = (sharing + kHeads - 1) / kHeads;
  const int kv_head = static_cast<int>(blockIdx.y) / parts, part = static_cast<int>(blockIdx.y) % parts;
  const int first_head = kv_head * sharing + part * kHeads, num_heads = min(sharing - part * kHeads, kHeads);
  const std::int64_t token = item.token;
  const int from_key = item.context > given.window ? max(item.begin, item.context - given.window) : item.begin;
  const int size = given.size, width = given.width, block_size = given.block_size;
  const std::int32_t* table = given.batch.block_table + static_cast<std::int64_t>(item.slot) * given.batch.max_blocks;
  const std::int64_t plane = static_cast<std::int64_t>(block_size) * width;
  const std::int64_t block_stride = 2 * given.kv_heads * plane, values_at = given.kv_heads * plane;
  const T* cache = static_cast<const T*>(given.kv) + kv_head * plane;
  const bool whole = block_size % kKeys == 0;  // 16 keys are in one block

  // Where 16 keys begin, if they are in one block.
  constexpr int kStep = kWarps * kKeys;
  const auto find = [&](int tile) {
    return whole && tile < item.end
               ? table[tile / block_size] * block_stride + static_cast<std::int64_t>(tile % block_size) * width
               : 0;
  };
  int fetched = from_key / kStep * kStep + warp * kKeys;  // the next tile to ask for
  std::int64_t place = find(fetched), next_place = find(fetched + kStep);
  const auto fetch = [&](Stage<T, kSize>& stage) {
    if (fetched < item.end) {
#pragma unroll
      for (int i = lane; i < kKeys * kWords; i += 32) {
        const int row = i / kWords, word = i % kWords, key = fetched + row;
        const bool there = key >= from_key && key < item.end && word * 8 < width;
        std::int64_t at = place + static_cast<std::int64_t>(row) * width;
        if (!whole && there)
          at = table[key / block_size] * block_stride + static_cast<std::int64_t>(key % block_size) * width;
        const T* from = cache + (there ? at + word * 8 : 0);
        copy_async(&stage.keys[row][word * 8], from, there);
        copy_async(&stage.values[row][word * 8], from + (there ? values_at : 0), there);
      }
    }
    commit_copies();
    fetched += kStep;
    place = next_place;
    next_place = find(fetched + kStep);
  };
  int tile = fetched;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(room.stages[warp][i]);

  std::uint32_t q[kSize / 16][4];
#pragma unroll
  for (int i = 0; i < kSize / 16; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int head = group + j % 2 * 8, at = i * 16 + quad * 2 + j / 2 * 8;
      const T* from = static_cast<const T*>(given.q) + (token * given.heads + first_head + head) * size + at;
      q[i][j] = head < num_heads && at < size ? *reinterpret_cast<const std::uint32_t*>(from) : 0;
    }
  const float scale = given.scale * kLog2E;
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {}, sums[kSize / 8][4] = {};

  for (int index = 0; tile < item.end; tile += kStep, index = index + 1 == kStages ? 0 : index + 1) {
    fetch(room.stages[warp][index == 0 ? kStages - 1 : index - 1]);
    wait_for_copies<kStages - 1>();
    __syncwarp();
    const Stage<T, kSize>& stage = room.stages[warp][index];
    float scores[2][4] = {};
#pragma unroll
    for (int i = 0; i < kSize / 16; ++i) {
      std::uint32_t key[4];
      load_matrices(key, &stage.keys[lane / 16 * 8 + lane % 8][i * 16 + lane / 8 % 2 * 8]);
      multiply<T>(scores[0], q[i], key[0], key[1]);
      multiply<T>(scores[1], q[i], key[2], key[3]);
    }
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
    for (int i = 0; i < kSize / 16; ++i) {
      std::uint32_t value[4];
      load_matrices_transposed(value, &stage.values[lane / 8 % 2 * 8 + lane % 8][i * 16 + lane / 16 * 8]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto& sum = sums[2 * i + half];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] *= kept[j / 2];
        multiply<T>(sum, weights, value[2 * half], value[2 * half + 1]);
      }
    }
    __syncwarp();
  }
  wait_for_copies<0>();
  __syncthreads();

  // The warps' shares together.
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    total[row] += __shfl_xor_sync(kAll, total[row], 1);
    total[row] += __shfl_xor_sync(kAll, total[row], 2);
    if (quad == 0) {
      room.end.largest[warp][row * 8 + group] = largest[row];
      room.end.total[warp][row * 8 + group] = total[row];
    }
  }
#pragma unroll
  for (int n = 0; n < kSize / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) room.end.sums[warp][i / 2 * 8 + group][n * 8 + quad * 2 + i % 2] = sums[n][i];
  __syncthreads();
  T* out = static_cast<T*>(given.out) + (token * given.heads + first_head) * size;
  const std::int64_t own = static_cast<std::int64_t>(blockIdx.x) * given.heads + first_head;
  for (int i = static_cast<int>(threadIdx.x); i < num_heads * size; i += kWarps * 32) {
    const int head = i / size, at = i % size;
    float most = -INFINITY, all = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, room.end.largest[w][head]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float share = room.end.largest[w][head] == -INFINITY ? 0 : exp2_fast(room.end.largest[w][head] - most);
      all += room.end.total[w][head] * share;
      sum += room.end.sums[w][head][at] * share;
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
    room.end.last = atomicAdd(counter, 1) == item.count - 1;
    if (room.end.last) *counter = 0;
  }
  __syncthreads();
  if (!room.end.last) return;
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

template <typename T, int kSize, int kStages>
static void run(Runtime& runtime, const Attention& attention) {
  using Shared = Room<T, kSize, kStages>;
  const int sharing = attention.heads / attention.kv_heads;
  const dim3 grid(static_cast<unsigned>(attention.num_items),
                  static_cast<unsigned>(attention.kv_heads * ((sharing + kHeads - 1) / kHeads)));
  const std::int64_t shares = static_cast<std::int64_t>(attention.num_items) * attention.heads;
  const Tensor partial = runtime.make({shares, attention.size}, DType::float32);
  const Tensor states = runtime.make({shares, 2}, DType::float32);
  VLLMLITE_CUDA_CHECK(cudaFuncSetAttribute, decoding_kernel<T, kSize, kStages>,
                      cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(Shared)));
  launch(runtime, decoding_kernel<T, kSize, kStages>, grid, kWarps * 32, sizeof(Shared), attention,
         static_cast<float*>(partial.data), static_cast<float2*>(states.data),
         runtime.counters(static_cast<std::size_t>(attention.num_rows) * grid.y));
}

template <typename T>
static void run_sized(Runtime& runtime, const Attention& attention) {
  if (attention.width <= 64 && runtime.shared_memory() >= static_cast<int>(sizeof(Room<T, 64, 6>)))
    run<T, 64, 6>(runtime, attention);
  else if (attention.width <= 64)
    run<T, 64, 4>(runtime, attention);
  else if (runtime.shared_memory() >= static_cast<int>(sizeof(Room<T, 128, 3>)))
    run<T, 128, 3>(runtime, attention);
  else
    run<T, 128, 2>(runtime, attention);
}

void attend_decoding(Runtime& runtime, const Attention& attention) {
  attention.dtype == DType::float16 ? run_sized<f16>(runtime, attention) : run_sized<bf16>(runtime, attention);
}

}  // namespace vllmlite::cuda
