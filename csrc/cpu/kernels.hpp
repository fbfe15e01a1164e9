// The kernels that are compiled once for each instruction set, behind one table of function pointers. This header is
// read by code built for newer CPUs than the one it may run on: it holds plain data only, and nothing inline.
#pragma once

#include <cstddef>
#include <cstdint>

#include "contract/activation.hpp"

namespace vllmlite::cpu {

enum class Float : std::uint8_t { f32, f16, bf16 };
inline constexpr int kFloats = 3;

// Elements of x and w that are summed before the sum is added to y: part of the definition of a product's bits.
inline constexpr int kLinearChunk = 2048;

// With more rows of x than this, w is copied into a better order first.
inline constexpr int kLinearFew = 32;

// Most rows of w in a block, or in both.
inline constexpr int kLinearRows = 96;

// Keys that are weighed together, at multiples of it from position 0: part of the definition of attention's bits.
inline constexpr int kKeyChunk = 64;

// Rows (queries times the heads of a group) that one attention tile holds at most.
inline constexpr int kAttentionRows = 32;

// Head sizes are padded to a multiple of this in the cache.
inline constexpr int kHeadUnit = 16;

// Least scale of an int8 cache's head, the smallest normal number: heads of zeros are divided as all others are.
inline constexpr float kLeastScale = 0x1p-126F;

// Weights of integer codes in groups along k, as vllmlite/weights/schemes/grouped.py has them. A tile holds
// kGroupedRows rows: their scales [group][row]; where there are such, their zeros [group][row], a byte each; and from
// the next cache line on their codes, in the order of the kernel that multiplies them, filled up to multiples of
// kGroupedDepth columns. An element is (code - zero) * scale.
inline constexpr int kGroupedRows = 4;
inline constexpr int kGroupedDepth = 128;
inline constexpr int kGroupUnit = 32;  // group sizes are multiples of it

struct GroupedLayout {
  int bits = 0;   // 4 or 8; 0: the weight is of floats
  int group = 0;  // columns
  Float scale = Float::f16;
  bool zeros = false;  // otherwise all zeros are 2^(bits - 1)

  constexpr int groups(int k) const { return (k + group - 1) / group; }
  constexpr std::size_t scale_bytes(int k) const {
    return static_cast<std::size_t>(groups(k)) * kGroupedRows * (scale == Float::f32 ? 4 : 2);
  }
  constexpr std::size_t codes_at(int k) const {
    const std::size_t zero_bytes = zeros ? static_cast<std::size_t>(groups(k)) * kGroupedRows : 0;
    return (scale_bytes(k) + zero_bytes + 63) / 64 * 64;
  }
  constexpr std::size_t tile_bytes(int k) const {
    const auto padded = static_cast<std::size_t>((k + kGroupedDepth - 1) / kGroupedDepth * kGroupedDepth);
    return codes_at(k) + padded * kGroupedRows * static_cast<std::size_t>(bits) / 8;
  }
  bool operator==(const GroupedLayout&) const = default;
};

// Rows of a stored weight, at most kGroupedRows, that become a tile.
struct GroupedTile {
  const std::uint8_t* codes;  // row-major, the first of a byte in its low bits
  const std::byte* scales;
  const std::uint8_t* zeros;  // null: none
  int rows, k;
  GroupedLayout layout;
  std::byte* to;
};

// Rows of x that a product takes, in the order in which its kernel goes through them: in panels of a few rows each.
struct LinearInput {
  const void* x;  // row-major, of LinearKernel::input
  int m;
  int k;
  void* panels;  // LinearKernel::packed_bytes
};

// y[m][n] = sum over k of x[m][k] * w[n][k], plus bias[n]; strides in elements. There may be a second block of w with
// n rows of its own, whose sums lie n elements behind those of the first.
struct LinearBlock {
  const void* x;  // the panels, or where packed_bytes is 0 the rows one after the other
  int m;
  const void* w[2];         // rows, or tiles; the second null: none
  std::ptrdiff_t w_stride;  // from row to row
  GroupedLayout layout;     // of tiles
  int n;
  int k;
  float* y;
  std::ptrdiff_t y_stride;
  const float* bias[2];  // null: none
  const void* next[2];   // what this thread does next in the place of w, n rows of the same stride; null: none
  bool fetch;            // whether to fetch what comes next while at it
  std::byte* scratch;    // LinearKernel::scratch_bytes
};

struct LinearKernel {
  Float input;                                 // what x must be
  std::size_t (*packed_bytes)(int m, int k);   // of all panels; 0: rows are taken as they are
  std::size_t (*scratch_bytes)(int m, int k);  // for blocks of up to kLinearRows rows of w
  int (*panels)(int m);
  void (*pack)(const LinearInput& input, int panel);
  void (*run)(const LinearBlock& block);
};

// The product with weights in groups, and how tiles of these are made.
struct GroupedKernel {
  LinearKernel linear;
  void (*pack_tile)(const GroupedTile& tile);
};

// Elements along k that x has a scale for, and rows of w that lie together.
inline constexpr int kGroup = 32;
inline constexpr int kStripRows = 16;
// Groups of w that share a scale which factors multiply.
inline constexpr int kUnitGroups = 8;

// Kinds of quantised weights. vllmlite/weights/schemes/tiles.py has their layout, of strips of kStripRows rows.
enum class Codes : std::uint8_t { int8, int4, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k };
inline constexpr int kCodes = 8;

// What tells kinds apart: an element is its scale times (code - zero), plus its offset where there are such. Scales and
// offsets are floats a group, in float16 unless `bf16`; or floats a unit of kUnitGroups groups times signed bytes.
struct Layout {
  int bits, zero;
  bool bf16 = false;
  bool offsets = false;
  bool factors = false;
  int sharing = kGroup;  // elements with one scale

  constexpr int scales_a_group() const { return kGroup / sharing; }
  constexpr int group_bytes() const { return kGroup * kStripRows * bits / 8; }
  constexpr std::int64_t units(std::int64_t groups) const {
    return factors ? (groups + kUnitGroups - 1) / kUnitGroups : groups;
  }
  constexpr int unit_floats() const { return kStripRows * (offsets ? 2 : 1); }  // of scales and offsets
  constexpr int group_factors() const { return factors ? kStripRows * (scales_a_group() + (offsets ? 1 : 0)) : 0; }
};

constexpr Layout layout_of(Codes codes) {
  switch (codes) {
    case Codes::int8:
      return {.bits = 8, .zero = 128, .bf16 = true};
    case Codes::int4:
      return {.bits = 4, .zero = 8, .bf16 = true};
    case Codes::q4_1:
      return {.bits = 4, .zero = 0, .offsets = true};
    case Codes::q5_0:
      return {.bits = 5, .zero = 16};
    case Codes::q5_1:
      return {.bits = 5, .zero = 0, .offsets = true};
    case Codes::q4_k:
      return {.bits = 4, .zero = 0, .offsets = true, .factors = true};
    case Codes::q5_k:
      return {.bits = 5, .zero = 0, .offsets = true, .factors = true};
    case Codes::q6_k:
      break;
  }
  return {.bits = 6, .zero = 32, .factors = true, .sharing = kGroup / 2};
}

// Strips of a quantised weight.
struct QuantizedStrips {
  const std::uint8_t* codes;
  const std::uint16_t* scales;
  const std::int8_t* factors;  // null: the kind has none
};

// A row of x, or rows of it: what products with it need.
struct QuantizedX {
  std::int8_t* codes;   // [m][groups][kGroup]
  float* scales;        // [m][groups]
  std::int32_t* sums;   // [m][groups]: of codes
  std::int32_t* first;  // [m][groups]: of the first half of a group's codes
  float* totals;        // [m][groups]: scales times sums
};

// y[m][n] = sum over groups of x_scale * (scale * sum of x * (code - zero) + offset * sum of x), plus bias[n].
struct QuantizedBlock {
  QuantizedX x;
  int m;
  QuantizedStrips w;
  int n;  // rows of w
  int groups;
  float* y;
  std::ptrdiff_t y_stride;
  const float* bias;         // null: none
  const std::uint8_t* next;  // codes of the block that this thread does next, as many; null: none
};

// A row of x, quantised in groups, the last one filled up with zeros.
struct QuantizedRow {
  const float* x;
  int size;
  QuantizedX to;
};

// The kinds that floats are quantised to.
inline constexpr int kMadeCodes = 2;

// Rows of w, at most kStripRows, quantised into a strip, which is filled up with zeros.
struct QuantizedStrip {
  const void* w;
  Float type;
  std::ptrdiff_t stride;  // in elements
  int rows;
  int size;
  std::uint8_t* codes;
  std::uint16_t* scales;
};

// out = norm(x + residual) * weight, and sum = x + residual where a residual is given.
struct NormRow {
  const float* x;
  const float* residual;  // null: none
  float* sum;             // may be residual; null without one
  const void* weight;
  Float weight_type;
  void* out;
  Float out_type;
  int size;
  float eps;
};

// out = (x + residual - mean) / deviation * weight + bias.
struct LayerNormRow : NormRow {
  const void* bias;  // of the weight's type; null: none
};

// One head of q or k, in place: norm where there is a weight, then rotation where there are cosines.
struct HeadRow {
  float* x;
  int size;
  const void* weight;  // null: no norm
  Float weight_type;
  float eps;
  const float* cos_sin;  // null: no rotation
  int rotary_dim;
  bool interleaved;
};

struct AttentionTile {
  const float* q;           // the first query's first head of the group
  std::ptrdiff_t q_stride;  // from query to query
  int queries;
  int group;                  // query heads of the key/value head
  int position;               // of the first query
  int window;                 // tokens that a query sees with itself
  const std::int32_t* table;  // blocks of the sequence
  const std::byte* keys;      // the key/value head's in block 0
  const std::byte* values;
  std::ptrdiff_t block_stride;  // bytes from block to block
  int block_size;
  int head_dim;
  float scale;
  float soft_cap;       // scores s become soft_cap * tanh(s / soft_cap); 0: they do not
  const float* slopes;  // of the group's heads, times the distance to a key; null: none
  void* out;            // the first query's
  Float out_type;
  std::ptrdiff_t out_stride;
  std::byte* scratch;  // attention_scratch(head_dim) bytes, 64-byte aligned
};

constexpr int padded_head(int head_dim) { return (head_dim + kHeadUnit - 1) / kHeadUnit * kHeadUnit; }

constexpr std::size_t attention_scratch(int head_dim) {
  const auto padded = static_cast<std::size_t>(padded_head(head_dim));
  // Queries and outputs; scores, lane sums, maxima and factors; a gathered chunk of keys.
  return kAttentionRows * (2 * padded + kKeyChunk + 16 + 16) * sizeof(float) + kKeyChunk * padded * sizeof(float);
}

struct Kernels {
  const char* isa;
  LinearKernel linear[kFloats];  // by the type of w
  GroupedKernel grouped[2];      // for x in float32; in bfloat16, where a product takes that

  void (*quantized[kCodes])(const QuantizedBlock&);
  void (*quantize_x)(const QuantizedRow&);
  bool (*quantize_strip[kMadeCodes])(const QuantizedStrip&);  // false if a weight is not finite
  void (*convert)(const void* from, Float from_type, void* to, Float to_type, std::int64_t count);
  void (*rms_norm)(const NormRow&);
  void (*layer_norm)(const LayerNormRow&);
  void (*prepare_head)(const HeadRow&);
  // out = f(x), times up where it is not null.
  void (*activate)(Activation f, const float* x, const float* up, void* out, Float out_type, int size);
  void (*soft_cap)(float* x, float cap, std::int64_t size);
  // y += factor * x
  void (*add_scaled)(const float* x, float factor, float* y, std::int64_t size);
  void (*attention[kFloats])(const AttentionTile&);  // by the type of the cache
  void (*attention_int8)(const AttentionTile&);
  // Turns a head into codes of an int8 cache; returns their scale.
  float (*quantize_head)(const float* x, std::int8_t* codes, int size);
  // The lowest index of the largest value; NaN counts as less than everything.
  std::int64_t (*argmax)(const float* x, std::int64_t size);
  // out = exp((x - largest) * factor), 0 where x < least.
  void (*weights)(const float* x, float largest, float factor, float least, float* out, std::int64_t size);
};

}  // namespace vllmlite::cpu
