// Attention of a tile of queries over paged keys and values, by online softmax.
//
// A query processes its keys in chunks of kKeyChunk, counted from position 0, and updates the running maximum once for
// each chunk. Masked keys have a weight of exactly 0, and a chunk of masked keys changes nothing, so that a query's
// result has the same bits in every tile: alone in a decode step, or with others of a prompt.
#pragma once

#include "cpu/kernels/cache.hpp"
#include "cpu/kernels/simd.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

inline constexpr int kKeyVectors = kKeyChunk / kLanes;
inline constexpr int kRowTile = kManyRegisters ? 4 : 2;

// ---- Keys of a block, by cache type: [head_dim / kDims][block_size][kDims], where kDims elements fill four bytes.
// These are multiplied in kSteps steps; part() extracts the dimensions of a step. After the bytes of a block
// come its head scales.

#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
inline constexpr bool kBigEndian = true;
#else
inline constexpr bool kBigEndian = false;
#endif

struct AnyKeys {
  using Query = float;
  static constexpr bool kScaled = false;
  static constexpr float kUnit = 1;  // factor by which part() has to be multiplied
  static VLLMLITE_INLINE F add(F acc, const Query* q, F k) { return fma(set(*q), k, acc); }
};

struct F32Keys : AnyKeys {
  using Values = F32;
  using Key = F;
  static constexpr int kDims = 1, kSteps = 1;
  static VLLMLITE_INLINE Key load(const std::byte* from) { return VLLMLITE_ISA::load<F>(from); }
  static VLLMLITE_INLINE F part(Key k, int) { return k; }
};

template <typename T>
struct PairKeys : AnyKeys {
  using Values = T;
  using Key = U;
  static constexpr int kDims = 2, kSteps = 2;
  static VLLMLITE_INLINE Key load(const std::byte* from) { return VLLMLITE_ISA::load<U>(from); }
  static VLLMLITE_INLINE F part(Key k, int step) {
    typename T::Item items[kLanes];
    VLLMLITE_ISA::store(items, __builtin_convertvector((step == 0) == kBigEndian ? k >> 16 : k & 0xffff, H));
    return T::load(items);
  }
};

// Bytes of a quantised cache; each part is one of the four bytes.
template <typename Format>
struct ByteKeys : AnyKeys {
  struct Values {
    using Item = std::int8_t;
    static VLLMLITE_INLINE F load(const Item* from) { return Format::decode(from); }
  };
  using Key = U;
  static constexpr int kDims = 4, kSteps = 4;
  static constexpr bool kScaled = true;
  static constexpr float kUnit = Format::kUnit;
  static VLLMLITE_INLINE Key load(const std::byte* from) { return VLLMLITE_ISA::load<U>(from); }
  static VLLMLITE_INLINE F part(Key k, int step) {
    return Format::decode_top(k << (kBigEndian ? step : 3 - step) * 8 & 0xff000000);
  }
};

#if defined(__AVX512BF16__)
struct DotKeys : AnyKeys {
  using Values = BF16;
  using Query = std::uint16_t;
  using Key = __m512bh;
  static constexpr int kDims = 2, kSteps = 1;
  static VLLMLITE_INLINE Key load(const std::byte* from) { return (Key)_mm512_loadu_si512(from); }
  static VLLMLITE_INLINE Key part(Key k, int) { return k; }
  static VLLMLITE_INLINE F add(F acc, const Query* q, Key k) {
    std::int32_t pair;
    __builtin_memcpy(&pair, q, sizeof pair);
    return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), k);
  }
};
#endif

// ---- Addresses of a chunk's keys and values

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

  // Calls `body` for each run of keys of the chunk at `base`, from `first` to `last`, that are in one block. It is
  // passed the run's first key, the offset of the block in the pool, the key's place in the block, and the run's
  // length.
  template <typename Body>
  VLLMLITE_INLINE void each_run(int base, int first, int last, Body body) const {
    for (int j = first, count; j <= last; j += count) {
      const int key = base + j, at = key % tile.block_size;
      count = smaller(last + 1 - j, tile.block_size - at);
      body(j, tile.table[key / tile.block_size] * tile.block_stride, at, count);
    }
  }

  std::ptrdiff_t scale_at(std::ptrdiff_t block, int at) const {
    return block + static_cast<std::ptrdiff_t>(tile.block_size) * padded * kItem + at * 4;
  }

  // Finds keys and values `first` to `last` of the chunk at `base`; other vectors get the address of one of these.
  void find(int base, int first, int last, Chunk& chunk) const {
    each_run(base, first, last, [&](int j, std::ptrdiff_t block, int at, int count) {
      for (int i = 0; i < count; ++i)
        chunk.values[j + i] = tile.values + block + static_cast<std::ptrdiff_t>(at + i) * padded * kItem;
      if (C::kScaled && tile.head_scales) {
        for (int i = 0; i < count; i += 16) {
          prefetch(tile.keys + scale_at(block, at + i));
          prefetch(tile.values + scale_at(block, at + i));
        }
      }
    });
    if (!direct()) return;
    for (int v = 0; v < kKeyVectors; ++v) {
      const int j = smaller(larger(v * kLanes, first / kLanes * kLanes), last / kLanes * kLanes), key = base + j;
      chunk.keys[v] = tile.keys + tile.table[key / tile.block_size] * tile.block_stride +
                      static_cast<std::ptrdiff_t>(key % tile.block_size) * C::kDims * kItem;
    }
  }

  // If the block size is not a multiple of 16, copies the keys into the layout of a block of kKeyChunk keys.
  void gather(int base, int first, int last, Chunk& chunk) const {
    if (direct()) return;
    const int unit = C::kDims * kItem;
    for (int j = first; j <= last; ++j) {
      const int key = base + j;
      const std::byte* from = tile.keys + tile.table[key / tile.block_size] * tile.block_stride +
                              static_cast<std::ptrdiff_t>(key % tile.block_size) * unit;
      for (int d = 0; d < padded / C::kDims; ++d)
        __builtin_memcpy(gathered + static_cast<std::ptrdiff_t>(d * kKeyChunk + j) * unit,
                         from + static_cast<std::ptrdiff_t>(d) * tile.block_size * unit, unit);
    }
    for (int v = 0; v < kKeyVectors; ++v) chunk.keys[v] = gathered + v * kLanes * unit;
  }

  // Copies the scales of keys and values `first` to `last`: their own, or those of the layer.
  void copy_scales(int base, int first, int last, float* of_keys, float* of_values) const {
    if (!tile.head_scales) {
      for (int j = first; j <= last; ++j) {
        of_keys[j] = tile.key_scale;
        of_values[j] = tile.value_scale;
      }
      return;
    }
    each_run(base, first, last, [&](int j, std::ptrdiff_t block, int at, int count) {
      __builtin_memcpy(of_keys + j, tile.keys + scale_at(block, at), static_cast<std::size_t>(count) * 4);
      __builtin_memcpy(of_values + j, tile.values + scale_at(block, at), static_cast<std::size_t>(count) * 4);
    });
  }
};

// Computes the scores of N rows of queries with four vectors of keys.
template <typename C, int N>
VLLMLITE_INLINE void scores(const typename C::Query* q, int padded, const std::byte* const* keys,
                            const std::byte* const* ahead, std::ptrdiff_t stride, float factor, const float* scales,
                            float* out) {
  F acc[N][4] = {};
  for (int d = 0; d < padded / C::kDims; ++d) {
    typename C::Key k[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      k[v] = C::load(keys[v] + d * stride);
      if (ahead != nullptr) prefetch(ahead[v] + d * stride);
    }
#pragma GCC unroll 4
    for (int step = 0; step < C::kSteps; ++step) {
      decltype(C::part(k[0], 0)) part[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) part[v] = C::part(k[v], step);
#pragma GCC unroll 4
      for (int row = 0; row < N; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
          acc[row][v] = C::add(acc[row][v], q + row * padded + d * C::kDims + step * (C::kDims / C::kSteps), part[v]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < N; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      F score = acc[row][v] * factor;
      if constexpr (C::kScaled) score *= load<F>(scales + v * kLanes);
      store(out + row * kKeyChunk + v * kLanes, score);
    }
  }
}

// Applies the soft cap and the ALiBi slope to a row's scores, which are base-2 logarithms. The first key is `distance`
// positions before the query.
VLLMLITE_INLINE void edit_scores(float* s, float soft_cap, float slope, int distance) {
  I lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int i = 0; i < kKeyVectors; ++i) {
    F v = load<F>(s + i * kLanes);
    if (soft_cap != 0) v = capped(v, soft_cap);
    store(s + i * kLanes, v + slope * __builtin_convertvector(lane + (i * kLanes - distance), F));
  }
}

// Turns a row's scores into softmax weights, multiplied by the scales of the values in an int8 cache; only keys `first`
// to `last` are not masked. Returns the factor by which the results of the chunks before must be multiplied.
template <bool kScaled>
VLLMLITE_INLINE float weigh(float* s, int first, int last, const float* scales, float& maximum, float* lane_sums) {
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
    if constexpr (kScaled)
      store(s + i * kLanes, w * load<F>(scales + i * kLanes));
    else
      store(s + i * kLanes, w);
    total += w;
  }
  store(lane_sums, total);
  maximum = now;
  return before;
}

// out = out * factor + weights * values, for N rows and W vectors of a head.
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

// Calls body.operator()<N>(row) for all rows of queries, N at a time, and with a smaller number for those left over.
template <int N, typename Body>
VLLMLITE_INLINE void each_rows(int rows, Body body, int row = 0) {
  for (; row + N <= rows; row += N) body.template operator()<N>(row);
  if constexpr (N > 1) each_rows<N - 1>(rows, body, row);
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
    if (tile.sinks != nullptr) {  // a key that has been seen already, of weight 1
      maxima[row] = tile.sinks[row % tile.group] * kLog2E;
      lane_sums[row * 16] = 1;
    }
  }

  const Reader<C> reader{tile, padded, scratch};
  const int last = tile.position + tile.queries - 1;
  const int first = tile.window > tile.position ? 0 : tile.position - tile.window + 1;
  const std::ptrdiff_t stride = reader.key_stride();
  const float factor = tile.scale * kLog2E * C::kUnit;
  const bool edited = tile.soft_cap != 0 || tile.slopes != nullptr;
  float key_scales[kKeyChunk] = {}, value_scales[kKeyChunk] = {};
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
    if constexpr (C::kScaled) reader.copy_scales(base, low, high, key_scales, value_scales);
    const std::byte* const* keys_ahead = ahead != nullptr && reader.direct() ? ahead->keys : nullptr;

    for (int v = 0; v < kKeyVectors; v += 4) {
      const std::byte* const* next = keys_ahead == nullptr ? nullptr : keys_ahead + v;
      each_rows<kRowTile>(rows, [&]<int N>(int row) {
        scores<C, N>(q + row * padded, padded, chunk.keys + v, row == 0 ? next : nullptr, stride, factor,
                     key_scales + v * kLanes, score + row * kKeyChunk + v * kLanes);
      });
    }
    for (int row = 0; row < rows; ++row) {
      const int position = tile.position + row / tile.group;
      const int from = tile.window > position ? 0 : position - tile.window + 1;
      if (edited)
        edit_scores(score + row * kKeyChunk, tile.soft_cap * kLog2E,
                    tile.slopes == nullptr ? 0 : tile.slopes[row % tile.group] * kLog2E, position - base);
      factors[row] = weigh<C::kScaled>(score + row * kKeyChunk, from - base, position - base, value_scales, maxima[row],
                                       lane_sums + row * 16);
    }
    each_rows<kRowTile>(rows, [&]<int N>(int row) {
      add_all_values<typename C::Values, N>(score + row * kKeyChunk, factors + row, chunk, row == 0 ? ahead : nullptr,
                                            low, high, out + row * padded, padded);
    });
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
