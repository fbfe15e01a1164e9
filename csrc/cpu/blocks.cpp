// ggml's blocks: repacked into strips, and decoded. Words are four bytes that are never taken for one number, so the
// order of bytes does not matter.
#include "cpu/blocks.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace vllmlite::cpu {

namespace {

constexpr int kQuads = kGroup / 4;
constexpr std::uint32_t kNibbles = 0x0f0f0f0f;
// Elements that a thread decodes at a time.
constexpr std::int64_t kDecoded = 1 << 14;

std::uint32_t word(const std::uint8_t* from) {
  std::uint32_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

std::uint16_t half(const std::uint8_t* from) { return static_cast<std::uint16_t>(from[0] | from[1] << 8); }

// ---- Codes

void signed_bytes(const std::uint8_t* block, int /*group*/, std::uint32_t* quads) {
  for (int quad = 0; quad < kQuads; ++quad) quads[quad] = word(block + 2 + quad * 4) ^ 0x80808080;
}

// 16 bytes with the elements of both halves of a group.
void halves_of_nibbles(const std::uint8_t* from, std::uint32_t* quads) {
  for (int quad = 0; quad < kQuads / 2; ++quad) {
    const std::uint32_t both = word(from + quad * 4);
    quads[quad] = both & kNibbles;
    quads[quad + kQuads / 2] = both >> 4 & kNibbles;
  }
}

template <int kAt>
void nibbles(const std::uint8_t* block, int /*group*/, std::uint32_t* quads) {
  halves_of_nibbles(block + kAt, quads);
}

// The four lowest bits of `bits` as the fifth bits of four bytes.
std::uint32_t fifth_bits(unsigned bits) {
  std::uint8_t bytes[4];
  for (unsigned i = 0; i < 4; ++i) bytes[i] = static_cast<std::uint8_t>((bits >> i & 1) << 4);
  return word(bytes);
}

template <int kAt>
void five_bits(const std::uint8_t* block, int /*group*/, std::uint32_t* quads) {
  halves_of_nibbles(block + kAt + 4, quads);
  for (int quad = 0; quad < kQuads; ++quad)
    quads[quad] |= fifth_bits(static_cast<unsigned>(block[kAt + quad / 2]) >> (quad % 2 * 4));
}

// 32 bytes with the elements of two groups.
void groups_of_nibbles(const std::uint8_t* from, int group, std::uint32_t* quads) {
  for (int quad = 0; quad < kQuads; ++quad)
    quads[quad] = word(from + group / 2 * 32 + quad * 4) >> (group % 2 * 4) & kNibbles;
}

void q4_k(const std::uint8_t* block, int group, std::uint32_t* quads) { groups_of_nibbles(block + 16, group, quads); }

void q5_k(const std::uint8_t* block, int group, std::uint32_t* quads) {
  groups_of_nibbles(block + 48, group, quads);
  for (int quad = 0; quad < kQuads; ++quad) quads[quad] |= (word(block + 16 + quad * 4) >> group & 0x01010101) << 4;
}

void q6_k(const std::uint8_t* block, int group, std::uint32_t* quads) {
  const int part = group / 4, quarter = group % 4;
  const std::uint8_t* const low = block + part * 64 + quarter % 2 * 32;
  const std::uint8_t* const high = block + 128 + part * 32;
  for (int quad = 0; quad < kQuads; ++quad)
    quads[quad] = (word(low + quad * 4) >> (quarter / 2 * 4) & kNibbles) |
                  (word(high + quad * 4) >> (quarter * 2) & 0x03030303) << 4;
}

// ---- Scales

BlockScales scale(const std::uint8_t* block) { return {{half(block), 0}, {}}; }

BlockScales scale_and_minimum(const std::uint8_t* block) { return {{half(block), half(block + 2)}, {}}; }

// Six bits each: of the first four groups in a byte each, of the others a nibble and the bits that those have left.
BlockScales scales_and_minima(const std::uint8_t* block) {
  BlockScales found = scale_and_minimum(block);
  found.floats[1] ^= 0x8000;  // minima are taken away
  const std::uint8_t *scales = block + 4, *minima = block + 8, *rest = block + 12;
  for (int i = 0; i < 4; ++i) {
    found.factors[i][0] = static_cast<std::int8_t>(scales[i] & 63);
    found.factors[i][1] = static_cast<std::int8_t>(minima[i] & 63);
    found.factors[i + 4][0] = static_cast<std::int8_t>((rest[i] & 15) | scales[i] >> 6 << 4);
    found.factors[i + 4][1] = static_cast<std::int8_t>(rest[i] >> 4 | minima[i] >> 6 << 4);
  }
  return found;
}

BlockScales scales_of_halves(const std::uint8_t* block) {
  BlockScales found{{half(block + 208), 0}, {}};
  std::memcpy(found.factors, block + 192, sizeof found.factors);
  return found;
}

constexpr BlockType kTypes[] = {
    {"Q8_0", 32, 34, Codes::int8, signed_bytes, scale},
    {"Q4_0", 32, 18, Codes::int4, nibbles<2>, scale},
    {"Q4_1", 32, 20, Codes::q4_1, nibbles<4>, scale_and_minimum},
    {"Q5_0", 32, 22, Codes::q5_0, five_bits<2>, scale},
    {"Q5_1", 32, 24, Codes::q5_1, five_bits<4>, scale_and_minimum},
    {"Q4_K", 256, 144, Codes::q4_k, q4_k, scales_and_minima},
    {"Q5_K", 256, 176, Codes::q5_k, q5_k, scales_and_minima},
    {"Q6_K", 256, 210, Codes::q6_k, q6_k, scales_of_halves},
};

// ---- Strips

// A group's codes of a row, whose first byte is at `to`.
void put_codes(const Layout& layout, const std::uint32_t* quads, std::uint8_t* to) {
  constexpr int kStride = 4 * kStripRows;
  const auto put = [to](int part, std::uint32_t value) { std::memcpy(to + part * kStride, &value, sizeof value); };
  if (layout.bits == 8) {
    for (int quad = 0; quad < kQuads; ++quad) put(quad, quads[quad]);
    return;
  }
  for (int pair = 0; pair < kQuads / 2; ++pair)
    put(pair, (quads[2 * pair] & kNibbles) | (quads[2 * pair + 1] & kNibbles) << 4);
  const int high = layout.bits - 4;
  if (high == 0) return;
  const int each = 8 / high;
  for (int part = 0; part < kQuads / each; ++part) {
    std::uint32_t bits = 0;
    for (int i = 0; i < each; ++i) bits |= (quads[part * each + i] >> 4 & kNibbles) << (i * high);
    put(kQuads / 2 + part, bits);
  }
}

// What is left of bfloat16, nearest and to even, of a float16.
std::uint16_t bf16_of_half(const Kernels& kernels, std::uint16_t bits) {
  float wide;
  std::uint16_t rounded;
  kernels.convert(&bits, Float::f16, &wide, Float::f32, 1);
  kernels.convert(&wide, Float::f32, &rounded, Float::bf16, 1);
  return rounded;
}

// What is written of a strip.
struct Target {
  std::uint8_t* codes;
  std::uint16_t* scales;
  std::int8_t* factors;
};

void fill(const Layout& layout, std::int64_t groups, const Target& to, int row) {
  std::uint32_t zeros[kQuads];
  std::ranges::fill(zeros, static_cast<std::uint32_t>(layout.zero) * 0x01010101U);
  for (std::int64_t group = 0; group < groups; ++group)
    put_codes(layout, zeros, to.codes + group * layout.group_bytes() + row * 4);
  for (std::int64_t i = 0; i < layout.units(groups) * layout.unit_floats(); i += kStripRows) to.scales[i + row] = 0;
  for (std::int64_t i = 0; i < groups * layout.group_factors(); i += kStripRows) to.factors[i + row] = 0;
}

void put_block(const Kernels& kernels, const BlockType& type, const std::uint8_t* block, const Target& to, int row) {
  const Layout layout = layout_of(type.kind);
  const BlockScales scales = type.read_scales(block);
  for (int i = 0; i < layout.unit_floats() / kStripRows; ++i)
    to.scales[i * kStripRows + row] = layout.bf16 ? bf16_of_half(kernels, scales.floats[i]) : scales.floats[i];
  for (int group = 0; group < type.elements / kGroup; ++group) {
    std::uint32_t quads[kQuads];
    type.read_codes(block, group, quads);
    put_codes(layout, quads, to.codes + group * layout.group_bytes() + row * 4);
    for (int i = 0; i < layout.group_factors() / kStripRows; ++i)
      to.factors[group * layout.group_factors() + i * kStripRows + row] = scales.factors[group][i];
  }
}

// Where the strips of `part` are written.
Target target(const QuantizedPart& part, std::int64_t strip) {
  const QuantizedStrips strips = part.from(strip);
  return {const_cast<std::uint8_t*>(strips.codes), const_cast<std::uint16_t*>(strips.scales),
          const_cast<std::int8_t*>(strips.factors)};
}

// ---- Floats

void decode(const Kernels& kernels, const BlockType& type, const std::uint8_t* block, float* to) {
  const Layout layout = layout_of(type.kind);
  const BlockScales scales = type.read_scales(block);
  float floats[2];
  kernels.convert(scales.floats, Float::f16, floats, Float::f32, 2);
  for (int group = 0; group < type.elements / kGroup; ++group) {
    std::uint32_t quads[kQuads];
    std::uint8_t codes[kGroup];
    type.read_codes(block, group, quads);
    std::memcpy(codes, quads, sizeof codes);
    const auto factor = [&](int index) { return static_cast<float>(scales.factors[group][index]); };
    const float offset = layout.factors ? floats[1] * factor(1) : floats[1];
    for (int at = 0; at < kGroup; at += layout.sharing, to += layout.sharing) {
      const float step = layout.factors ? floats[0] * factor(at / layout.sharing) : floats[0];
      for (int i = 0; i < layout.sharing; ++i) to[i] = step * static_cast<float>(codes[at + i] - layout.zero);
      if (layout.offsets)
        for (int i = 0; i < layout.sharing; ++i) to[i] += offset;
    }
  }
}

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
  runtime.issue([&](Worker& worker) {
    const Layout layout = layout_of(type.kind);
    const std::int64_t groups = type.elements / kGroup, floats = layout.unit_floats();
    for (std::int64_t strip; (strip = worker.take()) < strips;) {
      const Target to = target(part, strip);
      for (int row = 0; row < kStripRows; ++row) {
        if (strip * kStripRows + row >= rows) {
          fill(layout, part.groups(), to, row);
          continue;
        }
        const auto* block = static_cast<const std::uint8_t*>(blocks.data) +
                            (strip * kStripRows + row) * row_blocks * type.bytes;
        Target at = to;
        for (std::int64_t i = 0; i < row_blocks; ++i, block += type.bytes) {
          put_block(runtime.kernels(), type, block, at, row);
          at.codes += groups * layout.group_bytes();
          at.scales += floats;
          if (at.factors != nullptr) at.factors += groups * layout.group_factors();
        }
      }
    }
  });
  runtime.flush();
  return part;
}

void floats_of_blocks(Runtime& runtime, const BlockType& type, const Tensor& blocks, const Tensor& to) {
  if (to.shape.empty() || to.readonly) throw std::invalid_argument("floats need rows that can be written");
  check(type, blocks, to.size(), to.shape.back());
  const std::int64_t count = to.size();
  const auto item = static_cast<std::int64_t>(item_size(to.dtype));
  runtime.issue([&](Worker& worker) {
    std::vector<float> wide(kDecoded);
    for (std::int64_t first; (first = worker.take() * kDecoded) < count;) {
      const std::int64_t some = std::min(kDecoded, count - first);
      const auto* block = static_cast<const std::uint8_t*>(blocks.data) + first / type.elements * type.bytes;
      for (std::int64_t i = 0; i < some; i += type.elements, block += type.bytes)
        decode(runtime.kernels(), type, block, wide.data() + i);
      runtime.kernels().convert(wide.data(), Float::f32,
                                static_cast<std::byte*>(to.data) + first * item, float_of(to.dtype), some);
    }
  });
  runtime.flush();
}

}  // namespace vllmlite::cpu
