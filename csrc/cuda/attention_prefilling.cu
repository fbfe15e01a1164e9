// Attention of rows of more than kDecodingQueries tokens on 16-bit tensor cores, after Dao 2023 (FlashAttention-2); of
// all rows where the backend is batch-invariant, since the sums of a query do not depend on the others of its tile.
//
// Grid: x a tile of queries and a query head, heads innermost. Block: kWarps warps.
// Queries: a warp has kRowTiles times 16, in the rows of the first operand of products.
// Keys: all warps take the same tiles of kKeys keys, which begin at multiples of kKeys.
// Shared memory: PrefillingShared; keys and values have two buffers each, of which one is filled by asynchronous copies
// while the other is used. Of a quantised cache bytes are copied, and become numbers in a buffer of their own, times
// their head scales, right before they are used.
// Products: scores [queries, keys] and sums [queries, elements]; a thread owns the elements of C of mma.cuh: rows group
// and group + 8 of each 16 queries, columns 2 quad and 2 quad + 1 of each 8 keys or elements.
#include <algorithm>

#include "cuda/attention.cuh"
#include "cuda/cache.cuh"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

constexpr int kWarps = 4;

template <int kSize>
constexpr int kKeysOf = kSize > 128 ? 32 : 64;

// The keys or values in use, as numbers.
template <typename T, int kSize>
struct Numbers {
  alignas(16) T numbers[kKeysOf<kSize>][kSize + 8];
};
struct NoNumbers {};

// Rows are padded by one access of 16 bytes, so that eight of them lie in different banks. The padding of a key holds
// its place in the cache, or -1 for a key that is not read; the padding of bytes also their head scale.
template <typename T, int kSize, int kRowTiles, bool kBytes>
struct PrefillingShared : std::conditional_t<kBytes, Numbers<T, kSize>, NoNumbers> {
  using Copied = std::conditional_t<kBytes, std::uint8_t, T>;
  static constexpr int kQueries = kWarps * kRowTiles * 16, kKeys = kKeysOf<kSize>;
  static constexpr int kStride = kSize + 8, kCopiedStride = kSize + kPack<Copied>;
  alignas(16) T q[kQueries][kStride];
  Copied keys[2][kKeys][kCopiedStride];
  Copied values[2][kKeys][kCopiedStride];

  __device__ std::int32_t& place(int buffer, int row) {
    return *reinterpret_cast<std::int32_t*>(&keys[buffer][row][kSize]);
  }
  static __device__ float& scale(std::uint8_t (&row)[kCopiedStride]) {
    return *reinterpret_cast<float*>(&row[kSize + 4]);
  }
};

// Converts a word of four bytes to numbers, times `scale`.
template <typename T>
__device__ __forceinline__ uint2 to_numbers(CacheElement element, std::uint32_t bytes, float scale) {
  std::uint32_t halves[2], numbers[2];
  if (element == CacheElement::int8)
    to_halves<i8, true>(bytes, halves[0], halves[1]);
  else if (element == CacheElement::fp8_e4m3)
    to_halves<e4m3, true>(bytes, halves[0], halves[1]);
  else
    to_halves<e5m2, true>(bytes, halves[0], halves[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 both = __half22float2(reinterpret_cast<const __half2&>(halves[i]));
    numbers[i] = pair<T>(both.x * scale, both.y * scale);
  }
  return make_uint2(numbers[0], numbers[1]);
}

template <typename T, int kSize, int kRowTiles, bool kBytes>
static __global__ __launch_bounds__(kWarps * 32, 2) void prefilling_kernel(const __grid_constant__ Attention given) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char dynamic[];
  using Shared = PrefillingShared<T, kSize, kRowTiles, kBytes>;
  using Copied = typename Shared::Copied;
  auto& shared = *reinterpret_cast<Shared*>(dynamic);
  constexpr int kWord = kPack<Copied>;  // elements in 16 bytes
  constexpr int kWords = kSize / 8, kQueries = Shared::kQueries, kKeys = Shared::kKeys;
  let_next_begin();
  wait_for_previous();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = lane / 4, quad = lane % 4;
  const int head = static_cast<int>(blockIdx.x) % given.heads;
  const Tile tile = given.batch.tiles[kRowTiles == 2 ? 0 : 1][static_cast<int>(blockIdx.x) / given.heads];
  if (tile.row < 0) return;
  const int size = given.size, width = given.width, block_size = given.block_size;
  const int slot = given.batch.slot_ids[tile.row];
  const int first = given.batch.positions[tile.first], last = first + tile.count - 1;
  const int from_key = first >= given.window ? first - given.window + 1 : 0;
  const std::int32_t* table = given.batch.block_table + static_cast<std::int64_t>(slot) * given.batch.max_blocks;
  const auto* cache = static_cast<const Copied*>(given.kv);
  const int kv_head = head / (given.heads / given.kv_heads), value_places = given.kv_heads * block_size;

  // The block of a thread's key is looked up a tile before its place is needed.
  std::int32_t block = 0;
  const auto find_block = [&](int begin) {
    const int key = begin + thread;
    if (thread < kKeys && key >= from_key && key <= last) block = table[key / block_size];
  };
  const auto find_places = [&](int begin, int buffer) {
    if (thread >= kKeys) return;
    const int key = begin + thread;
    shared.place(buffer, thread) =
        key < from_key || key > last ? -1 : (block * 2 * given.kv_heads + kv_head) * block_size + key % block_size;
  };
  // Copies the rows that are `offset` behind the places of the buffer's keys.
  const auto copy_rows = [&](Copied(&to)[kKeys][Shared::kCopiedStride], int offset, int buffer) {
    constexpr int kCopies = kSize / kWord;  // of a row
#pragma unroll
    for (int i = thread; i < kKeys * kCopies; i += kWarps * 32) {
      const int row = i / kCopies, at = i % kCopies * kWord;
      const std::int32_t place = shared.place(buffer, row);
      const bool there = place >= 0 && at < width;
      copy_async(&to[row][at], cache + (there ? static_cast<std::int64_t>(place + offset) * width + at : 0), there);
    }
    if constexpr (kBytes)
      if (given.head_scales != nullptr && thread < kKeys) {
        const std::int32_t place = shared.place(buffer, thread);
        copy_async_word(&Shared::scale(to[thread]), given.head_scales + (place < 0 ? 0 : place + offset), place >= 0);
      }
    commit_copies();
  };
  // The numbers of rows that have been copied; all threads call it once these have arrived.
  const auto numbers_of = [&](Copied(&from)[kKeys][Shared::kCopiedStride]) -> const T(&)[kKeys][Shared::kStride] {
    if constexpr (kBytes) {
#pragma unroll 2
      for (int i = thread; i < kKeys * kSize / 16; i += kWarps * 32) {
        const int row = i / (kSize / 16), at = i % (kSize / 16) * 16;
        const float scale = given.head_scales == nullptr ? 1 : Shared::scale(from[row]);
        const uint4 bytes = *reinterpret_cast<const uint4*>(&from[row][at]);
        const uint2 first = to_numbers<T>(given.element, bytes.x, scale);
        const uint2 second = to_numbers<T>(given.element, bytes.y, scale);
        const uint2 third = to_numbers<T>(given.element, bytes.z, scale);
        const uint2 fourth = to_numbers<T>(given.element, bytes.w, scale);
        auto* to = reinterpret_cast<uint4*>(&shared.numbers[row][at]);
        to[0] = make_uint4(first.x, first.y, second.x, second.y);
        to[1] = make_uint4(third.x, third.y, fourth.x, fourth.y);
      }
      __syncthreads();
      return shared.numbers;
    } else {
      return from;
    }
  };

  for (int i = thread; i < kQueries * kWords; i += kWarps * 32) {
    const int row = i / kWords, word = i % kWords;
    const bool there = row < tile.count && word * 8 < size;
    const T* q = static_cast<const T*>(given.q) +
                 (static_cast<std::int64_t>(tile.first + (there ? row : 0)) * given.heads + head) * size;
    copy_async(&shared.q[row][word * 8], q + (there ? word * 8 : 0), there);
  }
  const int begin = from_key / kKeys * kKeys;
  find_block(begin);
  find_places(begin, 0);
  find_block(begin + kKeys);
  __syncthreads();
  copy_rows(shared.keys[0], 0, 0);
  copy_rows(shared.values[0], value_places, 0);

  const bool edits = edits_scores(given);
  const float scale = edits ? kLog2E : given.scale * kLog2E, slope = slope_of(given, head);
  float largest[kRowTiles][2], total[kRowTiles][2] = {}, sums[kRowTiles][kSize / 8][4] = {};
#pragma unroll
  for (auto& both : largest) both[0] = both[1] = -INFINITY;
  const int row0 = warp * kRowTiles * 16;
  for (int at = begin, buffer = 0; at <= last; at += kKeys, buffer ^= 1) {
    const bool more = at + kKeys <= last;
    if (more) {
      find_places(at + kKeys, buffer ^ 1);
      find_block(at + 2 * kKeys);
    }
    wait_for_copies<1>();
    __syncthreads();
    if (more)
      copy_rows(shared.keys[buffer ^ 1], 0, buffer ^ 1);
    else
      commit_copies();
    const auto& keys = numbers_of(shared.keys[buffer]);

    float scores[kRowTiles][kKeys / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kSize / 16; ++step) {
      std::uint32_t q[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
        load_matrices(q[i], &shared.q[row0 + i * 16 + lane % 16][step * 16 + lane / 16 * 8]);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        std::uint32_t key[4];
        load_matrices(key, &keys[n * 16 + lane / 16 * 8 + lane % 8][step * 16 + lane / 8 % 2 * 8]);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply<T>(scores[i][2 * n], q[i], key[0], key[1]);
          multiply<T>(scores[i][2 * n + 1], q[i], key[2], key[3]);
        }
      }
    }

    if (edits)
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            scores[i][n][e] = edited_score(given, scores[i][n][e], slope,
                                           at + n * 8 + quad * 2 + e % 2 - (first + row0 + i * 16 + e / 2 * 8 + group));
    if (at + kKeys - 1 > first || last - at >= given.window) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int position = first + row0 + i * 16 + e / 2 * 8 + group, key = at + n * 8 + quad * 2 + e % 2;
            if (key > position || key < position - given.window + 1) scores[i][n][e] = -INFINITY;
          }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float next = largest[i][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) next = fmaxf(next, scores[i][n][half * 2 + j]);
        next = fmaxf(next, __shfl_xor_sync(kAll, next, 1));
        next = fmaxf(next, __shfl_xor_sync(kAll, next, 2));
        const float base = next == -INFINITY ? 0 : next * scale;
        // One where a tile has nothing to see, so that it does not matter how many of those there are.
        const float kept = largest[i][half] == next ? 1 : exp2_fast(largest[i][half] * scale - base);
        largest[i][half] = next;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& score = scores[i][n][half * 2 + j];
            score = exp2_fast(fmaf(score, scale, -base));
            sum += score;
          }
        total[i][half] = total[i][half] * kept + sum;
        // Rescale only if the largest score of a row has changed, which soon becomes rare.
        if (__any_sync(kAll, kept != 1))
#pragma unroll
          for (int n = 0; n < kSize / 8; ++n) {
            sums[i][n][half * 2] *= kept;
            sums[i][n][half * 2 + 1] *= kept;
          }
      }

    wait_for_copies<1>();
    __syncthreads();
    if (more)
      copy_rows(shared.values[buffer ^ 1], value_places, buffer ^ 1);
    else
      commit_copies();
    const auto& values = numbers_of(shared.values[buffer]);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      std::uint32_t weights[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const auto& even = scores[i][2 * step];
        const auto& odd = scores[i][2 * step + 1];
        weights[i][0] = pair<T>(even[0], even[1]);
        weights[i][1] = pair<T>(even[2], even[3]);
        weights[i][2] = pair<T>(odd[0], odd[1]);
        weights[i][3] = pair<T>(odd[2], odd[3]);
      }
#pragma unroll
      for (int n = 0; n < kSize / 16; ++n) {
        std::uint32_t value[4];
        load_matrices_transposed(value, &values[step * 16 + lane / 8 % 2 * 8 + lane % 8][n * 16 + lane / 16 * 8]);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply<T>(sums[i][2 * n], weights[i], value[0], value[1]);
          multiply<T>(sums[i][2 * n + 1], weights[i], value[2], value[3]);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = total[i][half];
      all += __shfl_xor_sync(kAll, all, 1);
      all += __shfl_xor_sync(kAll, all, 2);
      const int row = row0 + i * 16 + half * 8 + group;
      if (row >= tile.count) continue;
      const float factor = given.value_scale / all;
      T* out = static_cast<T*>(given.out) + (static_cast<std::int64_t>(tile.first + row) * given.heads + head) * size;
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
        const int column = n * 8 + quad * 2;
        if (column < size)
          *reinterpret_cast<std::uint32_t*>(out + column) =
              pair<T>(sums[i][n][half * 2] * factor, sums[i][n][half * 2 + 1] * factor);
      }
    }
#endif
}

template <typename T, int kSize, int kRowTiles, bool kBytes>
static void run(const Runtime& runtime, const Attention& attention) {
  using Shared = PrefillingShared<T, kSize, kRowTiles, kBytes>;
  constexpr int kList = kRowTiles == 2 ? 0 : 1;
  static_assert(Shared::kQueries == kTileQueries[kList] && (kSize <= 128 || sizeof(Shared) <= kMostSharedMemory));
  const auto blocks = static_cast<unsigned>(attention.heads * attention.num_tiles[kList]);
  launch(runtime, prefilling_kernel<T, kSize, kRowTiles, kBytes>, blocks, kWarps * 32, sizeof(Shared), attention);
}

template <typename T, bool kBytes>
static void run_sized(const Runtime& runtime, const Attention& attention) {
  if (attention.width <= 64)
    run<T, 64, 2, kBytes>(runtime, attention);
  else if (attention.width > 128)
    run<T, kMostSize, 1, kBytes>(runtime, attention);
  else if (runtime.shared_memory() >= static_cast<int>(sizeof(PrefillingShared<T, 128, 2, kBytes>)))
    run<T, 128, 2, kBytes>(runtime, attention);
  else
    run<T, 128, 1, kBytes>(runtime, attention);
}

void attend_prefilling(const Runtime& runtime, const Attention& attention) {
  if (attention.quantized())
    attention.dtype == DType::float16 ? run_sized<f16, true>(runtime, attention)
                                      : run_sized<bf16, true>(runtime, attention);
  else
    attention.dtype == DType::float16 ? run_sized<f16, false>(runtime, attention)
                                      : run_sized<bf16, false>(runtime, attention);
}

}  // namespace vllmlite::cuda
