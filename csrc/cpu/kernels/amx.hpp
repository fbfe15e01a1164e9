// Products in bfloat16 on tile registers (Intel AMX): 16 rows of w, read in place, times 16 rows of x.
//
// Each output element has one accumulator, to which blocks of 32 elements along k are added in ascending order,
// independently of the tile's other elements. Every number of rows of x uses such tiles, so a row's result does not
// depend on the rows beside it. The results do not have the same bits as those of the vector kernels.
#pragma once

#include "cpu/kernels/simd.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

#if defined(__AMX_BF16__)

inline constexpr int kTileSide = 16;              // rows of w, rows of x, and pairs along k, in a tile
inline constexpr int kTileDepth = 2 * kTileSide;  // elements along k
inline constexpr int kTileItems = kTileSide * kTileDepth;
inline constexpr int kTileAhead = 8;  // how many blocks along k ahead lines are prefetched

// A panel holds 16 rows of x: [pair][row][2] for each block of k, padded with zeros.
inline int amx_panels(int m) { return (m + kTileSide - 1) / kTileSide; }
inline int amx_blocks(int k) { return (k + kTileDepth - 1) / kTileDepth; }

inline std::size_t amx_packed_bytes(int m, int k) {
  return std::size_t{kTileItems} * sizeof(std::uint16_t) * static_cast<std::size_t>(amx_panels(m)) *
         static_cast<std::size_t>(amx_blocks(k));
}

inline void amx_pack(const LinearInput& input, int panel) {
  const int first = panel * kTileSide, rows = smaller(kTileSide, input.m - first), blocks = amx_blocks(input.k);
  const auto* x = static_cast<const std::uint16_t*>(input.x) + static_cast<std::ptrdiff_t>(first) * input.k;
  auto* to = static_cast<std::uint16_t*>(input.panels) + static_cast<std::ptrdiff_t>(panel) * blocks * kTileItems;
  for (int k = 0; k < input.k; k += kTileDepth, to += kTileItems) {
    const int count = smaller(kTileDepth, input.k - k);
    if (rows < kTileSide || count < kTileDepth) __builtin_memset(to, 0, kTileItems * sizeof *to);
    for (int row = 0; row < rows; ++row) {
      const std::uint16_t* from = x + static_cast<std::ptrdiff_t>(row) * input.k + k;
      for (int i = 0; i < count; ++i) to[i / 2 * kTileDepth + row * 2 + i % 2] = from[i];
    }
  }
}

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Up to 16 rows of w. Whole tiles are read in place, others from a copy that is padded with zeros.
struct TileRows {
  const std::uint16_t* w;
  std::ptrdiff_t stride;
  int rows, k;
  alignas(64) std::uint16_t copy[kTileItems];

  // Returns the address of block `index` of k, and sets the number of bytes from row to row.
  VLLMLITE_INLINE const void* at(int index, std::ptrdiff_t& row_bytes) {
    const int first = index * kTileDepth, count = smaller(kTileDepth, k - first);
    row_bytes = stride * 2;
    if (rows == kTileSide && count == kTileDepth) return w + first;
    row_bytes = kTileDepth * 2;
    __builtin_memset(copy, 0, sizeof copy);
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < count; ++i) copy[row * kTileDepth + i] = w[row * stride + first + i];
    return copy;
  }

  VLLMLITE_INLINE void fetch(int index) const {
    for (int row = 0; row < rows; ++row) prefetch(w + row * stride + index * kTileDepth);
  }
};

// Writes a stored tile [n][m] to rows of y, and adds the bias unless it is null.
inline void write_sums(const float* tile, float* y, std::ptrdiff_t y_stride, int m, int n, const float* bias) {
  const auto mask = static_cast<__mmask16>((1U << n) - 1);
  const __m512i column = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
  for (int row = 0; row < m; ++row) {
    __m512 sums = _mm512_i32gather_ps(column, tile + row, 4);
    if (bias != nullptr) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, bias));
    _mm512_mask_storeu_ps(y + row * y_stride, mask, sums);
  }
}

// Multiplies up to 32 rows of w with one or two panels of x.
template <bool kTwo>
void multiply_tiles(const LinearBlock& block, TileRows* w, const std::uint16_t* x, bool fetch, float* y, int m, int n,
                    const float* bias) {
  const int blocks = amx_blocks(block.k);
  const std::uint16_t* const second = x + static_cast<std::ptrdiff_t>(blocks) * kTileItems;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int index = 0; index < blocks; ++index) {
    std::ptrdiff_t stride;
    const void* rows = w[0].at(index, stride);
    _tile_loadd(4, rows, stride);
    rows = w[1].at(index, stride);
    _tile_loadd(5, rows, stride);
    if (fetch) {
      w[0].fetch(index + kTileAhead);
      w[1].fetch(index + kTileAhead);
    }
    _tile_loadd(6, x + index * kTileItems, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kTwo) {
      _tile_loadd(7, second + index * kTileItems, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float found[kTileSide * kTileSide];
  const int low = smaller(n, kTileSide), high = n - low, rows = smaller(m, kTileSide);
  const float* const bias_high = bias == nullptr ? nullptr : bias + kTileSide;
  _tile_stored(0, found, 64);
  write_sums(found, y, block.y_stride, rows, low, bias);
  if (high > 0) {
    _tile_stored(1, found, 64);
    write_sums(found, y + kTileSide, block.y_stride, rows, high, bias_high);
  }
  if constexpr (kTwo) {
    float* const below = y + kTileSide * block.y_stride;
    _tile_stored(2, found, 64);
    write_sums(found, below, block.y_stride, m - rows, low, bias);
    if (high > 0) {
      _tile_stored(3, found, 64);
      write_sums(found, below + kTileSide, block.y_stride, m - rows, high, bias_high);
    }
  }
}

inline void amx_linear(const LinearBlock& block) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const auto* x = static_cast<const std::uint16_t*>(block.x);
  const std::ptrdiff_t panel = static_cast<std::ptrdiff_t>(amx_blocks(block.k)) * kTileItems;
  for (int m = 0; m < block.m; m += 2 * kTileSide, x += 2 * panel) {
    const int rows = smaller(2 * kTileSide, block.m - m);
    for (int i = 0; i < 2 && block.w[i] != nullptr; ++i)
      for (int n = 0; n < block.n; n += 2 * kTileSide) {
        const int count = smaller(2 * kTileSide, block.n - n);
        const auto* first = static_cast<const std::uint16_t*>(block.w[i]) + n * block.w_stride;
        TileRows w[2];
        for (int half = 0; half < 2; ++half) {
          w[half].w = first + half * kTileSide * block.w_stride;
          w[half].stride = block.w_stride;
          w[half].rows = smaller(larger(count - half * kTileSide, 0), kTileSide);
          w[half].k = block.k;
        }
        float* const y = block.y + m * block.y_stride + i * block.n + n;
        const float* const bias = block.bias[i] == nullptr ? nullptr : block.bias[i] + n;
        if (rows > kTileSide)
          multiply_tiles<true>(block, w, x, m == 0, y, rows, count, bias);
        else
          multiply_tiles<false>(block, w, x, m == 0, y, rows, count, bias);
      }
  }
  _tile_release();
}

inline std::size_t amx_scratch_bytes(int /*m*/, int /*k*/) { return 0; }

inline constexpr LinearKernel amx_kernel{Float::bf16, amx_packed_bytes, amx_scratch_bytes,
                                         amx_panels,  amx_pack,         amx_linear};

#endif

}  // namespace vllmlite::cpu::VLLMLITE_ISA
