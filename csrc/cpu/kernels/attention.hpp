// Attention of a tile of queries over paged keys and values.
//
// A query meets its keys in chunks of kKeyChunk from position 0 on, with one running maximum a chunk. Keys that it must
// not see weigh exactly nothing, and a chunk of such keys changes nothing, so that a query's result is the same bits
// in every tile: alone in a decode step, or among others of a prompt.
#pragma once

#include "cpu/kernels/simd.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

inline constexpr int kKeyVectors = kKeyChunk / kLanes;
inline constexpr int kRowTile = kManyRegisters ? 4 : 2;

// ---- Keys of a block, by cache type: 16-bit ones are [head_dim / 2][block_size][2], float32 ones
// [head_dim][block_size].

struct F32Keys {
  using Values = F32;
  using Query = float;
  using Key = F;
  static constexpr int kDims = 1;
  static VLLMLITE_INLINE Key load(const std::byte* from) { return VLLMLITE_ISA::load<F>(from); }
  static VLLMLITE_INLINE F add(F acc, const Query* q, Key k) { return fma(set(*q), k, acc); }
};

template <typename T>
struct PairKeys {
  using Values = T;
  using Query = float;
  struct Key {
    F even, odd;
  };
  static constexpr int kDims = 2;
  static VLLMLITE_INLINE Key load(const std::byte* from) {
    const U pairs = VLLMLITE_ISA::load<U>(from);
    const H low = __builtin_convertvector(pairs & 0xffff, H), high = __builtin_convertvector(pairs >> 16, H);
    const F a = convert(low), b = convert(high);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return {b, a};
#else
    return {a, b};
#endif
  }
  static VLLMLITE_INLINE F add(F acc, const Query* q, Key k) {
    return fma(set(q[1]), k.odd, fma(set(q[0]), k.even, acc));
  }

 private:
  static VLLMLITE_INLINE F convert(H bits) {
    typename T::Item items[kLanes];
    VLLMLITE_ISA::store(items, bits);
    return T::load(items);
  }
};

#if defined(__AVX512BF16__)
struct DotKeys {
  using Values = BF16;
  using Query = std::uint16_t;
  using Key = __m512bh;
  static constexpr int kDims = 2;
  static VLLMLITE_INLINE Key load(const std::byte* from) { return (Key)_mm512_loadu_si512(from); }
  static VLLMLITE_INLINE F add(F acc, const Query* q, Key k) {
    std::int32_t pair;
    __builtin_memcpy(&pair, q, sizeof pair);
    return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), k);
  }
};
#endif

// ---- Where a chunk's keys and values lie

struct Chunk {
  const std::byte* keys[kKeyVectors];
  const std::byte* values[kKeyChunk];
};

template <typename C>
struct Reader {
  static constexpr int kItem = sizeof(typename C::Values::Item);

  const AttentionTile& tile;
  int padded;
  std::byte* gathered;

  std::ptrdiff_t key_stride() const {  // bytes from one group of dimensions to the next
    return std::ptrdiff_t{C::kDims} * kItem * (direct() ? tile.block_size : kKeyChunk);
  }

  bool direct() const { return tile.block_size % 16 == 0; }

  // Keys `first` to `last` of the chunk at `base`; places outside are given some readable address.
  void find(int base, int first, int last, Chunk& chunk) const {
    for (int j = first; j <= last;) {
      const int key = base + j, at = key % tile.block_size;
      const std::ptrdiff_t block = tile.table[key / tile.block_size] * tile.block_bytes;
      const int stop = smaller(last + 1, j + tile.block_size - at);
      for (int i = 0; j < stop; ++j, ++i)
        chunk.values[j] = tile.values + block + static_cast<std::ptrdiff_t>(at + i) * padded * kItem;
    }
    if (!direct()) return;
    for (int v = 0; v < kKeyVectors; ++v) {
      const int j = smaller(larger(v * kLanes, first / kLanes * kLanes), last / kLanes * kLanes), key = base + j;
      chunk.keys[v] = tile.keys + tile.table[key / tile.block_size] * tile.block_bytes +
                      static_cast<std::ptrdiff_t>(key % tile.block_size) * C::kDims * kItem;
    }
  }

  // Blocks whose size is no multiple of 16: keys are copied into the layout of a block of kKeyChunk.
  void gather(int base, int first, int last, Chunk& chunk) const {
    if (direct()) return;
    const int unit = C::kDims * kItem;
    for (int j = first; j <= last; ++j) {
      const int key = base + j;
      const std::byte* from = tile.keys + tile.table[key / tile.block_size] * tile.block_bytes +
                              static_cast<std::ptrdiff_t>(key % tile.block_size) * unit;
      for (int d = 0; d < padded / C::kDims; ++d)
        __builtin_memcpy(gathered + static_cast<std::ptrdiff_t>(d * kKeyChunk + j) * unit,
                         from + static_cast<std::ptrdiff_t>(d) * tile.block_size * unit, unit);
    }
    for (int v = 0; v < kKeyVectors; ++v) chunk.keys[v] = gathered + v * kLanes * unit;
  }
};

// Scores of N rows of queries with four vectors of keys.
template <typename C, int N>
VLLMLITE_INLINE void scores(const typename C::Query* q, int padded, const std::byte* const* keys,
                            const std::byte* const* ahead, std::ptrdiff_t stride, float factor, float* out) {
  F acc[N][4] = {};
  for (int d = 0; d < padded / C::kDims; ++d) {
    typename C::Key k[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      k[v] = C::load(keys[v] + d * stride);
      if (ahead != nullptr) prefetch(ahead[v] + d * stride);
    }
#pragma GCC unroll 4
    for (int row = 0; row < N; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[row][v] = C::add(acc[row][v], q + row * padded + d * C::kDims, k[v]);
  }
#pragma GCC unroll 4
  for (int row = 0; row < N; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) store(out + row * kKeyChunk + v * kLanes, acc[row][v] * factor);
}

// Turns a row's scores into weights; the keys that count are `first` to `last`. Returns the factor of what was before.
VLLMLITE_INLINE float weigh(float* s, int first, int last, float& maximum, float* lane_sums) {
  F v[kKeyVectors];
  F top = set(maximum);
  const bool all = first <= 0 && last >= kKeyChunk - 1;
  I lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int i = 0; i < kKeyVectors; ++i) {
    v[i] = load<F>(s + i * kLanes);
    if (!all) {
      const I place = lane + i * kLanes;
      v[i] = ((place >= first) & (place <= last)) ? v[i] : set(-__builtin_inff());
    }
    top = max(top, v[i]);
  }
  const float now = largest(top);
  const float base = now == -__builtin_inff() ? 0.0F : now;
  const float before = exp2(set(maximum - base))[0];
  F total = load<F>(lane_sums) * before;
  for (int i = 0; i < kKeyVectors; ++i) {
    const F w = exp2(v[i] - base);
    store(s + i * kLanes, w);
    total += w;
  }
  store(lane_sums, total);
  maximum = now;
  return before;
}

// out = out * factor + weights x values, for N rows and W vectors of a head.
template <typename V, int N, int W>
VLLMLITE_INLINE void add_values(const float* weights, const float* factors, const Chunk& chunk, const Chunk* ahead,
                                int first, int last, int at, float* out, int padded) {
  using Item = typename V::Item;
  F acc[N][W];
#pragma GCC unroll 4
  for (int row = 0; row < N; ++row)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) acc[row][w] = load<F>(out + row * padded + at + w * kLanes) * factors[row];
  for (int j = first; j <= last; ++j) {
    const Item* value = reinterpret_cast<const Item*>(chunk.values[j]) + at;
    if (ahead != nullptr) {
      const Item* next = reinterpret_cast<const Item*>(ahead->values[j]) + at;
      for (int byte = 0; byte < W * kLanes * static_cast<int>(sizeof(Item)); byte += 64)
        prefetch(reinterpret_cast<const char*>(next) + byte);
    }
    F v[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) v[w] = V::load(value + w * kLanes);
#pragma GCC unroll 4
    for (int row = 0; row < N; ++row)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[row][w] = fma(set(weights[row * kKeyChunk + j]), v[w], acc[row][w]);
  }
#pragma GCC unroll 4
  for (int row = 0; row < N; ++row)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(out + row * padded + at + w * kLanes, acc[row][w]);
}

template <typename V, int N>
VLLMLITE_INLINE void add_all_values(const float* weights, const float* factors, const Chunk& chunk, const Chunk* ahead,
                                    int first, int last, float* out, int padded) {
  int at = 0;
  for (; at + 4 * kLanes <= padded; at += 4 * kLanes)
    add_values<V, N, 4>(weights, factors, chunk, ahead, first, last, at, out, padded);
  for (; at < padded; at += kLanes) add_values<V, N, 1>(weights, factors, chunk, ahead, first, last, at, out, padded);
}

template <typename C>
void attention(const AttentionTile& tile) {
  using Query = typename C::Query;
  const int rows = tile.queries * tile.group, padded = padded_head(tile.head_dim);
  std::byte* scratch = tile.scratch;
  const auto take = [&](std::size_t floats) {
    auto* taken = reinterpret_cast<float*>(scratch);
    scratch += floats * sizeof(float);
    return taken;
  };
  auto* q = reinterpret_cast<Query*>(take(static_cast<std::size_t>(kAttentionRows) * padded));
  float* out = take(static_cast<std::size_t>(kAttentionRows) * padded);
  float* score = take(kAttentionRows * kKeyChunk);
  float* lane_sums = take(kAttentionRows * 16);
  float* maxima = take(kAttentionRows);
  float* factors = take(kAttentionRows);

  for (int row = 0; row < rows; ++row) {
    const float* from = tile.q + row / tile.group * tile.q_stride + row % tile.group * tile.head_dim;
    Query* to = q + row * padded;
    int d = 0;
    if constexpr (sizeof(Query) == 2) {
      for (; d + kLanes <= tile.head_dim; d += kLanes)
        BF16::store(reinterpret_cast<std::uint16_t*>(to) + d, load<F>(from + d));
      if (d < tile.head_dim)
        BF16::store(reinterpret_cast<std::uint16_t*>(to) + d, load_some<F>(from + d, tile.head_dim - d));
    } else {
      for (; d < tile.head_dim; ++d) to[d] = from[d];
      for (; d < padded; ++d) to[d] = 0;
    }
    for (int i = 0; i < padded; ++i) out[row * padded + i] = 0;
    for (int i = 0; i < kLanes; ++i) lane_sums[row * 16 + i] = 0;
    maxima[row] = -__builtin_inff();
  }

  const Reader<C> reader{tile, padded, scratch};
  const int last = tile.position + tile.queries - 1;
  const int first = tile.window > tile.position ? 0 : tile.position - tile.window + 1;
  const std::ptrdiff_t stride = reader.key_stride();
  const float factor = tile.scale * kLog2E;
  Chunk chunks[2];
  int base = first / kKeyChunk * kKeyChunk, current = 0;
  reader.find(base, larger(first - base, 0), smaller(last - base, kKeyChunk - 1), chunks[0]);
  for (; base <= last; base += kKeyChunk, current ^= 1) {
    Chunk& chunk = chunks[current];
    Chunk* ahead = nullptr;
    const int low = larger(first - base, 0), high = smaller(last - base, kKeyChunk - 1);
    if (base + 2 * kKeyChunk <= last + 1) {
      ahead = &chunks[current ^ 1];
      reader.find(base + kKeyChunk, 0, kKeyChunk - 1, *ahead);
    } else if (base + kKeyChunk <= last) {
      reader.find(base + kKeyChunk, 0, last - base - kKeyChunk, chunks[current ^ 1]);
    }
    reader.gather(base, low, high, chunk);
    const std::byte* const* keys_ahead = ahead != nullptr && reader.direct() ? ahead->keys : nullptr;

    for (int v = 0; v < kKeyVectors; v += 4) {
      int row = 0;
      const std::byte* const* next = keys_ahead == nullptr ? nullptr : keys_ahead + v;
      for (; row + kRowTile <= rows; row += kRowTile, next = nullptr)
        scores<C, kRowTile>(q + row * padded, padded, chunk.keys + v, next, stride, factor,
                            score + row * kKeyChunk + v * kLanes);
      for (; row < rows; ++row, next = nullptr)
        scores<C, 1>(q + row * padded, padded, chunk.keys + v, next, stride, factor,
                     score + row * kKeyChunk + v * kLanes);
    }
    for (int row = 0; row < rows; ++row) {
      const int position = tile.position + row / tile.group;
      const int from = tile.window > position ? 0 : position - tile.window + 1;
      factors[row] = weigh(score + row * kKeyChunk, from - base, position - base, maxima[row], lane_sums + row * 16);
    }
    int row = 0;
    const Chunk* next = ahead;
    for (; row + kRowTile <= rows; row += kRowTile, next = nullptr)
      add_all_values<typename C::Values, kRowTile>(score + row * kKeyChunk, factors + row, chunk, next, low, high,
                                                   out + row * padded, padded);
    for (; row < rows; ++row, next = nullptr)
      add_all_values<typename C::Values, 1>(score + row * kKeyChunk, factors + row, chunk, next, low, high,
                                            out + row * padded, padded);
  }

  for (int row = 0; row < rows; ++row) {
    const float inverse = 1.0F / sum(load<F>(lane_sums + row * 16));
    const float* from = out + row * padded;
    const std::ptrdiff_t at = row / tile.group * tile.out_stride + row % tile.group * tile.head_dim;
    with_type(tile.out_type, [&](auto type) {
      using T = decltype(type);
      auto* to = static_cast<typename T::Item*>(tile.out) + at;
      int d = 0;
      for (; d + kLanes <= tile.head_dim; d += kLanes) T::store(to + d, load<F>(from + d) * inverse);
      if (d < tile.head_dim) store_some<T>(to + d, load<F>(from + d) * inverse, tile.head_dim - d);
    });
  }
}

}  // namespace vllmlite::cpu::VLLMLITE_ISA
