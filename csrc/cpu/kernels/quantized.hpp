// Products of quantised activations with quantised weights.
//
// A group is kGroup elements along k, with one or two scales. The integers that share a scale are multiplied and added
// exactly. These sums, each followed by its group's offset, are added in float32 in ascending order of groups. So a
// row's result depends neither on the rows beside it nor on the instruction set's lanes.
#pragma once

#include "cpu/kernels/simd.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

inline constexpr int kQuads = kGroup / 4;

// ---- Dot products of four bytes per lane: acc + sum of (w - kOffset) * x, with w unsigned and x signed

#if defined(__AVX512VNNI__)
struct Dot {
  using W = __m512i;
  using X = __m512i;
  static constexpr int kOffset = 0;
  static VLLMLITE_INLINE W widen(U bytes) { return (__m512i)bytes; }
  static VLLMLITE_INLINE X spread(std::int32_t quad) { return _mm512_set1_epi32(quad); }
  static VLLMLITE_INLINE I add(I acc, W w, X x) { return (I)_mm512_dpbusd_epi32((__m512i)acc, w, x); }
};
#elif defined(__SSE2__)
// Even and odd bytes are widened to 16 bits separately; their products are added in pairs.
struct Dot {
  typedef std::int16_t S __attribute__((vector_size(kLanes * 4)));
  typedef std::uint16_t Z __attribute__((vector_size(kLanes * 4)));
  struct W {
    S even, odd;
  };
  using X = W;
  static constexpr int kOffset = 0;
  static VLLMLITE_INLINE W widen(U bytes) { return {(S)(bytes & 0x00ff00ff), (S)((Z)bytes >> 8)}; }
  static VLLMLITE_INLINE X spread(std::int32_t quad) {
    const S both = (S)(I{} + quad);
    return {(both << 8) >> 8, both >> 8};
  }
  static VLLMLITE_INLINE I add(I acc, W w, X x) { return acc + (pairs(w.even, x.even) + pairs(w.odd, x.odd)); }

 private:
  static VLLMLITE_INLINE I pairs(S a, S b) {
#if defined(__AVX512BW__)
    return (I)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (I)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return (I)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
  }
};
#elif defined(__aarch64__)
struct Dot {
  using W = int8x16_t;
  using X = int8x16_t;
  static constexpr int kOffset = 128;
  static VLLMLITE_INLINE W widen(U bytes) { return (int8x16_t)(bytes ^ 0x80808080); }
  static VLLMLITE_INLINE X spread(std::int32_t quad) { return (int8x16_t)(I{} + quad); }
  static VLLMLITE_INLINE I add(I acc, W w, X x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return (I)vdotq_s32((int32x4_t)acc, w, x);
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(w, x));
    return acc + (I)vpaddq_s32(low, high);
#endif
  }
};
#else
struct Dot {
  using W = U;
  struct X {
    std::int32_t bytes[4];
  };
  static constexpr int kOffset = 0;
  static VLLMLITE_INLINE W widen(U bytes) { return bytes; }
  static VLLMLITE_INLINE X spread(std::int32_t quad) {
    std::int8_t bytes[4];
    __builtin_memcpy(bytes, &quad, 4);
    return {{bytes[0], bytes[1], bytes[2], bytes[3]}};
  }
  static VLLMLITE_INLINE I add(I acc, W w, X x) {
    for (int i = 0; i < 4; ++i) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
      const U byte = (w >> (24 - 8 * i)) & 0xff;
#else
      const U byte = (w >> (8 * i)) & 0xff;
#endif
      acc += (I)byte * x.bytes[i];
    }
    return acc;
  }
};
#endif

// ---- The quantised values of a tile's group, as unsigned bytes: vectors of quads (four values of a row)

inline constexpr int kQuadBytes = 4 * kTileRows;

// Loads one quad, or two consecutive ones whose lowest four bits share bytes.
template <int kBits>
struct Quads {
  static constexpr int kLoaded = kBits == 8 ? 1 : 2;

  static VLLMLITE_INLINE void load(const std::uint8_t* group, int quad, U* quads) {
    const U both = VLLMLITE_ISA::load<U>(group + quad / kLoaded * kQuadBytes);
    if constexpr (kBits == 8) {
      quads[0] = both;
    } else {
      quads[0] = both & 0x0f0f0f0f;
      quads[1] = (both >> 4) & 0x0f0f0f0f;
    }
    if constexpr (kBits == 5 || kBits == 6) {
      constexpr int kHigh = kBits - 4, kEach = 8 / kHigh;  // bits, and quads in a byte
      constexpr std::uint32_t kMask = ((1U << kHigh) - 1) * 0x10101010U;
#pragma GCC unroll 2
      for (int i = 0; i < kLoaded; ++i) {
        const U high = VLLMLITE_ISA::load<U>(group + (kQuads / 2 + (quad + i) / kEach) * kQuadBytes);
        const int at = (quad + i) % kEach * kHigh;
        quads[i] |= (at < 4 ? high << (4 - at) : high >> (at - 4)) & kMask;
      }
    }
  }
};

// ---- Scales and offsets of kLanes rows of a tile

template <TileScheme S, bool kGrouped = layout_of(S).grouped>
struct Scaling {
  static constexpr TileLayout kLayout = layout_of(S);
  const std::uint16_t* floats;
  const std::int8_t* sub_scales;

  // Starts at row `lane` of a tile.
  VLLMLITE_INLINE void begin(const QuantizedTiles& w, std::ptrdiff_t tile, int lane, int groups) {
    floats = static_cast<const std::uint16_t*>(w.scales) + tile * kLayout.units(groups) * kLayout.unit_floats() + lane;
    if (kLayout.sub_scales) sub_scales = w.sub_scales + tile * groups * kLayout.group_sub_scales() + lane;
  }

  // To be called before a group is multiplied.
  VLLMLITE_INLINE void enter(int /*group*/) {}
  // Returns the initial value of a sum of products, given the sum of x.
  VLLMLITE_INLINE I start(std::int32_t total) const { return I{} + total * (Dot::kOffset - kLayout.zero); }
  VLLMLITE_INLINE F float_at(int group, int index) const {
    const std::uint16_t* at = floats + (kLayout.sub_scales ? group / kUnitGroups : group) * kLayout.unit_floats();
    if constexpr (kLayout.bf16)
      return BF16::load(at + index * kTileRows);
    else
      return F16::load(at + index * kTileRows);
  }
  VLLMLITE_INLINE F sub_scale_at(int group, int index) const {
    return from_i8(sub_scales + group * kLayout.group_sub_scales() + index * kTileRows);
  }
  VLLMLITE_INLINE F scale(int group, int part) const {
    if constexpr (kLayout.sub_scales) return float_at(group, 0) * sub_scale_at(group, part);
    return float_at(group, 0);
  }
  VLLMLITE_INLINE F offset(int group) const {
    if constexpr (kLayout.sub_scales) return float_at(group, 1) * sub_scale_at(group, kLayout.scales_per_group());
    return float_at(group, 1);
  }
};

// The scales and zeros of a grouped scheme, each of which several groups share; groups are entered in ascending order.
template <TileScheme S>
struct Scaling<S, true> {
  const std::byte* scales;
  const std::uint8_t* zeros;
  Float type;
  int groups_per_scale, next;  // the first group of the next scale
  F current_scale = {};
  I current_zero = {};

  VLLMLITE_INLINE void begin(const QuantizedTiles& w, std::ptrdiff_t tile, int lane, int groups) {
    type = w.scale_type;
    groups_per_scale = w.groups_per_scale;
    next = 0;
    const std::ptrdiff_t first = tile * ((groups + groups_per_scale - 1) / groups_per_scale) * kTileRows + lane;
    scales = static_cast<const std::byte*>(w.scales) + first * (type == Float::f32 ? 4 : 2);
    zeros = w.zeros + first;
  }

  VLLMLITE_INLINE void enter(int group) {
    typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));
    if (group < next) return;
    with_type(type, [&](auto item) {
      using T = decltype(item);
      current_scale = T::load(reinterpret_cast<const typename T::Item*>(scales));
      scales += kTileRows * sizeof(typename T::Item);
    });
    current_zero = __builtin_convertvector(load<Bytes>(zeros), I);
    zeros += kTileRows;
    next += groups_per_scale;
  }
  VLLMLITE_INLINE I start(std::int32_t total) const { return (Dot::kOffset - current_zero) * total; }
  VLLMLITE_INLINE F scale(int /*group*/, int /*part*/) const { return current_scale; }
};

// ---- The product

// Columns in a register tile of m rows of x. A column is a vector of y: kLanes rows of a tile of w.
constexpr int columns_of(int m) { return kManyRegisters ? 3 : m == 1 ? 4 : 2; }
inline constexpr int kMaxRows = kManyRegisters ? 8 : 2;  // of x in a pass

// One of the passes over a block's rows of w; each prefetches its part of the next block.
struct PassOf {
  int index, count;
};

// Loads a vector of which the first `count` elements exist; all of them if `count` is larger.
VLLMLITE_INLINE F load_up_to(const float* from, int count) {
  return count >= kLanes ? load<F>(from) : load_some<F>(from, count);
}

// Adds the products of M rows of x with quads of V columns to acc, from the quad `first` to before `last` of the group
// g.
template <int kBits, int M, int V>
VLLMLITE_INLINE void add_quads(const std::uint8_t* const* qweight, const std::int8_t* x, std::ptrdiff_t x_stride, int g,
                               int first, int last, I (*acc)[V]) {
  using Stored = Quads<kBits>;
  constexpr std::ptrdiff_t kGroupBytes = kGroup * kTileRows * kBits / 8;
#pragma GCC unroll 8
  for (int quad = first; quad < last; quad += Stored::kLoaded) {
    typename Dot::W w[Stored::kLoaded][V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      U quads[Stored::kLoaded];
      Stored::load(qweight[v] + g * kGroupBytes, quad, quads);
#pragma GCC unroll 2
      for (int i = 0; i < Stored::kLoaded; ++i) w[i][v] = Dot::widen(quads[i]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < Stored::kLoaded; ++i) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        std::int32_t bytes;
        __builtin_memcpy(&bytes, x + m * x_stride + g * kGroup + (quad + i) * 4, 4);
        const typename Dot::X spread = Dot::spread(bytes);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[m][v] = Dot::add(acc[m][v], w[i][v], spread);
      }
    }
  }
}

// Multiplies M rows of x by V columns.
template <TileScheme S, int M, int V>
VLLMLITE_INLINE void column_tile(const QuantizedBlock& b, int row, int column, PassOf pass) {
  constexpr int kParts = kTileRows / kLanes;
  constexpr TileLayout kLayout = layout_of(S);
  constexpr int kScales = kLayout.scales_per_group(), kScaledQuads = kQuads / kScales;
  const std::uint8_t* qweight[V];
  for (int v = 0; v < V; ++v)
    qweight[v] = b.w.qweight + static_cast<std::ptrdiff_t>((column + v) / kParts) * b.groups * kLayout.group_bytes() +
                 (column + v) % kParts * kLanes * 4;
  const std::ptrdiff_t x_stride = static_cast<std::ptrdiff_t>(b.groups) * kGroup;
  const std::ptrdiff_t first = static_cast<std::ptrdiff_t>(row) * b.groups;  // of x's groups
  const std::int8_t* x = b.x.values + row * x_stride;
  // Always inline: out of line, it costs products in int8 6 % of their time.
  const auto prefetch_next = [&](int g) __attribute__((always_inline)) {
    if (b.next == nullptr || g % pass.count != pass.index) return;
    for (int v = 0; v < V; ++v)
      if ((column + v) % kParts == 0)
        for (int byte = 0; byte < kLayout.group_bytes(); byte += 64)
          prefetch(b.next + (qweight[v] - b.w.qweight) + g * kLayout.group_bytes() + byte);
  };
  F sums[M][V] = {};
  if constexpr (kLayout.row_scales) {
    const RowScales* const rows = b.w.row_scales;
    I acc[M][V];
    for (int v = 0; v < V; ++v) {
      const int lane = (column + v) % kParts * kLanes;
      const I zeros = load<I>(rows[(column + v) / kParts].zero + lane) + (kLayout.zero - Dot::kOffset);
      for (int m = 0; m < M; ++m) acc[m][v] = -(zeros * b.x.sums[first + m * b.groups]);
    }
    for (int g = 0; g < b.groups; ++g) {
      prefetch_next(g);
      add_quads<kLayout.bits, M, V>(qweight, x, x_stride, g, 0, kQuads, acc);
    }
    for (int v = 0; v < V; ++v) {
      const RowScales& tile = rows[(column + v) / kParts];
      const int lane = (column + v) % kParts * kLanes;
      const I row_sums = load<I>(tile.sum + lane);
      const F scale = load<F>(tile.scale + lane);
      for (int m = 0; m < M; ++m)
        sums[m][v] = __builtin_convertvector(acc[m][v] - row_sums * b.x.zeros[row + m], F) *
                     (scale * b.x.scales[first + m * b.groups]);
    }
  } else {
    Scaling<S> scaling[V];
    for (int v = 0; v < V; ++v) scaling[v].begin(b.w, (column + v) / kParts, (column + v) % kParts * kLanes, b.groups);
    for (int g = 0; g < b.groups; ++g) {
      prefetch_next(g);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) scaling[v].enter(g);
#pragma GCC unroll 2
      for (int part = 0; part < kScales; ++part) {
        I acc[M][V];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const std::ptrdiff_t at = first + m * b.groups + g;
          std::int32_t total = kScales == 1 ? b.x.sums[at] : b.x.half_sums[at];
          if (part == 1) total = b.x.sums[at] - total;
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[m][v] = scaling[v].start(total);
        }
        add_quads<kLayout.bits, M, V>(qweight, x, x_stride, g, part * kScaledQuads, (part + 1) * kScaledQuads, acc);
        F scale[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) scale[v] = scaling[v].scale(g, part);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const float x_scale = b.x.scales[first + m * b.groups + g];
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v)
            sums[m][v] = fma(__builtin_convertvector(acc[m][v], F), scale[v] * x_scale, sums[m][v]);
        }
      }
      if constexpr (kLayout.offsets) {
        F offset[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) offset[v] = scaling[v].offset(g);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const F total = set(b.x.scaled_sums[first + m * b.groups + g]);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) sums[m][v] = fma(offset[v], total, sums[m][v]);
        }
      }
    }
  }
  float* y = b.y + row * b.y_stride + column * kLanes;
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      const int count = b.n - (column + v) * kLanes;
      F sum = sums[m][v];
      if (b.bias != nullptr) sum += load_up_to(b.bias + (column + v) * kLanes, count);
      if (count >= kLanes)
        store(y + m * b.y_stride + v * kLanes, sum);
      else
        store_some<F32>(y + m * b.y_stride + v * kLanes, sum, count);
    }
}

template <TileScheme S, int M>
void column_pass(const QuantizedBlock& b, int row, PassOf pass) {
  const int columns = (b.n + kLanes - 1) / kLanes;
  int column = 0;
  for (; column + columns_of(M) <= columns; column += columns_of(M))
    column_tile<S, M, columns_of(M)>(b, row, column, pass);
  for (; column < columns; ++column) column_tile<S, M, 1>(b, row, column, pass);
}

template <TileScheme S>
void quantized(const QuantizedBlock& b) {
  using Pass = decltype(&column_pass<S, 1>);
  static constexpr Pass kPasses[] = {
      nullptr,           column_pass<S, 1>, column_pass<S, 2>,
#if defined(__AVX512F__) || defined(__aarch64__)
      column_pass<S, 3>, column_pass<S, 4>, column_pass<S, 5>, column_pass<S, 6>, column_pass<S, 7>, column_pass<S, 8>,
#endif
  };
  const int passes = (b.m + kMaxRows - 1) / kMaxRows;
  PassOf pass{0, passes};
  for (int row = 0; pass.index < passes; ++pass.index) {
    const int rows = (b.m - row + passes - pass.index - 1) / (passes - pass.index);
    kPasses[rows](b, row, pass);
    row += rows;
  }
}

}  // namespace vllmlite::cpu::VLLMLITE_ISA
