// The kernels that are compiled once for each instruction set, behind one table of function pointers. Code built for
// newer CPUs than the one it may run on includes this header: it holds plain data only, and nothing inline.
#pragma once

#include <cstddef>
#include <cstdint>

#include "contract/activation.hpp"

namespace vllmlite::cpu {

enum class Float : std::uint8_t { f32, f16, bf16 };
inline constexpr int kFloats = 3;

// Elements along k that are summed before the sum is added to y. The order of additions, and so the bits of a product,
// depends on it.
inline constexpr int kLinearChunk = 2048;

// The most rows of x in a skinny GEMM, which reads w in place. With more rows, w is packed into panels first.
inline constexpr int kSkinnyRows = 32;

// The most rows of w that a LinearBlock has, in its two weights together.
inline constexpr int kLinearBlockRows = 96;

// Keys that one update of the running softmax covers, in chunks that begin at multiples of it. The bits of attention's
// results depend on it.
inline constexpr int kKeyChunk = 64;

// The most rows (queries times the query heads of a key/value head) in an attention tile.
inline constexpr int kAttentionRows = 32;

// The cache pads head sizes to a multiple of this.
inline constexpr int kHeadUnit = 16;

// Quantised formats of the cache: int8, e4m3, e5m2.
inline constexpr int kByteFormats = 3;

// Least scale of a head of its own, the smallest normal number: heads of zeros are divided as all others are.
inline constexpr float kLeastScale = 0x1p-126F;

// Integer weights with a scale per group along k (vllmlite/weights/schemes/grouped.py), repacked into tiles. A tile
// holds kGroupedRows rows: their scales [group][row]; their zeros [group][row], one byte each, if the weight has any;
// and, from the next cache line on, their quantised values in the order in which the kernel reads them, padded to a
// multiple of kGroupedDepth columns. An element is (value - zero) * scale.
inline constexpr int kGroupedRows = 4;
inline constexpr int kGroupedDepth = 128;
inline constexpr int kGroupUnit = 32;  // group sizes are multiples of it

struct GroupedLayout {
  int bits = 0;   // 4 or 8; 0: the weight holds floats
  int group = 0;  // columns in a group
  Float scale = Float::f16;
  bool zeros = false;   // otherwise all zeros are 2^(bits - 1)
  bool floats = false;  // the values are floats: e2m1 of 4 bits, e4m3 of 8 bits

  constexpr int groups(int k) const { return (k + group - 1) / group; }
  constexpr std::size_t scale_bytes(int k) const {
    return static_cast<std::size_t>(groups(k)) * kGroupedRows * (scale == Float::f32 ? 4 : 2);
  }
  constexpr std::size_t qweight_at(int k) const {
    const std::size_t zero_bytes = zeros ? static_cast<std::size_t>(groups(k)) * kGroupedRows : 0;
    return (scale_bytes(k) + zero_bytes + 63) / 64 * 64;
  }
  constexpr std::size_t tile_bytes(int k) const {
    const auto padded = static_cast<std::size_t>((k + kGroupedDepth - 1) / kGroupedDepth * kGroupedDepth);
    return qweight_at(k) + padded * kGroupedRows * static_cast<std::size_t>(bits) / 8;
  }
  bool operator==(const GroupedLayout&) const = default;
};

// Up to kGroupedRows rows of a stored weight, to be packed into one tile.
struct GroupedTile {
  const std::uint8_t* qweight;  // row-major, the first value of a byte in its low bits
  const std::byte* scales;
  const std::uint8_t* zeros;  // null: none
  int rows, k;
  GroupedLayout layout;
  std::byte* to;
};

// Rows of x to be packed into panels: a few rows each, in the order in which a product's kernel reads them.
struct LinearInput {
  const void* x;  // row-major, of LinearKernel::input
  int m;
  int k;
  void* panels;  // LinearKernel::packed_bytes
};

// y[m][n] = sum over k of x[m][k] * w[n][k], plus bias[n]; strides are in elements. There may be a second weight, also
// of n rows, whose results are at y[m][n .. 2n).
struct LinearBlock {
  const void* x;  // the packed panels; row-major if packed_bytes is 0
  int m;
  const void* w[2];         // rows, or tiles; the second is null if there is none
  std::ptrdiff_t w_stride;  // from row to row
  GroupedLayout layout;     // of tiles
  int n;
  int k;
  float* y;
  std::ptrdiff_t y_stride;
  const float* bias[2];  // null: none
  const void* next[2];   // the w of this thread's next block, for prefetching: n rows of the same stride; null: none
  bool fetch;            // whether to prefetch
  std::byte* scratch;    // LinearKernel::scratch_bytes
};

// The most rows of x that the first factor of a low-rank product takes at a time.
inline constexpr int kShrinkTokens = 16;

// Columns in a block of the second factor of a low-rank product.
inline constexpr int kLowRankColumns = 64;

// y[m][n] += sum over r of low[m][r] * scale * b[r][n].
struct LowRankExpand {
  const float* low;
  std::ptrdiff_t low_stride;
  int m;
  int rank;
  float scale;
  const void* b;  // blocks [rank][kLowRankColumns]
  int n;
  float* y;
  std::ptrdiff_t y_stride;
};

struct LinearKernel {
  Float input;                                 // the type that x must have
  std::size_t (*packed_bytes)(int m, int k);   // of all panels; 0: x is read in place
  std::size_t (*scratch_bytes)(int m, int k);  // for blocks of up to kLinearBlockRows rows of w
  int (*panels)(int m);
  void (*pack)(const LinearInput& input, int panel);
  void (*run)(const LinearBlock& block);
};

// The product with grouped integer weights, and the packing of their tiles.
struct GroupedKernel {
  LinearKernel linear;
  void (*pack_tile)(const GroupedTile& tile);
};

// Elements along k that share a scale of x, and rows of a tile of w.
inline constexpr int kGroup = 32;
inline constexpr int kTileRows = 16;
// Groups of w that share one scale, which sub-scales multiply.
inline constexpr int kUnitGroups = 8;

// The schemes of vllmlite/weights/schemes/tiles.py, which documents their layout in tiles of kTileRows rows. The tiles
// of the others hold quantised values in the same order: w8a8 unsigned bytes 128 larger, and a RowScales; w4a8_grouped
// and w8a8_grouped those of vllmlite/weights/schemes/grouped.py, with scales and zeros [scale group][row].
enum class TileScheme : std::uint8_t {
  int8,
  int4,
  q4_1,
  q5_0,
  q5_1,
  q4_k,
  q5_k,
  q6_k,
  w8a8,
  w4a8_grouped,
  w8a8_grouped
};
inline constexpr int kTileSchemes = 11;

// How a scheme stores its elements: an element is scale * (value - zero), plus an offset if `offsets`. Each group has
// float16 scales and offsets, bfloat16 if `bf16`; or, if `sub_scales`, each unit of kUnitGroups groups has them, and
// they are multiplied by signed bytes of each group. If `row_scales`, there is one scale per row only. If `grouped`,
// several groups share a scale of any type and a zero (QuantizedTiles has the number and the type).
struct TileLayout {
  int bits, zero;
  bool bf16 = false;
  bool offsets = false;
  bool sub_scales = false;
  int elements_per_scale = kGroup;
  bool row_scales = false;
  bool grouped = false;

  constexpr int scales_per_group() const { return kGroup / elements_per_scale; }
  constexpr int group_bytes() const { return kGroup * kTileRows * bits / 8; }
  constexpr std::int64_t units(std::int64_t groups) const {
    return sub_scales ? (groups + kUnitGroups - 1) / kUnitGroups : groups;
  }
  constexpr int unit_floats() const { return kTileRows * (offsets ? 2 : 1); }  // of scales and offsets
  constexpr int group_sub_scales() const {
    return sub_scales ? kTileRows * (scales_per_group() + (offsets ? 1 : 0)) : 0;
  }
};

constexpr TileLayout layout_of(TileScheme scheme) {
  switch (scheme) {
    case TileScheme::int8:
      return {.bits = 8, .zero = 128, .bf16 = true};
    case TileScheme::int4:
      return {.bits = 4, .zero = 8, .bf16 = true};
    case TileScheme::q4_1:
      return {.bits = 4, .zero = 0, .offsets = true};
    case TileScheme::q5_0:
      return {.bits = 5, .zero = 16};
    case TileScheme::q5_1:
      return {.bits = 5, .zero = 0, .offsets = true};
    case TileScheme::q4_k:
      return {.bits = 4, .zero = 0, .offsets = true, .sub_scales = true};
    case TileScheme::q5_k:
      return {.bits = 5, .zero = 0, .offsets = true, .sub_scales = true};
    case TileScheme::q6_k:
      return {.bits = 6, .zero = 32, .sub_scales = true, .elements_per_scale = kGroup / 2};
    case TileScheme::w8a8:
      return {.bits = 8, .zero = 128, .row_scales = true};
    case TileScheme::w4a8_grouped:
      return {.bits = 4, .zero = 0, .grouped = true};
    case TileScheme::w8a8_grouped:
      break;
  }
  return {.bits = 8, .zero = 0, .grouped = true};
}

// The constants of the rows of a w8a8 tile: an element is scale * (value - zero).
struct RowScales {
  float scale[kTileRows];
  std::int32_t zero[kTileRows];
  std::int32_t sum[kTileRows];  // of value - zero over a row
};

// Consecutive tiles of a quantised weight.
struct QuantizedTiles {
  const std::uint8_t* qweight;
  const void* scales;             // 16-bit floats, or of scale_type
  const std::int8_t* sub_scales;  // null: the scheme has none
  const RowScales* row_scales;    // null: the scheme has none
  const std::uint8_t* zeros;      // null: the scheme has none
  Float scale_type;               // of a grouped scheme's scales
  int groups_per_scale;           // of a grouped scheme
};

// How x is quantised to int8: in groups of kGroup elements, or in whole rows by their largest magnitude (symmetric) or
// range (asymmetric), or by constants. vllmlite/weights/schemes/w8a8.py defines the latter three.
enum class InputMode : std::uint8_t { groups, symmetric, asymmetric, constants };

struct InputScale {
  InputMode mode = InputMode::groups;
  float scale = 0;                      // the constants
  std::int32_t zero = 0;                // only if the mode is `constants`
  const std::int32_t* order = nullptr;  // the column of x for each column of w; null: the same
  bool operator==(const InputScale&) const = default;
};

// Rows of x, quantised to int8, and the sums that products with them need. If x is quantised in rows, only the first
// scale and sum of a row are set, and its zero point.
struct QuantizedX {
  std::int8_t* values;      // [m][groups][kGroup]
  float* scales;            // [m][groups]
  std::int32_t* sums;       // [m][groups]: of a group's values
  std::int32_t* half_sums;  // [m][groups]: of the first half of a group's values
  float* scaled_sums;       // [m][groups]: scales * sums
  std::int32_t* zeros;      // [m]
};

// y[m][n] = sum over groups of x_scale * (scale * sum of x * (w - zero) + offset * sum of x), plus bias[n], where x and
// w are quantised values; with row scales, x_scale * scale * (sum of (x - x_zero) * (w - zero)) plus bias[n].
struct QuantizedBlock {
  QuantizedX x;
  int m;
  QuantizedTiles w;
  int n;  // rows of w
  int groups;
  float* y;
  std::ptrdiff_t y_stride;
  const float* bias;         // null: none
  const std::uint8_t* next;  // the qweight of this thread's next block, for prefetching; null: none
};

// A row of x to be quantised; the last group is padded with zeros.
struct RowToQuantize {
  const float* x;
  int size;
  InputScale input;
  QuantizedX to;
};

// Floats can be quantised to the first of the schemes, int8 and int4; this is how many.
inline constexpr int kFloatSchemes = 2;

// Up to kTileRows rows of w, to be quantised into one tile, which is padded with zeros.
struct TileToQuantize {
  const void* w;
  Float type;
  std::ptrdiff_t stride;  // in elements
  int rows;
  int size;
  std::uint8_t* qweight;
  std::uint16_t* scales;
};

// out = norm(x + residual) * weight; sum = x + residual if there is a residual.
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

// One head of q or k, changed in place: a norm if there is a weight, then a rotation if there is a cos_sin.
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
  int window;                 // tokens that a query attends to, itself included
  const std::int32_t* table;  // blocks of the sequence
  const std::byte* keys;      // the key/value head's in block 0
  const std::byte* values;
  std::ptrdiff_t block_stride;  // bytes from block to block
  int block_size;
  int head_dim;
  bool head_scales;              // of a quantised cache: whether heads have scales of their own
  float key_scale, value_scale;  // where they have none
  float scale;
  float soft_cap;       // scores s become soft_cap * tanh(s / soft_cap); 0: no cap
  const float* slopes;  // of the group's heads, times the distance to a key; null: none
  const float* sinks;   // of the group's heads: the score of a key whose value is zero; null: none
  void* out;            // the first query's
  Float out_type;
  std::ptrdiff_t out_stride;
  std::byte* scratch;  // attention_scratch(head_dim) bytes, 64-byte aligned
};

constexpr int padded_head(int head_dim) { return (head_dim + kHeadUnit - 1) / kHeadUnit * kHeadUnit; }

constexpr std::size_t attention_scratch(int head_dim) {
  const auto padded = static_cast<std::size_t>(padded_head(head_dim));
  // Queries and outputs; scores, lane sums, maxima and rescaling factors; a gathered chunk of keys.
  return kAttentionRows * (2 * padded + kKeyChunk + 16 + 16) * sizeof(float) + kKeyChunk * padded * sizeof(float);
}

struct Kernels {
  const char* isa;
  LinearKernel linear[kFloats];  // by the type of w
  GroupedKernel grouped[2];      // for x in float32; for x in bfloat16, if products take that

  // The first factor of a low-rank product, of up to kShrinkTokens rows of x, which is row-major: by the type of w,
  // with x in float32; both in bfloat16, or null if the instruction set has no such products.
  void (*shrink[kFloats])(const LinearBlock&);
  void (*shrink_bf16)(const LinearBlock&);
  void (*expand[kFloats])(const LowRankExpand&);  // by the type of b

  void (*quantized[kTileSchemes])(const QuantizedBlock&);
  void (*quantize_x)(const RowToQuantize&);
  bool (*quantize_tile[kFloatSchemes])(const TileToQuantize&);  // returns false if an element is not finite
  void (*convert)(const void* from, Float from_type, void* to, Float to_type, std::int64_t count);
  void (*rms_norm)(const NormRow&);
  void (*layer_norm)(const LayerNormRow&);
  void (*prepare_head)(const HeadRow&);
  // out = f(x), multiplied by up unless that is null.
  void (*activate)(Activation f, const float* x, const float* up, void* out, Float out_type, int size);
  void (*soft_cap)(float* x, float cap, std::int64_t size);
  // y += factor * x
  void (*add_scaled)(const float* x, float factor, float* y, std::int64_t size);
  void (*attention[kFloats])(const AttentionTile&);  // by the type of the cache
  void (*attention_bytes[kByteFormats])(const AttentionTile&);
  // Converts a head to bytes of a quantised cache with `scale`, or its own where that is 0; returns the scale.
  float (*quantize_head[kByteFormats])(const float* x, std::int8_t* bytes, int size, float scale);
  // Returns the lowest index of the largest value; NaN counts as less than everything.
  std::int64_t (*argmax)(const float* x, std::int64_t size);
  // out = exp((x - largest) * factor), 0 where x < least.
  void (*weights)(const float* x, float largest, float factor, float least, float* out, std::int64_t size);
};

}  // namespace vllmlite::cpu
