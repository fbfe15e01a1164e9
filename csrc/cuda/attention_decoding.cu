// Attention of rows that have one token: all the time goes into reading keys and values. A block has a share of the
// items, for the query heads that share a key/value head; its warps take tiles of keys in turn, each with stages of its
// own in shared memory that are filled ahead in the background, across items, and as far as earlier steps wrote the
// keys from before the kernel that writes the newest is done. Keys are the rows of the tensor
// cores' first operand, heads the columns of the second. The last of a row's blocks puts the items together, as in
// Dao et al. 2023 (Flash-Decoding).
#include <algorithm>

#include "cuda/attention.cuh"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

constexpr int kHeads = 8, kStages = 2;

// Rows are padded by one access, so that eight of them lie in different banks.
template <typename T, int kSize>
struct Stage {
  static constexpr int kKeys = kSize > 128 ? 16 : 2048 / kSize, kStride = kSize + 8;
  T keys[kKeys][kStride];
  T values[kKeys][kStride];
};

template <typename T, int kSize, int kWarps>
struct DecodingRoom {
  Stage<T, kSize> stages[kWarps][kStages];
  float sums[kWarps][kHeads][kSize + 4];
  float largest[kWarps][kHeads], total[kWarps][kHeads];
  bool last;
};

// The first key of an item that its token sees through a window.
__device__ __forceinline__ int first_key(const Item& item, int window) {
  return item.context - item.begin > window ? item.context - window : item.begin;
}

// The tiles of keys that a warp takes, in order: those of its block's items, one after another.
template <typename T, int kSize, int kWarps>
class Walk {
 public:
  static constexpr int kKeys = Stage<T, kSize>::kKeys, kStep = kWarps * kKeys, kParts = kKeys / 16;

  // Of items `first` up to `last`.
  __device__ Walk(const Attention& given, int kv_head, int first, int last, int warp)
      : given_(given), warp_(warp), item_(first), last_(last) {
    plane_ = static_cast<std::int64_t>(given.block_size) * given.width;
    whole_ = given.block_size % 16 == 0;
    cache_ = static_cast<const T*>(given.kv) + kv_head * plane_;
    open();
  }

  // Whether the next tile's keys were all written by earlier steps.
  __device__ bool settled() const { return live_ && tile_ + kKeys <= settled_; }

  // Starts copying the next tile.
  __device__ void fetch(Stage<T, kSize>& stage, int lane) {
    constexpr int kWords = kSize / 8;  // of 16 bytes in a key
    if (live_) {
      const std::int64_t values_at = given_.kv_heads * plane_;
      if (whole_ && given_.width == kSize && tile_ >= from_ && tile_ + kKeys <= end_) {
#pragma unroll
        for (int i = 0; i < kKeys * kWords / 32; ++i) {
          const int row = i * (32 / kWords) + lane / kWords, word = lane % kWords;
          const T* from = cache_ + places_[i / (kWords / 2)] + lane * 8 + i % (kWords / 2) * 256;
          copy_async(&stage.keys[row][word * 8], from, true);
          copy_async(&stage.values[row][word * 8], from + values_at, true);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kKeys * kWords / 32; ++i) {
          const int row = i * (32 / kWords) + lane / kWords, word = lane % kWords, key = tile_ + row;
          const bool there = key >= from_ && key < end_ && word * 8 < given_.width;
          const std::int64_t at = there ? place_of(key) + word * 8 : 0;
          copy_async(&stage.keys[row][word * 8], cache_ + at, there);
          copy_async(&stage.values[row][word * 8], cache_ + (there ? at + values_at : 0), there);
        }
      }
      tile_ += kStep;
      if (tile_ < end_)
        find();
      else
        open();
    }
    commit_copies();
  }

 private:
  __device__ std::int64_t place_of(int key) const {
    return table_[key / given_.block_size] * 2 * given_.kv_heads * plane_ +
           static_cast<std::int64_t>(key % given_.block_size) * given_.width;
  }

  // Looks up where the tile lies, one tile before that is needed.
  __device__ void find() {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      places_[part] = whole_ && tile_ + part * 16 < end_ ? place_of(tile_ + part * 16) : 0;
  }

  __device__ void open() {
    for (live_ = false; !live_ && item_ < last_; ++item_) {
      const Item item = given_.batch.items[item_];
      from_ = first_key(item, given_.window);
      end_ = item.end;
      settled_ = item.settled;
      tile_ = from_ / kStep * kStep + warp_ * kKeys;
      if (tile_ >= end_) continue;
      table_ = given_.batch.block_table + static_cast<std::int64_t>(item.slot) * given_.batch.max_blocks;
      live_ = true;
      find();
    }
  }

  const Attention& given_;
  const int warp_;
  std::int64_t plane_;
  bool whole_, live_;  // 16 keys are in one block; there is a next tile
  int item_, last_, tile_, from_, end_, settled_;
  const std::int32_t* table_;
  const T* cache_;
  std::int64_t places_[kParts];
};

// `kEdits`: whether scores are edited; see edits_scores.
template <typename T, int kSize, int kWarps, bool kEdits>
static __global__ __launch_bounds__(kWarps * 32) void decoding_kernel(const __grid_constant__ Attention given,
                                                                      float* partial, float2* states,
                                                                      std::int32_t* counters) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  auto& room = *reinterpret_cast<DecodingRoom<T, kSize, kWarps>*>(shared);
  using Tiles = Walk<T, kSize, kWarps>;
  constexpr int kKeys = Tiles::kKeys, kParts = Tiles::kParts;
  let_next_begin();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4, quad = lane % 4;
  const int sharing = given.heads / given.kv_heads, parts = (sharing + kHeads - 1) / kHeads;
  const int size = given.size, part_of_heads = static_cast<int>(blockIdx.x), kv_head = part_of_heads / parts;
  const int first_head = kv_head * sharing + part_of_heads % parts * kHeads;
  const int num_heads = min(sharing - part_of_heads % parts * kHeads, kHeads);
  const int first_item = given.batch.starts[blockIdx.y], last_item = given.batch.starts[blockIdx.y + 1];
  if (first_item == last_item) return;  // never all blocks, or the next kernel would not wait for the previous
  Tiles tiles(given, kv_head, first_item, last_item, warp);
  int filled = 0;
  for (; filled < kStages && tiles.settled(); ++filled) tiles.fetch(room.stages[warp][filled], lane);
  wait_for_previous();
  for (; filled < kStages; ++filled) tiles.fetch(room.stages[warp][filled], lane);

  const float scale = kEdits ? kLog2E : given.scale * kLog2E;
  int index = 0;
  for (int item_index = first_item; item_index < last_item; ++item_index) {
    const Item item = given.batch.items[item_index];
    const int from_key = first_key(item, given.window);
    const std::int64_t at_heads = static_cast<std::int64_t>(item.token) * given.heads + first_head;

    std::uint32_t q[kSize / 16][2];
#pragma unroll
    for (int i = 0; i < kSize / 16; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = i * 16 + j * 8 + quad * 2;
        const T* from = static_cast<const T*>(given.q) + (at_heads + group) * size + at;
        q[i][j] = group < num_heads && at < size ? *reinterpret_cast<const std::uint32_t*>(from) : 0;
      }
    // Of heads 2 quad and the next.
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {}, sums[kSize / 16][4] = {};
    for (int tile = from_key / Tiles::kStep * Tiles::kStep + warp * kKeys; tile < item.end; tile += Tiles::kStep) {
      wait_for_copies<kStages - 1>();
      __syncwarp();
      Stage<T, kSize>& stage = room.stages[warp][index];
      float scores[kParts][4] = {};
#pragma unroll
      for (int i = 0; i < kSize / 16; ++i)
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          std::uint32_t key[4];
          load_matrices(key, &stage.keys[part * 16 + lane % 16][i * 16 + lane / 16 * 8]);
          multiply<T>(scores[part], key, q[i][0], q[i][1]);
        }
      if constexpr (kEdits)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float slope = slope_of(given, first_head + min(quad * 2 + i % 2, num_heads - 1));
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            scores[part][i] =
                edited_score(given, scores[part][i], slope, tile + part * 16 + i / 2 * 8 + group - item.context + 1);
        }
      if (tile < from_key || tile + kKeys > item.end) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (const int key = tile + part * 16 + i / 2 * 8 + group; key < from_key || key >= item.end)
              scores[part][i] = -INFINITY;
      }
      float base[2], kept[2];
#pragma unroll
      for (int head = 0; head < 2; ++head) {
        float next = largest[head];
#pragma unroll
        for (int part = 0; part < kParts; ++part) next = fmaxf(next, fmaxf(scores[part][head], scores[part][head + 2]));
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) next = fmaxf(next, __shfl_xor_sync(kAll, next, offset));
        base[head] = next == -INFINITY ? 0 : next * scale;
        kept[head] = largest[head] == next ? 1 : exp2_fast(largest[head] * scale - base[head]);
        largest[head] = next;
        total[head] *= kept[head];
      }
      if (__any_sync(kAll, kept[0] != 1 || kept[1] != 1))
#pragma unroll
        for (auto& sum : sums)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i] *= kept[i % 2];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float (&weights)[4] = scores[part];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[i] = exp2_fast(fmaf(weights[i], scale, -base[i % 2]));
          total[i % 2] += weights[i];
        }
        const std::uint32_t low = transposed(pair<T>(weights[0], weights[1])),
                            high = transposed(pair<T>(weights[2], weights[3]));
#pragma unroll
        for (int i = 0; i < kSize / 16; ++i) {
          std::uint32_t value[4];
          load_matrices_transposed(value,
                                   &stage.values[part * 16 + lane / 16 * 8 + lane % 8][i * 16 + lane / 8 % 2 * 8]);
          multiply<T>(sums[i], value, low, high);
        }
      }
      __syncwarp();
      tiles.fetch(stage, lane);
      index = index + 1 == kStages ? 0 : index + 1;
    }

    // The warps' shares together.
    __syncthreads();
#pragma unroll
    for (int head = 0; head < 2; ++head) {
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) total[head] += __shfl_xor_sync(kAll, total[head], offset);
      if (group == 0) {
        room.largest[warp][quad * 2 + head] = largest[head] * scale;
        room.total[warp][quad * 2 + head] = total[head];
      }
    }
#pragma unroll
    for (int n = 0; n < kSize / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) room.sums[warp][quad * 2 + i % 2][n * 16 + i / 2 * 8 + group] = sums[n][i];
    __syncthreads();
    T* out = static_cast<T*>(given.out) + at_heads * size;
    const std::int64_t own = static_cast<std::int64_t>(item_index) * given.heads + first_head;
    for (int i = static_cast<int>(threadIdx.x); i < num_heads * size; i += kWarps * 32) {
      const int head = i / size, at = i % size;
      float most = -INFINITY, all = 0, sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) most = fmaxf(most, room.largest[w][head]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float part = room.largest[w][head] == -INFINITY ? 0 : exp2_fast(room.largest[w][head] - most);
        all += room.total[w][head] * part;
        sum += room.sums[w][head][at] * part;
      }
      if (item.count == 1) {
        out[i] = narrow<T>(sum / all);
      } else {
        partial[(own + head) * size + at] = sum;
        if (at == 0) states[own + head] = make_float2(most, all);
      }
    }
    if (item.count == 1) continue;

    __threadfence();
    __syncthreads();
    std::int32_t* counter = counters + static_cast<std::int64_t>(item.row) * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) {
      room.last = atomicAdd(counter, 1) == item.count - 1;
      if (room.last) *counter = 0;
    }
    __syncthreads();
    if (!room.last) continue;
    __threadfence();
    for (int i = static_cast<int>(threadIdx.x); i < num_heads * size; i += kWarps * 32) {
      const std::int64_t head = first_head + i / size;
      float most = -INFINITY, all = 0, sum = 0;
#pragma unroll 4
      for (int n = item.first; n < item.first + item.count; ++n) {
        const std::int64_t there = static_cast<std::int64_t>(n) * given.heads + head;
        const float2 state = __ldcg(states + there);
        const float value = __ldcg(partial + there * size + i % size);
        if (state.x == -INFINITY) continue;
        const float next = fmaxf(most, state.x);
        const float kept = most == -INFINITY ? 0 : exp2_fast(most - next), part = exp2_fast(state.x - next);
        all = all * kept + state.y * part;
        sum = sum * kept + value * part;
        most = next;
      }
      out[i] = narrow<T>(sum / all);
    }
  }
#endif
}

bool takes_tensor_cores(const Runtime& runtime, const Attention& attention) {
  return runtime.capability() >= 80 && attention.dtype != DType::float32 && attention.dtype == attention.kv_dtype &&
         attention.size % 8 == 0 && (attention.width <= 128 || runtime.shared_memory() >= kWideRoom);
}

template <typename T, int kSize, int kWarps>
static void run(Runtime& runtime, const Attention& attention) {
  using Shared = DecodingRoom<T, kSize, kWarps>;
  static_assert(kSize <= 128 || sizeof(Shared) <= kWideRoom);
  const int sharing = attention.heads / attention.kv_heads;
  const dim3 grid(static_cast<unsigned>(attention.kv_heads * ((sharing + kHeads - 1) / kHeads)),
                  static_cast<unsigned>(attention.num_shares));
  const std::int64_t items = attention.num_items;
  const Tensor partial = runtime.make({items * attention.heads, attention.size}, DType::float32);
  const Tensor states = runtime.make({items * attention.heads, 2}, DType::float32);
  const auto kernel =
      edits_scores(attention) ? decoding_kernel<T, kSize, kWarps, true> : decoding_kernel<T, kSize, kWarps, false>;
  launch(runtime, kernel, grid, kWarps * 32, sizeof(Shared), attention, static_cast<float*>(partial.data),
         static_cast<float2*>(states.data), runtime.counters(static_cast<std::size_t>(attention.num_rows) * grid.x));
}

template <typename T, int kSize>
static void run_warps(Runtime& runtime, const Attention& attention) {
  const DecodingBlocks blocks = decoding_blocks(runtime, attention.num_rows, attention.kv_heads);
  blocks.warps == 2 ? run<T, kSize, 2>(runtime, attention) : run<T, kSize, 4>(runtime, attention);
}

template <typename T>
static void run_sized(Runtime& runtime, const Attention& attention) {
  if (attention.width <= 64)
    run_warps<T, 64>(runtime, attention);
  else if (attention.width <= 128)
    run_warps<T, 128>(runtime, attention);
  else
    run<T, kMostSize, 2>(runtime, attention);
}

void attend_decoding(Runtime& runtime, const Attention& attention) {
  attention.dtype == DType::float16 ? run_sized<f16>(runtime, attention) : run_sized<bf16>(runtime, attention);
}

}  // namespace vllmlite::cuda
