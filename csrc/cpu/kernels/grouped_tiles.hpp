// Tiles of grouped integer weights: how quantised values are stored for the vectors of an instruction set, how they
// are turned into floats, and how tiles are made from a stored weight.
#pragma once

#include "cpu/kernels/linear.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

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
    if (layout.floats) {
      const float unit = layout.bits == 8 ? kE4m3Unit : 1.0F;
      for (int i = 0; i < items; i += kLanes) store(scale + i, load<F>(scale + i) * unit);
      return;
    }
    for (int i = 0; i < items; i += kLanes) {
      F zero = set(static_cast<float>(1 << (layout.bits - 1)));
      if (layout.zeros) zero = __builtin_convertvector(__builtin_convertvector(load<Bytes>(zeros + i), I), F);
      store(offset + i, -load<F>(scale + i) * zero);
    }
  }
};

// The numbers of bits that stand for floats where templates take one: integers have 4 or 8.
inline constexpr int kE2m1 = -4, kE4m3 = -8;
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
template <int kBits>
struct Table32 : Quants32<4> {
  using Group = F;
  static VLLMLITE_INLINE Group group(float scale, float offset) {
    const F quants = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const F e2m1 = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};
    return kBits == kE2m1 ? e2m1 * set(scale) : fma(quants, set(scale), set(offset));
  }
  static VLLMLITE_INLINE F values(Raw raw, int vector, Group group) {
    return (F)_mm512_permutexvar_ps((__m512i)(raw >> (vector * 4)), (__m512)group);
  }
};
#else
// e2m1: a sign, an exponent of two bits and a fraction of one. Twice the value is an integer.
struct E2m1Values : Quants32<4> {
  using Group = F;
  static VLLMLITE_INLINE Group group(float scale, float /*offset*/) { return set(scale * 0.5F); }
  static VLLMLITE_INLINE F values(Raw raw, int vector, Group half) {
    const U code = raw >> (vector * 4);
    const U exponent = code >> 1 & 3, is_normal = (U)(exponent != 0) & 1;
    const U doubled = ((code & 1) | is_normal << 1) << (exponent - is_normal);
    return (F)((U)(__builtin_convertvector((I)doubled, F) * half) ^ (code & 8) << 28);
  }
};

template <int kBits>
struct Table32 : Quants32<4> {};

template <>
struct Table32<kE2m1> : E2m1Values {};
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
struct QuantBlock<FloatProduct<F32>, 4> : Table32<4> {};

template <>
struct QuantBlock<FloatProduct<F32>, kE2m1> : Table32<kE2m1> {};

template <>
struct QuantBlock<FloatProduct<F32>, 8> : Quants32<8> {};

#if defined(__AVX512BF16__)
template <int kBits>
struct Table16 {
  static constexpr int kVectors = 4;
  static constexpr int kLaneBytes = 2;
  using Raw = U;
  using Group = __m512i;
  static VLLMLITE_INLINE Group group(float scale, float offset) {
    const auto table = (__m512)Table32<kBits>::group(scale, offset);
    return (__m512i)_mm512_cvtne2ps_pbh(table, table);  // the fifth bit of an index has no effect
  }
  static VLLMLITE_INLINE __m512bh values(Raw raw, int vector, Group group) {
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)raw, static_cast<unsigned>(vector * 4)),
                                              group);
  }
};

template <>
struct QuantBlock<Bf16Product, 4> : Table16<4> {};

template <>
struct QuantBlock<Bf16Product, kE2m1> : Table16<kE2m1> {};

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

}  // namespace vllmlite::cpu::VLLMLITE_ISA
