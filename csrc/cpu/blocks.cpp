// ggml's blocks, repacked into tiles or dequantised. A word holds four separate bytes and is never used as one number,
// so the machine's byte order does not matter.
#include "cpu/blocks.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <stdexcept>

namespace vllmlite::cpu {

namespace {

constexpr int kQuads = kGroup / 4;
constexpr std::uint32_t kNibbles = 0x0f0f0f0f;
// Elements that a thread dequantises at a time.
constexpr std::int64_t kDecoded = 1 << 14;
constexpr const char* kNotFinite = "a block's scale is not finite";

std::uint32_t word(const std::uint8_t* from) {
  std::uint32_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

std::uint16_t half(const std::uint8_t* from) { return static_cast<std::uint16_t>(from[0] | from[1] << 8); }

// The scales of a block as stored: float16 bits, and the sub-scales that multiply them.
struct Scales {
  std::uint16_t floats[2];                 // the scale, the offset
  std::int8_t sub_scales[kUnitGroups][2];  // of each group, in the order of the layout
};

// Reads a group from 16 bytes: the first half of its elements in the low nibbles, the second in the high ones.
void read_halves(const std::uint8_t* from, std::uint32_t* quads) {
  for (int quad = 0; quad < kQuads / 2; ++quad) {
    const std::uint32_t both = word(from + quad * 4);
    quads[quad] = both & kNibbles;
    quads[quad + kQuads / 2] = both >> 4 & kNibbles;
  }
}

// Reads a group from 32 bytes that hold two groups: the even one in the low nibbles, the odd one in the high ones.
void read_pair(const std::uint8_t* from, int group, std::uint32_t* quads) {
  for (int quad = 0; quad < kQuads; ++quad)
    quads[quad] = word(from + group / 2 * 32 + quad * 4) >> (group % 2 * 4) & kNibbles;
}

// Returns a word whose bytes have the four lowest bits of `bits` as their fifth bits.
std::uint32_t fifth_bits(unsigned bits) {
  std::uint8_t bytes[4];
  for (unsigned i = 0; i < 4; ++i) bytes[i] = static_cast<std::uint8_t>((bits >> i & 1) << 4);
  return word(bytes);
}

// Reads the 6-bit sub-scales and minima of Q4_K and Q5_K: those of the first four groups have a byte each; those of the
// others have a nibble, and the two highest bits of the bytes before.
Scales scales_and_minima(const std::uint8_t* block) {
  Scales found{{half(block), static_cast<std::uint16_t>(half(block + 2) ^ 0x8000)}, {}};  // minima are subtracted
  const std::uint8_t *scales = block + 4, *minima = block + 8, *rest = block + 12;
  for (int i = 0; i < 4; ++i) {
    found.sub_scales[i][0] = static_cast<std::int8_t>(scales[i] & 63);
    found.sub_scales[i][1] = static_cast<std::int8_t>(minima[i] & 63);
    found.sub_scales[i + 4][0] = static_cast<std::int8_t>((rest[i] & 15) | scales[i] >> 6 << 4);
    found.sub_scales[i + 4][1] = static_cast<std::int8_t>(rest[i] >> 4 | minima[i] >> 6 << 4);
  }
  return found;
}

// ---- Block types: each reads a block's scales, and a group's quantised values, four to a word in order

struct Q8_0 {
  static constexpr int kElements = 32, kBytes = 34;
  static constexpr TileScheme kScheme = TileScheme::int8;
  static Scales scales(const std::uint8_t* block) { return {{half(block), 0}, {}}; }
  static void read_group(const std::uint8_t* block, int /*group*/, std::uint32_t* quads) {
    for (int quad = 0; quad < kQuads; ++quad) quads[quad] = word(block + 2 + quad * 4) ^ 0x80808080;
  }
};

// Blocks of one group: the scale, the minimum if the type has one, the fifth bits if it has 5 bits, and the nibbles.
template <TileScheme kTo>
struct OneGroup {
  static constexpr TileLayout kLayout = layout_of(kTo);
  static constexpr int kQuantsAt = kLayout.offsets ? 4 : 2, kNibblesAt = kQuantsAt + (kLayout.bits == 5 ? 4 : 0);
  static constexpr int kElements = kGroup, kBytes = kNibblesAt + kGroup / 2;
  static constexpr TileScheme kScheme = kTo;
  static Scales scales(const std::uint8_t* block) {
    return {{half(block), kLayout.offsets ? half(block + 2) : std::uint16_t{0}}, {}};
  }
  static void read_group(const std::uint8_t* block, int /*group*/, std::uint32_t* quads) {
    read_halves(block + kNibblesAt, quads);
    if constexpr (kLayout.bits == 5)
      for (int quad = 0; quad < kQuads; ++quad)
        quads[quad] |= fifth_bits(static_cast<unsigned>(block[kQuantsAt + quad / 2]) >> (quad % 2 * 4));
  }
};

struct Q4_K {
  static constexpr int kElements = 256, kBytes = 144;
  static constexpr TileScheme kScheme = TileScheme::q4_k;
  static Scales scales(const std::uint8_t* block) { return scales_and_minima(block); }
  static void read_group(const std::uint8_t* block, int group, std::uint32_t* quads) {
    read_pair(block + 16, group, quads);
  }
};

struct Q5_K {
  static constexpr int kElements = 256, kBytes = 176;
  static constexpr TileScheme kScheme = TileScheme::q5_k;
  static Scales scales(const std::uint8_t* block) { return scales_and_minima(block); }
  static void read_group(const std::uint8_t* block, int group, std::uint32_t* quads) {
    read_pair(block + 48, group, quads);
    for (int quad = 0; quad < kQuads; ++quad) quads[quad] |= (word(block + 16 + quad * 4) >> group & 0x01010101) << 4;
  }
};

struct Q6_K {
  static constexpr int kElements = 256, kBytes = 210;
  static constexpr TileScheme kScheme = TileScheme::q6_k;
  static Scales scales(const std::uint8_t* block) {
    Scales found{{half(block + 208), 0}, {}};
    std::memcpy(found.sub_scales, block + 192, sizeof found.sub_scales);
    return found;
  }
  static void read_group(const std::uint8_t* block, int group, std::uint32_t* quads) {
    const int part = group / 4, quarter = group % 4;
    const std::uint8_t* const low = block + part * 64 + quarter % 2 * 32;
    const std::uint8_t* const high = block + 128 + part * 32;
    for (int quad = 0; quad < kQuads; ++quad)
      quads[quad] = (word(low + quad * 4) >> (quarter / 2 * 4) & kNibbles) |
                    (word(high + quad * 4) >> (quarter * 2) & 0x03030303) << 4;
  }
};

// ---- Tiles

// Writes the quantised values of a row's group into a tile; `to` is the row's first byte in the group.
template <TileScheme kScheme>
void put_quants(const std::uint32_t* quads, std::uint8_t* to) {
  constexpr TileLayout kLayout = layout_of(kScheme);
  constexpr int kStride = 4 * kTileRows;
  const auto put = [to](int part, std::uint32_t value) { std::memcpy(to + part * kStride, &value, sizeof value); };
  if constexpr (kLayout.bits == 8) {
    for (int quad = 0; quad < kQuads; ++quad) put(quad, quads[quad]);
  } else {
    for (int pair = 0; pair < kQuads / 2; ++pair)
      put(pair, (quads[2 * pair] & kNibbles) | (quads[2 * pair + 1] & kNibbles) << 4);
  }
  if constexpr (kLayout.bits == 5 || kLayout.bits == 6) {
    constexpr int kHigh = kLayout.bits - 4, kEach = 8 / kHigh;
    for (int part = 0; part < kQuads / kEach; ++part) {
      std::uint32_t bits = 0;
      for (int i = 0; i < kEach; ++i) bits |= (quads[part * kEach + i] >> 4 & kNibbles) << (i * kHigh);
      put(kQuads / 2 + part, bits);
    }
  }
}

float float_of_half(std::uint16_t bits) {
  const std::uint32_t rest = static_cast<std::uint32_t>(bits & 0x7fff) << 13;
  // Multiplying corrects the exponent's bias, for subnormal numbers as well.
  float value = std::bit_cast<float>(rest) * 0x1p112F;
  if ((bits & 0x7c00) == 0x7c00) value = std::bit_cast<float>(rest | 0x7f800000);
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) | static_cast<std::uint32_t>(bits & 0x8000) << 16);
}

// Rounds to the nearest bfloat16, halves to even.
std::uint16_t bf16_of_half(std::uint16_t half_bits) {
  const auto bits = std::bit_cast<std::uint32_t>(float_of_half(half_bits));
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

bool is_finite(const Scales& scales) {
  return std::ranges::all_of(scales.floats, [](std::uint16_t bits) { return (bits & 0x7c00) != 0x7c00; });
}

template <typename Type>
bool write_tile(const std::uint8_t* blocks, std::int64_t stride, int rows, std::int64_t count,
                const WritableTiles& tile) {
  constexpr TileLayout kLayout = layout_of(Type::kScheme);
  constexpr int kGroups = Type::kElements / kGroup, kFloats = kLayout.unit_floats() / kTileRows;
  constexpr int kSubScales = kLayout.group_sub_scales() / kTileRows;
  WritableTiles to = tile;
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i, blocks += Type::kBytes) {
    for (int row = 0; row < kTileRows; ++row) {
      const bool there = row < rows;
      const std::uint8_t* const block = there ? blocks + row * stride : nullptr;
      const Scales scales = there ? Type::scales(block) : Scales{};
      finite &= is_finite(scales);
      for (int n = 0; n < kFloats; ++n)
        to.scales[n * kTileRows + row] = kLayout.bf16 ? bf16_of_half(scales.floats[n]) : scales.floats[n];
      for (int group = 0; group < kGroups; ++group) {
        std::uint32_t quads[kQuads];
        if (there)
          Type::read_group(block, group, quads);
        else
          std::ranges::fill(quads, static_cast<std::uint32_t>(kLayout.zero) * 0x01010101U);
        put_quants<Type::kScheme>(quads, to.qweight + group * kLayout.group_bytes() + row * 4);
        for (int n = 0; n < kSubScales; ++n)
          to.sub_scales[(group * kSubScales + n) * kTileRows + row] = scales.sub_scales[group][n];
      }
    }
    to.qweight += kGroups * kLayout.group_bytes();
    to.scales += kLayout.unit_floats();
    if constexpr (kLayout.sub_scales) to.sub_scales += kGroups * kLayout.group_sub_scales();
  }
  return finite;
}

// ---- Dequantisation

template <typename Type>
bool decode(const std::uint8_t* block, float* to) {
  constexpr TileLayout kLayout = layout_of(Type::kScheme);
  const Scales scales = Type::scales(block);
  const float whole = float_of_half(scales.floats[0]), least = float_of_half(scales.floats[1]);
  for (int group = 0; group < Type::kElements / kGroup; ++group) {
    std::uint32_t quads[kQuads];
    std::uint8_t quants[kGroup];
    Type::read_group(block, group, quads);
    std::memcpy(quants, quads, sizeof quants);
    const auto sub_scale = [&](int index) { return static_cast<float>(scales.sub_scales[group][index]); };
    const float offset = kLayout.sub_scales ? least * sub_scale(1) : least;
    for (int at = 0; at < kGroup; at += kLayout.elements_per_scale, to += kLayout.elements_per_scale) {
      const float step = kLayout.sub_scales ? whole * sub_scale(at / kLayout.elements_per_scale) : whole;
      for (int i = 0; i < kLayout.elements_per_scale; ++i)
        to[i] = step * static_cast<float>(quants[at + i] - kLayout.zero);
      if constexpr (kLayout.offsets)
        for (int i = 0; i < kLayout.elements_per_scale; ++i) to[i] += offset;
    }
  }
  return is_finite(scales);
}

template <typename Type>
constexpr BlockType type(const char* name) {
  return {name, Type::kElements, Type::kBytes, Type::kScheme, write_tile<Type>, decode<Type>};
}

constexpr BlockType kTypes[] = {
    type<Q8_0>("Q8_0"),
    type<OneGroup<TileScheme::int4>>("Q4_0"),
    type<OneGroup<TileScheme::q4_1>>("Q4_1"),
    type<OneGroup<TileScheme::q5_0>>("Q5_0"),
    type<OneGroup<TileScheme::q5_1>>("Q5_1"),
    type<Q4_K>("Q4_K"),
    type<Q5_K>("Q5_K"),
    type<Q6_K>("Q6_K"),
};

void check(const BlockType& type, const Tensor& blocks, std::int64_t elements, std::int64_t row) {
  if (elements < 1 || row % type.elements != 0)
    throw std::invalid_argument("rows must be of whole blocks of " + std::to_string(type.elements) + " elements");
  if (blocks.dtype != DType::uint8 || blocks.size() != elements / type.elements * type.bytes)
    throw std::invalid_argument(std::to_string(elements) + " elements in " + type.name + " are not " +
                                describe(blocks));
}

}  // namespace

const BlockType& block_type(const std::string& name) {
  const auto* found = std::ranges::find_if(kTypes, [&](const BlockType& type) { return type.name == name; });
  if (found == std::end(kTypes)) throw std::invalid_argument("there are no blocks of type " + name);
  return *found;
}

QuantizedPart tiles_of_blocks(Runtime& runtime, const BlockType& type, const Tensor& blocks, std::int64_t rows,
                              std::int64_t in) {
  check(type, blocks, rows * in, in);
  QuantizedPart part = allocate_tiles(type.scheme, rows, in);
  const std::int64_t tiles = part.qweight.shape[0], row_blocks = in / type.elements;
  const std::int64_t stride = row_blocks * type.bytes;
  std::atomic<bool> finite = true;
  runtime.issue([&](Worker& worker) {
    for (std::int64_t tile; (tile = worker.take()) < tiles;) {
      const QuantizedTiles to = part.from(tile);
      const std::int64_t first = tile * kTileRows;
      if (!type.write_tile(
              static_cast<const std::uint8_t*>(blocks.data) + first * stride, stride,
              static_cast<int>(std::min<std::int64_t>(kTileRows, rows - first)), row_blocks,
              {const_cast<std::uint8_t*>(to.qweight), static_cast<std::uint16_t*>(const_cast<void*>(to.scales)),
               const_cast<std::int8_t*>(to.sub_scales)}))
        finite = false;
    }
  });
  runtime.flush();
  if (!finite) throw std::invalid_argument(kNotFinite);
  return part;
}

void dequantize_blocks(Runtime& runtime, const BlockType& type, const Tensor& blocks, const Tensor& to) {
  if (to.shape.empty() || to.readonly)
    throw std::invalid_argument("dequantize_blocks needs a writable tensor with rows");
  check(type, blocks, to.size(), to.shape.back());
  const std::int64_t count = to.size();
  const auto item = static_cast<std::int64_t>(item_size(to.dtype));
  const Float target = float_of(to.dtype);
  std::atomic<bool> finite = true;
  runtime.issue([&](Worker& worker) {
    std::array<float, kDecoded> floats;
    for (std::int64_t first; (first = worker.take() * kDecoded) < count;) {
      const std::int64_t some = std::min(kDecoded, count - first);
      const auto* block = static_cast<const std::uint8_t*>(blocks.data) + first / type.elements * type.bytes;
      for (std::int64_t i = 0; i < some; i += type.elements, block += type.bytes)
        if (!type.decode(block, floats.data() + i)) finite = false;
      runtime.kernels().convert(floats.data(), Float::f32, static_cast<std::byte*>(to.data) + first * item, target,
                                some);
    }
  });
  runtime.flush();
  if (!finite) throw std::invalid_argument(kNotFinite);
}

}  // namespace vllmlite::cpu
