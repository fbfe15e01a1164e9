// Codes are taken apart into vectors of a byte each: one vector for each column, whose lanes are 16 rows. So columns
// change places as whole vectors, and whatever the packing, joining codes to bytes and transposing these back into rows
// is the same. Vectors are loaded as bytes, so the order of a word's bytes in memory is the checkpoint's.
#include "cpu/repack.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace vllmlite::cpu {

namespace {

constexpr int kRows = 16;
typedef std::uint8_t V __attribute__((vector_size(kRows)));

// Number of columns that are unpacked at a time if their order does not change. For every size of codes, they fill
// whole words.
constexpr std::int64_t kChunk = 512;
// Rows of a line of AWQ's words, in vectors: each holds the even or the odd nibbles of four words.
constexpr int kAwqVectors = 8;
// For each byte of a word, the rows whose codes its low and its high nibble hold.
constexpr int kAwqRows[2][4] = {{0, 4, 1, 5}, {2, 6, 3, 7}};

V load(const std::uint8_t* from, std::int64_t available = kRows) {
  V value{};
  if (available >= kRows)
    std::memcpy(&value, from, sizeof value);
  else if (available > 0)
    std::memcpy(&value, from, static_cast<std::size_t>(available));
  return value;
}

// One of the log2(16) steps of a transposition: interleaves the bytes of vector i and vector i + kCount / 2, so that
// the highest bit of a vector's index becomes the lowest bit of a byte's index.
template <int kCount>
void interleave(V* x) {
  V y[kCount];
  for (int i = 0; i < kCount / 2; ++i) {
    const V a = x[i], b = x[i + kCount / 2];
    y[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    y[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  std::copy(y, y + kCount, x);
}

// Byte i of all vectors, counted from the first vector on, becomes byte i / kCount of vector i % kCount.
template <int kCount>
void transpose(V* x) {
  for (int step = 0; step < 4; ++step) interleave<kCount>(x);
}

// Rows that are unpacked together, and their packed codes.
struct Block {
  const StoredCodes& codes;
  std::int64_t row;
  int rows;

  const std::uint8_t* data() const { return static_cast<const std::uint8_t*>(codes.data.data); }
};

// Reads `count` bytes of the streams of a block's rows, from the byte `first` on, where a word begins.
void read_rows(const Block& block, std::int64_t first, std::int64_t count, V* to) {
  const std::int64_t stride = block.codes.data.size() / block.codes.rows;
  for (std::int64_t at = 0; at < count; at += kRows) {
    V x[kRows] = {};
    for (int i = 0; i < block.rows; ++i)
      x[i] = load(block.data() + (block.row + i) * stride + first + at, stride - first - at);
    transpose<kRows>(x);
    std::copy(x, x + std::min<std::int64_t>(kRows, count - at), to + at);
  }
}

void read_words(const Block& block, std::int64_t first, std::int64_t count, V* to) {
  constexpr int kWord = 4;
  for (std::int64_t at = 0; at < count; at += kWord) {
    const std::uint8_t* const from = block.data() + ((first + at) / kWord * block.codes.rows + block.row) * kWord;
    for (int i = 0; i < kWord; ++i) to[at + i] = load(from + i * kRows, block.rows * kWord - i * kRows);
    transpose<kWord>(to + at);
  }
}

// Unpacks codes from a stream of bytes: eight codes take as many bytes as a code has bits. Up to seven codes more than
// `count` are written.
template <int kBits>
void unpack(const V* bytes, std::int64_t count, V* to) {
  constexpr auto kMask = static_cast<std::uint8_t>((1 << kBits) - 1);
  for (std::int64_t at = 0; at < count; at += 8, bytes += kBits)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int byte = i * kBits / 8, shift = i * kBits % 8;
      V code = bytes[byte] >> shift;
      if (shift + kBits > 8) code |= bytes[byte + 1] << (8 - shift);
      to[at + i] = code & kMask;
    }
}

void unpack(int bits, const V* bytes, std::int64_t count, V* to) {
  switch (bits) {
    case 2:
      return unpack<2>(bytes, count, to);
    case 3:
      return unpack<3>(bytes, count, to);
    case 4:
      return unpack<4>(bytes, count, to);
    default:
      return unpack<8>(bytes, count, to);
  }
}

// Codes of `count` columns from the column `first` on: those of column i and of vector j of rows in to[j * count + i].
void take_apart(const Block& block, std::int64_t first, std::int64_t count, V* bytes, V* to) {
  const StoredCodes& codes = block.codes;
  if (codes.packing == Packing::awq) {
    const std::int64_t stride = codes.rows / 2;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint8_t* const from = block.data() + (first + i) * stride + block.row / 2;
      for (int j = 0; j < kAwqVectors / 2; ++j) {
        const V both = load(from + j * kRows, block.rows / 2 - j * kRows);
        to[2 * j * count + i] = both & 15;
        to[(2 * j + 1) * count + i] = both >> 4;
      }
    }
    return;
  }
  const std::int64_t stored = (count * codes.bits + 31) / 32 * 4;  // whole words
  (codes.packing == Packing::rows ? read_rows : read_words)(block, first * codes.bits / 8, stored, bytes);
  unpack(codes.bits, bytes, count, to);
}

// The row of a block that is in the lane `lane` of its vector `vector`.
int row_of(Packing packing, int vector, int lane) {
  return packing == Packing::awq ? vector / 2 * 32 + lane / 4 * 8 + kAwqRows[vector % 2][lane % 4] : lane;
}

// Joins codes into bytes of rows, from the byte `first` on. `column` returns those of a column below `count`.
template <int kBits, typename Column>
void join(const Block& block, int vector, Column column, std::int64_t count, std::int64_t first, const Tensor& result) {
  const std::int64_t bytes = (count * kBits + 7) / 8, stride = result.shape[1];
  for (std::int64_t at = 0; at < bytes; at += kRows) {
    const std::int64_t size = std::min<std::int64_t>(kRows, bytes - at);
    V y[kRows] = {};
    for (std::int64_t i = 0; i < size; ++i) {
      const std::int64_t from = (at + i) * 8 / kBits;
      y[i] = column(from);
      if (kBits == 4 && from + 1 < count) y[i] |= column(from + 1) << 4;
    }
    transpose<kRows>(y);
    for (int lane = 0; lane < kRows; ++lane) {
      const int row = row_of(block.codes.packing, vector, lane);
      if (row >= block.rows) continue;
      auto* const to = static_cast<std::uint8_t*>(result.data) + (block.row + row) * stride + first + at;
      if (size == kRows)
        std::memcpy(to, &y[lane], kRows);
      else
        std::memcpy(to, &y[lane], static_cast<std::size_t>(size));
    }
  }
}

// Joins the codes of `count` columns, of which x has all that the order names.
void join(const Block& block, int vector, const V* x, std::int64_t count, std::int64_t first, const Tensor& result) {
  const auto added = static_cast<std::uint8_t>(block.codes.added);
  const auto each = [&](auto column) {
    block.codes.to_bits == 4 ? join<4>(block, vector, column, count, first, result)
                             : join<8>(block, vector, column, count, first, result);
  };
  if (!block.codes.order) return each([=](std::int64_t i) { return x[i] + added; });
  each([=, order = static_cast<const std::int32_t*>(block.codes.order->data)](std::int64_t i) {
    return x[order[i]] + added;
  });
}

void check(const StoredCodes& codes) {
  const auto [packing, bits, rows, columns, data, order, added, to_bits] = codes;
  const auto require = [](bool held, const std::string& what) {
    if (!held) throw std::invalid_argument("repack: " + what);
  };
  require((bits == 2 || bits == 3 || bits == 4 || bits == 8) && (to_bits == 4 || to_bits == 8) && bits <= to_bits,
          "codes of 2, 3, 4 or 8 bits become codes of 4 or 8 bits, which are no fewer");
  require(rows > 0 && columns > 0 && data.dtype == DType::uint8, "there must be rows and columns, and bytes");
  const std::int64_t stream = columns * bits;
  switch (packing) {
    case Packing::rows:
      require(data.size() % rows == 0 && data.size() / rows >= (stream + 7) / 8, "data must hold as many rows");
      break;
    case Packing::words:
      require(stream % 32 == 0 && data.size() == rows * stream / 8, "data must be words of whole columns");
      break;
    case Packing::awq:
      require(bits == 4 && rows % 8 == 0 && data.size() == rows * columns / 2, "data must be words of eight rows");
      break;
  }
  if (!order) return;
  require(order->dtype == DType::int32 && order->size() == columns, "the order must be one int32 for each column");
  const auto* const index = static_cast<const std::int32_t*>(order->data);
  require(std::all_of(index, index + columns, [&](std::int32_t i) { return i >= 0 && i < columns; }),
          "the order must hold columns");
}

}  // namespace

Tensor repack(Runtime& runtime, const StoredCodes& codes) {
  check(codes);
  const std::int64_t width = (codes.columns * codes.to_bits + 7) / 8;
  const Tensor result = runtime.make({codes.rows, width}, DType::uint8);
  const int vectors = codes.packing == Packing::awq ? kAwqVectors : 1;
  const std::int64_t rows = vectors * kRows, blocks = (codes.rows + rows - 1) / rows;
  const std::int64_t step = codes.order ? codes.columns : std::min(kChunk, codes.columns);
  const std::int64_t chunks = (codes.columns + step - 1) / step;
  const std::int64_t room = (step + 31) / 32 * 32;  // codes of whole words
  runtime.reserve_scratch(static_cast<std::size_t>((vectors + 1) * room) * sizeof(V));
  runtime.issue([&](Worker& worker) {
    V* const bytes = reinterpret_cast<V*>(worker.scratch());
    V* const x = bytes + room;
    for (std::int64_t task; (task = worker.take()) < blocks * chunks;) {
      const std::int64_t row = task / chunks * rows, first = task % chunks * step;
      const std::int64_t count = std::min(step, codes.columns - first);
      const Block block{codes, row, static_cast<int>(std::min(rows, codes.rows - row))};
      take_apart(block, first, count, bytes, x);
      for (int vector = 0; vector < vectors; ++vector)
        join(block, vector, x + vector * count, count, first * codes.to_bits / 8, result);
    }
  });
  runtime.flush();
  return result;
}

}  // namespace vllmlite::cpu
