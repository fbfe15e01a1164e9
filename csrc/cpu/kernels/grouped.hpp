// Products with grouped integer or float (e2m1, e4m3) weights. The weights are dequantised in registers or, for many
// rows of x, into scratch memory, once for all rows, and are then multiplied in the way of float weights. So a product
// has the same bits as with the dequantised weight, and a row's result does not depend on the rows beside it.
#pragma once

#include "cpu/kernels/amx.hpp"
#include "cpu/kernels/grouped_tiles.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

// Rows of x in a register tile.
inline constexpr int kGroupedRegisterRows = kManyRegisters ? 4 : 2;

// Groups of at least this many columns cost little more than their values.
inline constexpr int kLargeGroup = 128;

// The most rows of x for which weights are dequantised in registers, again for each register tile; more rows if that is
// cheap.
inline constexpr int kInRegisters = kManyRegisters ? 4 : 6;
inline constexpr int kCheaplyInRegisters = kManyRegisters ? 8 : 6;
inline int most_in_registers(const GroupedLayout& layout) {
  return layout.bits == 4 && layout.group >= kLargeGroup ? kCheaplyInRegisters : kInRegisters;
}

// Returns how many rows of w are dequantised into scratch memory at a time. For few rows of x, they are those of one
// register tile, which stay in the first-level cache; narrow vectors gain nothing from that.
inline int dequantized_rows(const LinearBlock& block) {
  static_assert(!kManyRegisters || tile_width(kRegisterRows) == kGroupedRows);
  return kManyRegisters && block.m <= kSkinnyRows ? kGroupedRows : block.n;
}

// Distance in bytes at which quantised values are prefetched, as the hardware alone does not keep up with reading
// between much arithmetic. For one row of x and large groups there is little, and the hardware is faster alone.
inline constexpr int kGroupedAhead = 8192;

// Reads the rows of a tile as vectors of P, one block at a time.
template <typename P, int kBits>
struct TileReader {
  using C = QuantBlock<P, kBits>;
  static constexpr int kBlock = C::kVectors * P::kVector;

  const std::byte* qweight;
  std::ptrdiff_t ahead;
  int group_size, end;  // `end` is where the current group ends, in elements from the start of the chunk
  const float *scale, *offset;
  typename C::Group groups[kGroupedRows];
  typename C::Raw raw[kGroupedRows];

  // Reads from element k of a row of `total` elements on; `constants` are those of the chunk that begins there.
  VLLMLITE_INLINE TileReader(const std::byte* tile, const GroupedLayout& layout, int total, int k,
                             const GroupConstants& constants, bool prefetches)
      : qweight(tile + layout.qweight_at(total) +
                static_cast<std::ptrdiff_t>(k) * kGroupedRows * stored_bits(kBits) / 8),
        ahead(prefetches ? kGroupedAhead : 0),
        group_size(layout.group),
        end(k / group_size * group_size - k),
        scale(constants.scale),
        offset(constants.offset) {
    next_group();
  }

  VLLMLITE_INLINE void load_block() {
#pragma GCC unroll 4
    for (int row = 0; row < kGroupedRows; ++row) {
      const std::byte* const from = qweight + row * static_cast<int>(sizeof(U));
      raw[row] = load<U>(from);
      prefetch(from + ahead);
    }
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

// Multiplies M rows of x, from row `first` on, with a block's rows of w, those of one tile.
template <typename P, int kBits, int M>
void grouped_tile(const LinearBlock& block, int first) {
  using Reader = TileReader<P, kBits>;
  constexpr int kVectors = Reader::C::kVectors;
  const std::ptrdiff_t x_stride = block.k;
  const auto* tile = static_cast<const std::byte*>(block.w[0]);
  const auto* x = static_cast<const typename P::X*>(block.x) + first * x_stride;
  float* const y = block.y + first * block.y_stride;
  for (int k = 0; k < block.k; k += kLinearChunk) {
    const int count = smaller(kLinearChunk, block.k - k);
    const GroupConstants constants(tile, block.layout, block.k, k, count);
    Reader reader(tile, block.layout, block.k, k, constants, M > 1 || block.layout.group < kLargeGroup);
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
      if (block.n == kGroupedRows) {
        store_sums<kGroupedRows>(acc + m * kGroupedRows, to, k > 0);
      } else {
        float sums[kGroupedRows];
        store_sums<kGroupedRows>(acc + m * kGroupedRows, sums, false);
        for (int r = 0; r < block.n; ++r) to[r] = k > 0 ? to[r] + sums[r] : sums[r];
      }
    }
  }
}

// Calls body with every `step` rows of a block's first w, then of its second, as blocks of their own.
template <typename Body>
VLLMLITE_INLINE void for_rows(const LinearBlock& block, int step, Body body) {
  const auto tile_bytes = static_cast<std::ptrdiff_t>(block.layout.tile_bytes(block.k));
  for (int i = 0; i < 2 && block.w[i] != nullptr; ++i)
    for (int row = 0; row < block.n; row += step) {
      LinearBlock some = block;
      some.fetch = false;
      some.n = smaller(step, block.n - row);
      some.w[0] = static_cast<const std::byte*>(block.w[i]) + row / kGroupedRows * tile_bytes;
      some.w[1] = nullptr;
      some.y += i * block.n + row;
      some.bias[0] = block.bias[i] == nullptr ? nullptr : block.bias[i] + row;
      body(some);
    }
}

// Dequantises `count` elements of each row of a block's first w, from element k on. Row r is written to
// start(r, step), which also sets `step`, the distance from one kLine<P> elements to the next.
template <typename P, int kBits, typename Start>
VLLMLITE_INLINE void dequantize_rows(const LinearBlock& block, int k, int count, Start start) {
  using Reader = TileReader<P, kBits>;
  const auto tile_bytes = static_cast<std::ptrdiff_t>(block.layout.tile_bytes(block.k));
  const auto* tile = static_cast<const std::byte*>(block.w[0]);
  for (int row = 0; row < block.n; row += kGroupedRows, tile += tile_bytes) {
    typename P::W* to[kGroupedRows];
    std::ptrdiff_t step[kGroupedRows];
    const int rows = smaller(kGroupedRows, block.n - row);
    for (int r = 0; r < rows; ++r) to[r] = start(row + r, step[r]);
    const GroupConstants constants(tile, block.layout, block.k, k, count);
    Reader reader(tile, block.layout, block.k, k, constants, true);
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
  if (block.m > most_in_registers(block.layout)) {
    for_rows(block, dequantized_rows(block), [](const LinearBlock& some) {
      product<P>(some, true, [&](int /*i*/, int k, int count, W* to) {
        constexpr int kWidth = tile_width(kRegisterRows);
        const int size = round_up_to_lines<P>(count), tiled = some.n / kWidth * kWidth;
        dequantize_rows<P, kBits>(some, k, count, [&](int row, std::ptrdiff_t& step) {
          const bool alone = row >= tiled;
          step = alone ? kLine<P> : kWidth * kLine<P>;
          const std::ptrdiff_t first = alone ? row : row / kWidth * kWidth;
          return to + first * size + (row - first) * kLine<P>;
        });
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
#endif
  };
  static_assert(sizeof kTiles / sizeof *kTiles == kGroupedRegisterRows + 1);
  for_rows(block, kGroupedRows, [](const LinearBlock& some) {
    const int passes = (some.m + kGroupedRegisterRows - 1) / kGroupedRegisterRows;
    for (int pass = 0; pass < passes; ++pass) {
      const int first = rows_before(some.m, pass, passes);
      kTiles[rows_before(some.m, pass + 1, passes) - first](some, first);
    }
    add_bias(some);
  });
}

template <typename P>
void grouped(const LinearBlock& block) {
  if (block.layout.floats) return block.layout.bits == 4 ? grouped<P, kE2m1>(block) : grouped<P, kE4m3>(block);
  return block.layout.bits == 4 ? grouped<P, 4>(block) : grouped<P, 8>(block);
}

template <typename P>
std::size_t grouped_scratch_bytes(int m, int k) {
  return m > kInRegisters ? packed_w_bytes<P>(k) : 0;
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
  for_rows(block, kAmxRows, [&](LinearBlock some) {
    for (int k = 0; k < some.k; k += kLinearChunk)
      dequantize_rows<Bf16Product, kBits>(some, k, smaller(kLinearChunk, some.k - k),
                                          [&](int row, std::ptrdiff_t& step) {
                                            step = kLine<Bf16Product>;
                                            return rows + row * stride + k;
                                          });
    some.w[0] = rows;
    some.w_stride = stride;
    amx_linear(some);
  });
}

inline void amx_grouped(const LinearBlock& block) {
  if (block.layout.floats) return block.layout.bits == 4 ? amx_grouped<kE2m1>(block) : amx_grouped<kE4m3>(block);
  return block.layout.bits == 4 ? amx_grouped<4>(block) : amx_grouped<8>(block);
}

inline constexpr GroupedKernel amx_grouped_kernel{
    {Float::bf16, amx_packed_bytes, amx_grouped_scratch_bytes, amx_panels, amx_pack, amx_grouped},
    pack_tile<Bf16Product>};
#endif

}  // namespace vllmlite::cpu::VLLMLITE_ISA
