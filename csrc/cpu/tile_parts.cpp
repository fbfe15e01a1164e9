// Tiles of weights that checkpoints store as integers, for products that quantise x.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

constexpr std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Puts a row of bytes into a tile: quads of the tile's row `r`.
void put_bytes(const std::uint8_t* from, std::int64_t size, std::int64_t r, std::uint8_t* tile) {
  for (std::int64_t k = 0; k < size; k += 4)
    std::memcpy(tile + (k / 4 * kTileRows + r) * 4, from + k,
                static_cast<std::size_t>(std::min<std::int64_t>(4, size - k)));
}

// Likewise a row of nibbles, of which a tile holds each quad beside the next one.
void put_nibbles(const std::uint8_t* from, std::int64_t size, std::int64_t r, std::uint8_t* tile) {
  for (std::int64_t k = 0; k < size; ++k) {
    const int value = from[k / 2] >> (k % 2 * 4) & 15;
    std::uint8_t& to = tile[(k / 8 * kTileRows + r) * 4 + k % 4];
    to = static_cast<std::uint8_t>(to | value << (k / 4 % 2 * 4));
  }
}

}  // namespace

QuantizedPart w8a8_part(Runtime& runtime, const Tensor& values, const Tensor& scales,
                        const std::optional<Tensor>& zeros, InputScale input) {
  if (values.shape.size() != 2 || values.size() == 0 || values.dtype != DType::int8)
    throw std::invalid_argument("a weight must be int8 [out, in], not " + describe(values));
  const std::int64_t rows = values.shape[0], size = values.shape[1], groups = divided_up(size, kGroup);
  if (scales.dtype != DType::float32 || scales.size() != rows || (zeros && zeros->dtype != DType::int8) ||
      (zeros && zeros->size() != rows))
    throw std::invalid_argument("there must be a float32 scale, and an int8 zero or none, for each row");
  QuantizedPart part = allocate_tiles(TileScheme::w8a8, rows, size);
  part.input = input;
  runtime.issue([&](Worker& worker) {
    for (std::int64_t tile; (tile = worker.take()) < divided_up(rows, kTileRows);) {
      auto* const to = static_cast<std::uint8_t*>(part.qweight.data) + tile * groups * kGroup * kTileRows;
      std::memset(to, 0, static_cast<std::size_t>(groups * kGroup * kTileRows));
      RowScales& constants = static_cast<RowScales*>(part.scales.data)[tile] = {};
      for (std::int64_t r = 0; r < std::min<std::int64_t>(kTileRows, rows - tile * kTileRows); ++r) {
        const std::int64_t row = tile * kTileRows + r;
        const auto* from = static_cast<const std::int8_t*>(values.data) + row * size;
        const std::int32_t zero = zeros ? static_cast<const std::int8_t*>(zeros->data)[row] : 0;
        std::int32_t sum = 0;
        for (std::int64_t k = 0; k < size; ++k) {
          to[(k / 4 * kTileRows + r) * 4 + k % 4] = static_cast<std::uint8_t>(from[k] + 128);
          sum += from[k] - zero;
        }
        constants.scale[r] = static_cast<const float*>(scales.data)[row];
        constants.zero[r] = zero;
        constants.sum[r] = sum;
      }
    }
  });
  runtime.flush();
  return part;
}

QuantizedPart grouped_tiles(Runtime& runtime, const GroupedWeight& stored) {
  check_grouped(stored);
  const std::int64_t rows = stored.qweight.shape[0], row_bytes = stored.qweight.shape[1];
  const std::int64_t tiles = divided_up(rows, kTileRows), groups = divided_up(stored.columns, kGroup);
  const std::int64_t scale_groups = divided_up(stored.columns, stored.group_size);
  QuantizedPart part{};
  part.scheme = stored.bits == 4 ? TileScheme::w4a8_grouped : TileScheme::w8a8_grouped;
  const std::int64_t tile_bytes = groups * layout_of(part.scheme).group_bytes();
  part.qweight = allocate({tiles, groups, layout_of(part.scheme).group_bytes()}, DType::uint8);
  part.scales = allocate({tiles, scale_groups, kTileRows}, stored.scales.dtype);
  part.zeros = allocate({tiles, scale_groups, kTileRows}, DType::uint8);
  part.rows = rows;
  part.order = stored.order;
  part.groups_per_scale = static_cast<int>(divided_up(std::min(stored.group_size, stored.columns), kGroup));
  const std::size_t item = item_size(stored.scales.dtype);
  runtime.issue([&](Worker& worker) {
    for (std::int64_t tile; (tile = worker.take()) < tiles;) {
      auto* const to = static_cast<std::uint8_t*>(part.qweight.data) + tile * tile_bytes;
      auto* const scales =
          static_cast<std::byte*>(part.scales.data) + static_cast<std::size_t>(tile * scale_groups * kTileRows) * item;
      auto* const zeros = static_cast<std::uint8_t*>(part.zeros->data) + tile * scale_groups * kTileRows;
      std::memset(to, 0, static_cast<std::size_t>(tile_bytes));
      std::memset(scales, 0, static_cast<std::size_t>(scale_groups * kTileRows) * item);
      std::memset(zeros, 1 << (stored.bits - 1), static_cast<std::size_t>(scale_groups * kTileRows));
      for (std::int64_t r = 0; r < std::min<std::int64_t>(kTileRows, rows - tile * kTileRows); ++r) {
        const std::int64_t row = tile * kTileRows + r;
        const auto* from = static_cast<const std::uint8_t*>(stored.qweight.data) + row * row_bytes;
        if (stored.bits == 4)
          put_nibbles(from, stored.columns, r, to);
        else
          put_bytes(from, stored.columns, r, to);
        for (std::int64_t group = 0; group < scale_groups; ++group) {
          const std::int64_t at = row * scale_groups + group, place = group * kTileRows + r;
          std::memcpy(scales + static_cast<std::size_t>(place) * item,
                      static_cast<const std::byte*>(stored.scales.data) + static_cast<std::size_t>(at) * item, item);
          if (stored.zeros) zeros[place] = static_cast<const std::uint8_t*>(stored.zeros->data)[at];
        }
      }
    }
  });
  runtime.flush();
  return part;
}

}  // namespace vllmlite::cpu
