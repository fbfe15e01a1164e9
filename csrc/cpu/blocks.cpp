// ggml's blocks: repacked into strips, and decoded. Words are four bytes that are never taken for one number, so the
// order of bytes does not matter.
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
// Elements that a thread decodes at a time.
constexpr std::int64_t kDecoded = 1 << 14;
constexpr const char* kNotFinite = "a block's scale is not finite";

std::uint32_t word(const std::uint8_t* from) {
  std::uint32_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

std::uint16_t half(const std::uint8_t* from) { return static_cast<std::uint16_t>(from[0] | from[1] << 8); }

// Scales of a block as they stand there: float16 bits, and what those of its groups are multiplied by.
struct Scales {
  std::uint16_t floats[2];              // of the scale; of the offset
  std::int8_t factors[kUnitGroups][2];  // of a group, in the order of the layout
};

// 16 bytes with the elements of both halves of a group.
void read_halves(const std::uint8_t* from, std::uint32_t* quads) {
  for (int quad = 0; quad < kQuads / 2; ++quad) {
    const std::uint32_t both = word(from + quad * 4);
    quads[quad] = both & kNibbles;
    quads[quad + kQuads / 2] = both >> 4 & kNibbles;
  }
}

// 32 bytes with the elements of two groups.
void read_pair(const std::uint8_t* from, int group, std::uint32_t* quads) {
  for (int quad = 0; quad < kQuads; ++quad)
    quads[quad] = word(from + group / 2 * 32 + quad * 4) >> (group % 2 * 4) & kNibbles;
}

// The four lowest bits of `bits` as the fifth bits of four bytes.
std::uint32_t fifth_bits(unsigned bits) {
  std::uint8_t bytes[4];
  for (unsigned i = 0; i < 4; ++i) bytes[i] = static_cast<std::uint8_t>((bits >> i & 1) << 4);
  return word(bytes);
}

// Six bits each: of the first four groups in a byte each, of the others a nibble and the bits that those have left.
Scales scales_and_minima(const std::uint8_t* block) {
  Scales found{{half(block), static_cast<std::uint16_t>(half(block + 2) ^ 0x8000)}, {}};  // minima are taken away
  const std::uint8_t *scales = block + 4, *minima = block + 8, *rest = block + 12;
  for (int i = 0; i < 4; ++i) {
    found.factors[i][0] = static_cast<std::int8_t>(scales[i] & 63);
    found.factors[i][1] = static_cast<std::int8_t>(minima[i] & 63);
    found.factors[i + 4][0] = static_cast<std::int8_t>((rest[i] & 15) | scales[i] >> 6 << 4);
    found.factors[i + 4][1] = static_cast<std::int8_t>(rest[i] >> 4 | minima[i] >> 6 << 4);
  }
  return found;
}

// ---- Types: the codes of a group, four a word in the order of elements, and a block's scales

struct Q8_0 {
  static constexpr int kElements = 32, kBytes = 34;
  static constexpr Codes kKind = Codes::int8;
  static Scales scales(const std::uint8_t* block) { return {{half(block), 0}, {}}; }
  static void codes(const std::uint8_t* block, int /*group*/, std::uint32_t* quads) {
    for (int quad = 0; quad < kQuads; ++quad) quads[quad] = word(block + 2 + quad * 4) ^ 0x80808080;
  }
};

// Scales, and minima where there are such, are followed by the fifth bits, and these by nibbles.
template <Codes kOurs>
struct OneGroup {
  static constexpr Layout kLayout = layout_of(kOurs);
  static constexpr int kCodesAt = kLayout.offsets ? 4 : 2, kNibblesAt = kCodesAt + (kLayout.bits == 5 ? 4 : 0);
  static constexpr int kElements = kGroup, kBytes = kNibblesAt + kGroup / 2;
  static constexpr Codes kKind = kOurs;
  static Scales scales(const std::uint8_t* block) {
    return {{half(block), kLayout.offsets ? half(block + 2) : std::uint16_t{0}}, {}};
  }
  static void codes(const std::uint8_t* block, int /*group*/, std::uint32_t* quads) {
    read_halves(block + kNibblesAt, quads);
    if constexpr (kLayout.bits == 5)
      for (int quad = 0; quad < kQuads; ++quad)
        quads[quad] |= fifth_bits(static_cast<unsigned>(block[kCodesAt + quad / 2]) >> (quad % 2 * 4));
  }
};

struct Q4_K {
  static constexpr int kElements = 256, kBytes = 144;
  static constexpr Codes kKind = Codes::q4_k;
  static Scales scales(const std::uint8_t* block) { return scales_and_minima(block); }
  static void codes(const std::uint8_t* block, int group, std::uint32_t* quads) { read_pair(block + 16, group, quads); }
};

struct Q5_K {
  static constexpr int kElements = 256, kBytes = 176;
  static constexpr Codes kKind = Codes::q5_k;
  static Scales scales(const std::uint8_t* block) { return scales_and_minima(block); }
  static void codes(const std::uint8_t* block, int group, std::uint32_t* quads) {
    read_pair(block + 48, group, quads);
    for (int quad = 0; quad < kQuads; ++quad) quads[quad] |= (word(block + 16 + quad * 4) >> group & 0x01010101) << 4;
  }
};

struct Q6_K {
  static constexpr int kElements = 256, kBytes = 210;
  static constexpr Codes kKind = Codes::q6_k;
  static Scales scales(const std::uint8_t* block) {
    Scales found{{half(block + 208), 0}, {}};
    std::memcpy(found.factors, block + 192, sizeof found.factors);
    return found;
  }
  static void codes(const std::uint8_t* block, int group, std::uint32_t* quads) {
    const int part = group / 4, quarter = group % 4;
    const std::uint8_t* const low = block + part * 64 + quarter % 2 * 32;
    const std::uint8_t* const high = block + 128 + part * 32;
    for (int quad = 0; quad < kQuads; ++quad)
      quads[quad] = (word(low + quad * 4) >> (quarter / 2 * 4) & kNibbles) |
                    (word(high + quad * 4) >> (quarter * 2) & 0x03030303) << 4;
  }
};

// ---- Strips

// A group's codes of a row, whose first byte is at `to`.
template <Codes kKind>
void put_codes(const std::uint32_t* quads, std::uint8_t* to) {
  constexpr Layout kLayout = layout_of(kKind);
  constexpr int kStride = 4 * kStripRows;
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
  // Multiplying rebases the exponent, which makes subnormal numbers right as well.
  float value = std::bit_cast<float>(rest) * 0x1p112F;
  if ((bits & 0x7c00) == 0x7c00) value = std::bit_cast<float>(rest | 0x7f800000);
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) | static_cast<std::uint32_t>(bits & 0x8000) << 16);
}

// The nearest, even ones between two.
std::uint16_t bf16_of_half(std::uint16_t half_bits) {
  const auto bits = std::bit_cast<std::uint32_t>(float_of_half(half_bits));
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

bool is_finite(const Scales& scales) {
  return std::ranges::all_of(scales.floats, [](std::uint16_t bits) { return (bits & 0x7c00) != 0x7c00; });
}

template <typename Type>
bool put_strip(const std::uint8_t* blocks, std::int64_t stride, int rows, std::int64_t count,
               const WritableStrips& strip) {
  constexpr Layout kLayout = layout_of(Type::kKind);
  constexpr int kGroups = Type::kElements / kGroup, kFloats = kLayout.unit_floats() / kStripRows;
  constexpr int kFactors = kLayout.group_factors() / kStripRows;
  WritableStrips to = strip;
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i, blocks += Type::kBytes) {
    for (int row = 0; row < kStripRows; ++row) {
      const bool there = row < rows;
      const std::uint8_t* const block = there ? blocks + row * stride : nullptr;
      const Scales scales = there ? Type::scales(block) : Scales{};
      finite &= is_finite(scales);
      for (int n = 0; n < kFloats; ++n)
        to.scales[n * kStripRows + row] = kLayout.bf16 ? bf16_of_half(scales.floats[n]) : scales.floats[n];
      for (int group = 0; group < kGroups; ++group) {
        std::uint32_t quads[kQuads];
        if (there)
          Type::codes(block, group, quads);
        else
          std::ranges::fill(quads, static_cast<std::uint32_t>(kLayout.zero) * 0x01010101U);
        put_codes<Type::kKind>(quads, to.codes + group * kLayout.group_bytes() + row * 4);
        for (int n = 0; n < kFactors; ++n)
          to.factors[(group * kFactors + n) * kStripRows + row] = scales.factors[group][n];
      }
    }
    to.codes += kGroups * kLayout.group_bytes();
    to.scales += kLayout.unit_floats();
    if constexpr (kLayout.factors) to.factors += kGroups * kLayout.group_factors();
  }
  return finite;
}

// ---- Floats

template <typename Type>
bool decode(const std::uint8_t* block, float* to) {
  constexpr Layout kLayout = layout_of(Type::kKind);
  const Scales scales = Type::scales(block);
  const float whole = float_of_half(scales.floats[0]), least = float_of_half(scales.floats[1]);
  for (int group = 0; group < Type::kElements / kGroup; ++group) {
    std::uint32_t quads[kQuads];
    std::uint8_t codes[kGroup];
    Type::codes(block, group, quads);
    std::memcpy(codes, quads, sizeof codes);
    const auto factor = [&](int index) { return static_cast<float>(scales.factors[group][index]); };
    const float offset = kLayout.factors ? least * factor(1) : least;
    for (int at = 0; at < kGroup; at += kLayout.sharing, to += kLayout.sharing) {
      const float step = kLayout.factors ? whole * factor(at / kLayout.sharing) : whole;
      for (int i = 0; i < kLayout.sharing; ++i) to[i] = step * static_cast<float>(codes[at + i] - kLayout.zero);
      if constexpr (kLayout.offsets)
        for (int i = 0; i < kLayout.sharing; ++i) to[i] += offset;
    }
  }
  return is_finite(scales);
}

template <typename Type>
constexpr BlockType type(const char* name) {
  return {name, Type::kElements, Type::kBytes, Type::kKind, put_strip<Type>, decode<Type>};
}

constexpr BlockType kTypes[] = {
    type<Q8_0>("Q8_0"),
    type<OneGroup<Codes::int4>>("Q4_0"),
    type<OneGroup<Codes::q4_1>>("Q4_1"),
    type<OneGroup<Codes::q5_0>>("Q5_0"),
    type<OneGroup<Codes::q5_1>>("Q5_1"),
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

QuantizedPart strips_of_blocks(Runtime& runtime, const BlockType& type, const Tensor& blocks, std::int64_t rows,
                               std::int64_t in) {
  check(type, blocks, rows * in, in);
  QuantizedPart part = allocate_strips(type.kind, rows, in);
  const std::int64_t strips = part.codes.shape[0], row_blocks = in / type.elements;
  const std::int64_t stride = row_blocks * type.bytes;
  std::atomic<bool> finite = true;
  runtime.issue([&](Worker& worker) {
    for (std::int64_t strip; (strip = worker.take()) < strips;) {
      const QuantizedStrips to = part.from(strip);
      const std::int64_t first = strip * kStripRows;
      if (!type.put_strip(static_cast<const std::uint8_t*>(blocks.data) + first * stride, stride,
                          static_cast<int>(std::min<std::int64_t>(kStripRows, rows - first)), row_blocks,
                          {const_cast<std::uint8_t*>(to.codes), const_cast<std::uint16_t*>(to.scales),
                           const_cast<std::int8_t*>(to.factors)}))
        finite = false;
    }
  });
  runtime.flush();
  if (!finite) throw std::invalid_argument(kNotFinite);
  return part;
}

void floats_of_blocks(Runtime& runtime, const BlockType& type, const Tensor& blocks, const Tensor& to) {
  if (to.shape.empty() || to.readonly) throw std::invalid_argument("floats need rows that can be written");
  check(type, blocks, to.size(), to.shape.back());
  const std::int64_t count = to.size();
  const auto item = static_cast<std::int64_t>(item_size(to.dtype));
  const Float target = float_of(to.dtype);
  std::atomic<bool> finite = true;
  runtime.issue([&](Worker& worker) {
    std::array<float, kDecoded> wide;
    for (std::int64_t first; (first = worker.take() * kDecoded) < count;) {
      const std::int64_t some = std::min(kDecoded, count - first);
      const auto* block = static_cast<const std::uint8_t*>(blocks.data) + first / type.elements * type.bytes;
      for (std::int64_t i = 0; i < some; i += type.elements, block += type.bytes)
        if (!type.decode(block, wide.data() + i)) finite = false;
      runtime.kernels().convert(wide.data(), Float::f32, static_cast<std::byte*>(to.data) + first * item, target, some);
    }
  });
  runtime.flush();
  if (!finite) throw std::invalid_argument(kNotFinite);
}

}  // namespace vllmlite::cpu
