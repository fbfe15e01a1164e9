// Products with grouped integer or 8-bit float (e4m3) weights. The weights are dequantised in registers or, for many
// rows of x, into scratch memory, once for all rows, and are then multiplied in the way of float weights. So a product
// has the same bits as with the dequantised weight, and a row's result does not depend on the rows beside it.
#pragma once

#include "cpu/kernels/amx.hpp"
#include "cpu/kernels/linear.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

// Rows of x in a register tile, and the most rows of x for which weights are dequantised in registers, again for each
// register tile.
inline constexpr int kGroupedRegisterRows = kManyRegisters ? 6 : 2;
inline constexpr int kDequantizeInRegisters = 6;

// Scales and offsets of the groups in a chunk of a tile, [group][row]: an element is value * scale + offset. All of
// these numbers have so few bits that nothing is rounded, unless scales are float32.
struct GroupConstants {
  // Exponents of e4m3 are those of float32 less 120.
  static constexpr float kE4m3Unit = 0x1p120F;
  static constexpr int kMost = (kLinearChunk / kGroupUnit + 1) * kGroupedRows + kLanes;
  alignas(64) float scale[kMost], offset[kMost];

  // Reads up to kLanes - 1 scales and zeros past the last ones, which is still inside the tile: its qweight follows.
  VLLMLITE_INLINE GroupConstants(const std::byte* tile, const GroupedLayout& layout, int total, int k, int count) {
    typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));
    const std::ptrdiff_t first = static_cast<std::ptrdiff_t>(k / layout.group) * kGroupedRows;
    const int items = ((k + count - 1) / layout.group + 1) * kGroupedRows - static_cast<int>(first);
    const std::byte* const zeros = tile + layout.scale_bytes(total) + first;
    with_type(layout.scale, [&](auto type) {
      using T = decltype(type);
      const auto* from = reinterpret_cast<const typename T::Item*>(tile) + first;
      for (int i = 0; i < items; i += kLanes) store(scale + i, T::load(from + i));
    });
    if (layout.e4m3) {
      for (int i = 0; i < items; i += kLanes) store(scale + i, load<F>(scale + i) * kE4m3Unit);
      return;
    }
    for (int i = 0; i < items; i += kLanes) {
      F zero = set(static_cast<float>(1 << (layout.bits - 1)));
      if (layout.zeros) zero = __builtin_convertvector(__builtin_convertvector(load<Bytes>(zeros + i), I), F);
      store(offset + i, -load<F>(scale + i) * zero);
    }
  }
};

// The number of bits that stands for e4m3 where templates take one: integers have 4 or 8.
inline constexpr int kE4m3 = -8;
constexpr int stored_bits(int bits) { return bits < 0 ? -bits : bits; }

// ---- Blocks: quantised values of a row that are loaded together. Value i of a block's vector j is in lane i, above
// the bits of the vectors before it.

template <int kBits>
struct Quants32 {
  static constexpr int kVectors = 32 / kBits;
  static constexpr int kLaneBytes = 4;
  using Raw = U;
  struct Group {
    F scale, offset;
  };
  static VLLMLITE_INLINE Group group(float scale, float offset) { return {set(scale), set(offset)}; }
  static VLLMLITE_INLINE F values(Raw raw, int vector, const Group& group) {
    const U quants = (raw >> (vector * kBits)) & ((1U << kBits) - 1);
    return fma(__builtin_convertvector((I)quants, F), group.scale, group.offset);
  }
};

#if defined(__AVX512F__)
// Looks each element up in a table of the 16 dequantised values of its group.
struct Table32 : Quants32<4> {
  using Group = F;
  static VLLMLITE_INLINE Group group(float scale, float offset) {
    const F quants = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return fma(quants, set(scale), set(offset));
  }
  static VLLMLITE_INLINE F values(Raw raw, int vector, Group group) {
    return (F)_mm512_permutexvar_ps((__m512i)(raw >> (vector * 4)), (__m512)group);
  }
};
#else
using Table32 = Quants32<4>;
#endif

// e4m3: its bits are put where float32 has them, and the group's scale makes up for the exponents' bias. Infinite
// scales and NaN are refused when tiles are made.
struct E4m3Values {
  static constexpr int kVectors = 4;
  static constexpr int kLaneBytes = 4;
  using Raw = U;
  using Group = F;
  static VLLMLITE_INLINE Group group(float scale, float /*offset*/) { return set(scale); }
  static VLLMLITE_INLINE F values(Raw raw, int vector, Group scale) {
    const I top = (I)(raw << (24 - vector * 8));
    return (F)((U)(top >> 4) & 0x87f00000) * scale;
  }
};

template <typename P, int kBits>
struct QuantBlock;

template <>
struct QuantBlock<FloatProduct<F32>, kE4m3> : E4m3Values {};

template <>
struct QuantBlock<FloatProduct<F32>, 4> : Table32 {};

template <>
struct QuantBlock<FloatProduct<F32>, 8> : Quants32<8> {};

#if defined(__AVX512BF16__)
template <>
struct QuantBlock<Bf16Product, 4> {
  static constexpr int kVectors = 4;
  static constexpr int kLaneBytes = 2;
  using Raw = U;
  using Group = __m512i;
  static VLLMLITE_INLINE Group group(float scale, float offset) {
    const auto table = (__m512)Table32::group(scale, offset);
    return (__m512i)_mm512_cvtne2ps_pbh(table, table);  // the fifth bit of an index has no effect
  }
  static VLLMLITE_INLINE __m512bh values(Raw raw, int vector, Group group) {
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)raw, static_cast<unsigned>(vector * 4)),
                                              group);
  }
};

template <typename Half>
struct HalvesBlock {
  static constexpr int kVectors = 2;
  static constexpr int kLaneBytes = 4;
  using Raw = U;
  using Group = Half::Group;
  static VLLMLITE_INLINE Group group(float scale, float offset) { return Half::group(scale, offset); }
  static VLLMLITE_INLINE __m512bh values(Raw raw, int vector, const Group& group) {
    return (__m512bh)_mm512_cvtne2ps_pbh((__m512)Half::values(raw, 2 * vector + 1, group),
                                         (__m512)Half::values(raw, 2 * vector, group));
  }
};

template <>
struct QuantBlock<Bf16Product, 8> : HalvesBlock<Quants32<8>> {};

template <>
struct QuantBlock<Bf16Product, kE4m3> : HalvesBlock<E4m3Values> {};
#endif

// ---- The product

// Reads the rows of a tile as vectors of P, one block at a time.
template <typename P, int kBits>
struct TileReader {
  using C = QuantBlock<P, kBits>;
  static constexpr int kBlock = C::kVectors * P::kVector;

  const std::byte* qweight;
  int group_size, end;  // `end` is where the current group ends, in elements from the start of the chunk
  const float *scale, *offset;
  typename C::Group groups[kGroupedRows];
  typename C::Raw raw[kGroupedRows];

  // Reads from element k of a row of `total` elements on; `constants` are those of the chunk that begins there.
  VLLMLITE_INLINE TileReader(const std::byte* tile, const GroupedLayout& layout, int total, int k,
                             const GroupConstants& constants)
      : qweight(tile + layout.qweight_at(total) +
                static_cast<std::ptrdiff_t>(k) * kGroupedRows * stored_bits(kBits) / 8),
        group_size(layout.group),
        end(k / group_size * group_size - k),
        scale(constants.scale),
        offset(constants.offset) {
    next_group();
  }

  VLLMLITE_INLINE void load_block() {
#pragma GCC unroll 4
    for (int row = 0; row < kGroupedRows; ++row) raw[row] = load<U>(qweight + row * static_cast<int>(sizeof(U)));
    qweight += kGroupedRows * sizeof(U);
  }

  VLLMLITE_INLINE void next_group() {
#pragma GCC unroll 4
    for (int row = 0; row < kGroupedRows; ++row) groups[row] = C::group(scale[row], offset[row]);
    scale += kGroupedRows;
    offset += kGroupedRows;
    end += group_size;
  }

  // To be called before the vectors that begin at `element`, counted from the start of the chunk.
  VLLMLITE_INLINE void enter(int element) {
    if (element >= end) next_group();
  }

  // A vector of a row's elements; those past the end of the row are zeros.
  VLLMLITE_INLINE typename P::V values(int row, int vector) const { return C::values(raw[row], vector, groups[row]); }
};

// Adds the products of M rows of x with a vector of each row of a tile to acc.
template <typename P, int M, typename Reader, typename LoadX>
VLLMLITE_INLINE void add_products(const Reader& reader, int vector, LoadX load_x, F* acc) {
#pragma GCC unroll 4
  for (int row = 0; row < kGroupedRows; ++row) {
    const typename P::V w = reader.values(row, vector);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m * kGroupedRows + row] = P::add(acc[m * kGroupedRows + row], load_x(m), w);
  }
}

// Multiplies M rows of x, from row `first` on, with the n rows of a tile.
template <typename P, int kBits, int M>
void grouped_tile(const LinearBlock& block, const std::byte* tile, int first, float* y, int n) {
  using Reader = TileReader<P, kBits>;
  constexpr int kVectors = Reader::C::kVectors;
  const std::ptrdiff_t x_stride = block.k;
  const auto* x = static_cast<const typename P::X*>(block.x) + first * x_stride;
  y += first * block.y_stride;
  for (int k = 0; k < block.k; k += kLinearChunk) {
    const int count = smaller(kLinearChunk, block.k - k);
    const GroupConstants constants(tile, block.layout, block.k, k, count);
    Reader reader(tile, block.layout, block.k, k, constants);
    F acc[M * kGroupedRows] = {};
    int element = 0;
    for (; element + Reader::kBlock <= count; x += Reader::kBlock) {
      reader.load_block();
#pragma GCC unroll 8
      for (int vector = 0; vector < kVectors; ++vector, element += P::kVector) {
        reader.enter(element);
        add_products<P, M>(
            reader, vector, [&](int m) { return P::load_x(x + m * x_stride + vector * P::kVector); }, acc);
      }
    }
    if (element < count) {
      reader.load_block();
#pragma GCC unroll 8
      for (int vector = 0; vector < kVectors; ++vector, element += P::kVector, x += P::kVector) {
        if (element >= count) break;
        reader.enter(element);
        add_products<P, M>(
            reader, vector,
            [&](int m) { return P::load_some_x(x + m * x_stride, smaller(P::kVector, count - element)); }, acc);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      float* const to = y + m * block.y_stride;
      if (n == kGroupedRows) {
        store_sums<kGroupedRows>(acc + m * kGroupedRows, to, k > 0);
      } else {
        float sums[kGroupedRows];
        store_sums<kGroupedRows>(acc + m * kGroupedRows, sums, false);
        for (int r = 0; r < n; ++r) to[r] = k > 0 ? to[r] + sums[r] : sums[r];
      }
    }
  }
}

// Dequantises `count` elements of n rows, from element k on. Row r is written to start(r, step), which also sets
// `step`, the distance from one kLine<P> elements to the next.
template <typename P, int kBits, typename Start>
VLLMLITE_INLINE void dequantize_rows(const LinearBlock& block, int i, int n, int k, int count, Start start) {
  using Reader = TileReader<P, kBits>;
  const auto tile_bytes = static_cast<std::ptrdiff_t>(block.layout.tile_bytes(block.k));
  const auto* tile = static_cast<const std::byte*>(block.w[i]);
  for (int row = 0; row < n; row += kGroupedRows, tile += tile_bytes) {
    typename P::W* to[kGroupedRows];
    std::ptrdiff_t step[kGroupedRows];
    const int rows = smaller(kGroupedRows, n - row);
    for (int r = 0; r < rows; ++r) to[r] = start(row + r, step[r]);
    const GroupConstants constants(tile, block.layout, block.k, k, count);
    Reader reader(tile, block.layout, block.k, k, constants);
    for (int element = 0; element < count;) {
      reader.load_block();
#pragma GCC unroll 8
      for (int vector = 0; vector < Reader::C::kVectors; ++vector, element += P::kVector) {
        if (element >= count) break;
        reader.enter(element);
        for (int r = 0; r < rows; ++r)
          store(to[r] + element / kLine<P> * step[r] + element % kLine<P>, reader.values(r, vector));
      }
    }
  }
}

template <typename P, int kBits>
void grouped(const LinearBlock& block) {
  using W = typename P::W;
  if (block.m > kDequantizeInRegisters) {
    LinearBlock packed = block;
    packed.fetch = false;
    product<P>(packed, true, [&](int i, int k, int count, W* to) {
      constexpr int kWidth = tile_width(kRegisterRows);
      const int size = round_up_to_lines<P>(count), tiled = block.n / kWidth * kWidth;
      dequantize_rows<P, kBits>(block, i, block.n, k, count, [&](int row, std::ptrdiff_t& step) {
        const bool alone = row >= tiled;
        step = alone ? kLine<P> : kWidth * kLine<P>;
        const std::ptrdiff_t first = alone ? row : row / kWidth * kWidth;
        return to + first * size + (row - first) * kLine<P>;
      });
    });
    return;
  }
  using Tile = decltype(&grouped_tile<P, kBits, 1>);
  static constexpr Tile kTiles[] = {
      nullptr,
      grouped_tile<P, kBits, 1>,
      grouped_tile<P, kBits, 2>,
#if defined(__AVX512F__) || defined(__aarch64__)
      grouped_tile<P, kBits, 3>,
      grouped_tile<P, kBits, 4>,
      grouped_tile<P, kBits, 5>,
      grouped_tile<P, kBits, 6>,
#endif
  };
  static_assert(sizeof kTiles / sizeof *kTiles == kGroupedRegisterRows + 1);
  const auto tile_bytes = static_cast<std::ptrdiff_t>(block.layout.tile_bytes(block.k));
  for (int i = 0; i < 2 && block.w[i] != nullptr; ++i) {
    const auto* tile = static_cast<const std::byte*>(block.w[i]);
    for (int row = 0; row < block.n; row += kGroupedRows, tile += tile_bytes)
      for (int m = 0; m < block.m; m += kGroupedRegisterRows)
        kTiles[smaller(kGroupedRegisterRows, block.m - m)](block, tile, m, block.y + i * block.n + row,
                                                           smaller(kGroupedRows, block.n - row));
  }
  add_bias(block);
}

template <typename P>
void grouped(const LinearBlock& block) {
  if (block.layout.e4m3) return grouped<P, kE4m3>(block);
  return block.layout.bits == 4 ? grouped<P, 4>(block) : grouped<P, 8>(block);
}

template <typename P>
std::size_t grouped_scratch_bytes(int m, int k) {
  return m > kDequantizeInRegisters ? packed_w_bytes<P>(k) : 0;
}

// ---- Tiles

// Writes the quantised values of a row in the order of QuantBlock<P, kBits>, with `stride` bytes from block to block.
template <typename P, int kBits>
void pack_quants(const std::uint8_t* from, int padded, std::uint8_t* to, std::ptrdiff_t stride) {
  using C = QuantBlock<P, kBits>;
  constexpr int kLanesOf = static_cast<int>(sizeof(U)) / C::kLaneBytes, kInByte = 8 / kBits;
  constexpr int kBlock = static_cast<int>(sizeof(U)) * kInByte;
  for (int k = 0; k < padded; k += kBlock, from += kBlock, to += stride)
    for (int byte = 0; byte < C::kLaneBytes; ++byte)
      for (int lane = 0; lane < kLanesOf; ++lane) {
        std::uint8_t value = from[byte * kInByte * kLanesOf + lane];
        if constexpr (kBits == 4)
          value = static_cast<std::uint8_t>(value | from[(byte * kInByte + 1) * kLanesOf + lane] << 4);
        to[lane * C::kLaneBytes + byte] = value;
      }
}

template <typename P>
void pack_tile(const GroupedTile& tile) {
  const GroupedLayout& layout = tile.layout;
  const int groups = layout.groups(tile.k), row_bytes = (tile.k * layout.bits + 7) / 8;
  const int padded = (tile.k + kGroupedDepth - 1) / kGroupedDepth * kGroupedDepth;
  const std::size_t item = layout.scale == Float::f32 ? 4 : 2;
  __builtin_memset(tile.to, 0, layout.tile_bytes(tile.k));
  std::byte* const zeros = tile.to + layout.scale_bytes(tile.k);
  std::uint8_t quants[kGroupedDepth];
  for (int row = 0; row < tile.rows; ++row) {
    const std::uint8_t* const from = tile.qweight + static_cast<std::ptrdiff_t>(row) * row_bytes;
    for (int group = 0; group < groups; ++group) {
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(row) * groups + group;
      const int to = group * kGroupedRows + row;
      __builtin_memcpy(tile.to + static_cast<std::size_t>(to) * item, tile.scales + static_cast<std::size_t>(at) * item,
                       item);
      if (layout.zeros) zeros[to] = static_cast<std::byte>(tile.zeros[at]);
    }
    // Padding dequantises to zero.
    const std::uint8_t padding = layout.zeros ? tile.zeros[static_cast<std::ptrdiff_t>(row + 1) * groups - 1]
                                              : static_cast<std::uint8_t>(1 << (layout.bits - 1));
    for (int k = 0; k < padded; k += kGroupedDepth) {
      const int count = smaller(kGroupedDepth, tile.k - k);
      const std::uint8_t* const part = from + static_cast<std::ptrdiff_t>(k) * layout.bits / 8;
      if (layout.bits == 4) {
        for (int i = 0; i < count / 2; ++i) {
          quants[2 * i] = part[i] & 15;
          quants[2 * i + 1] = part[i] >> 4;
        }
        if (count % 2 != 0) quants[count - 1] = part[count / 2] & 15;
      } else {
        __builtin_memcpy(quants, part, static_cast<std::size_t>(count));
      }
      for (int i = count; i < kGroupedDepth; ++i) quants[i] = padding;
      constexpr std::ptrdiff_t kStride = static_cast<std::ptrdiff_t>(sizeof(U)) * kGroupedRows;
      auto* const to = reinterpret_cast<std::uint8_t*>(tile.to + layout.qweight_at(tile.k)) +
                       static_cast<std::ptrdiff_t>(k) * kGroupedRows * layout.bits / 8 +
                       row * static_cast<std::ptrdiff_t>(sizeof(U));
      if (layout.bits == 4)
        pack_quants<P, 4>(quants, kGroupedDepth, to, kStride);
      else
        pack_quants<P, 8>(quants, kGroupedDepth, to, kStride);
    }
  }
}

template <typename P>
inline constexpr GroupedKernel grouped_kernel{
    {P::kInput, packed_bytes<P>, grouped_scratch_bytes<P>, passes_of, pack_panel<P>, grouped<P>}, pack_tile<P>};

#if defined(__AMX_BF16__)
// Rows of w that are dequantised at a time, as many as two tile registers hold.
inline constexpr int kAmxRows = 2 * kTileSide;

inline std::size_t amx_grouped_scratch_bytes(int /*m*/, int k) {
  return std::size_t{kAmxRows} * sizeof(std::uint16_t) * static_cast<std::size_t>(round_up_to_lines<Bf16Product>(k));
}

template <int kBits>
void amx_grouped(const LinearBlock& block) {
  auto* const rows = reinterpret_cast<std::uint16_t*>(block.scratch);
  const std::ptrdiff_t stride = round_up_to_lines<Bf16Product>(block.k);
  const auto tile_bytes = static_cast<std::ptrdiff_t>(block.layout.tile_bytes(block.k));
  for (int i = 0; i < 2 && block.w[i] != nullptr; ++i)
    for (int n = 0; n < block.n; n += kAmxRows) {
      LinearBlock some = block;
      some.n = smaller(kAmxRows, block.n - n);
      some.w[0] = static_cast<const std::byte*>(block.w[i]) + n / kGroupedRows * tile_bytes;
      some.w[1] = nullptr;
      for (int k = 0; k < block.k; k += kLinearChunk)
        dequantize_rows<Bf16Product, kBits>(some, 0, some.n, k, smaller(kLinearChunk, block.k - k),
                                            [&](int row, std::ptrdiff_t& step) {
                                              step = kLine<Bf16Product>;
                                              return rows + row * stride + k;
                                            });
      some.w[0] = rows;
      some.w_stride = stride;
      some.y += i * block.n + n;
      some.bias[0] = block.bias[i] == nullptr ? nullptr : block.bias[i] + n;
      amx_linear(some);
    }
}

inline void amx_grouped(const LinearBlock& block) {
  if (block.layout.e4m3) return amx_grouped<kE4m3>(block);
  return block.layout.bits == 4 ? amx_grouped<4>(block) : amx_grouped<8>(block);
}

inline constexpr GroupedKernel amx_grouped_kernel{
    {Float::bf16, amx_packed_bytes, amx_grouped_scratch_bytes, amx_panels, amx_pack, amx_grouped},
    pack_tile<Bf16Product>};
#endif

}  // namespace vllmlite::cpu::VLLMLITE_ISA
