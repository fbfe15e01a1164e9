// Products of activations with row-major weights, which are read in the checkpoint's own memory.
//
// Each output element has one accumulator of kLanes lanes, to which vectors are added in ascending order of k; the
// lanes are added by one tree for each chunk of kLinearChunk elements. That holds for every tile shape below, so a
// row's result does not depend on the rows beside it.
#pragma once

#include "cpu/kernels/simd.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

// Rows of x, and of w, in a register tile. Memory is read fastest in four streams of w, so tiles of fewer rows of x are
// not wider.
inline constexpr int kRegisterRows = kManyRegisters ? 6 : 4;
constexpr int tile_width(int rows) { return kManyRegisters || rows <= 2 ? 4 : 3; }

// The most rows of x that are read in place, without packing.
inline constexpr int kPlainRows = 16;
static_assert(kShrinkTokens <= kPlainRows);

// Multiplies w of type T with x in float32.
template <typename T>
struct FloatProduct {
  using W = typename T::Item;
  using X = float;
  using V = F;
  static constexpr Float kInput = Float::f32;
  static constexpr int kVector = kLanes;
  static VLLMLITE_INLINE V load_w(const W* w) { return T::load(w); }
  static VLLMLITE_INLINE V load_x(const X* x) { return load<F>(x); }
  static VLLMLITE_INLINE V load_some_w(const W* w, int count) { return T::load_some(w, count); }
  static VLLMLITE_INLINE V load_some_x(const X* x, int count) { return load_some<F>(x, count); }
  static VLLMLITE_INLINE F add(F sum, V x, V w) { return fma(x, w, sum); }
};

#if defined(__AVX512BF16__)
// Multiplies w and x in bfloat16, two products per lane.
struct Bf16Product {
  using W = std::uint16_t;
  using X = std::uint16_t;
  using V = __m512bh;
  static constexpr Float kInput = Float::bf16;
  static constexpr int kVector = 2 * kLanes;
  static VLLMLITE_INLINE V load_w(const W* w) { return (V)_mm512_loadu_si512(w); }
  static VLLMLITE_INLINE V load_x(const X* x) { return (V)_mm512_loadu_si512(x); }
  static VLLMLITE_INLINE V load_some_w(const W* w, int count) {
    return (V)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ULL << count) - 1), w);
  }
  static VLLMLITE_INLINE V load_some_x(const X* x, int count) { return load_some_w(x, count); }
  static VLLMLITE_INLINE F add(F sum, V x, V w) { return (F)_mm512_dpbf16_ps((__m512)sum, x, w); }
};
#endif

#if defined(__AVX512F__)
// Adds the two halves of each vector: eight lanes of sums of a, then eight of b.
VLLMLITE_INLINE __m512 add_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

// Adds the quarters of each of four accumulators: four lanes of sums each.
VLLMLITE_INLINE __m512 add_quarters(const F* acc) {
  const __m512 ab = add_halves((__m512)acc[0], (__m512)acc[1]), cd = add_halves((__m512)acc[2], (__m512)acc[3]);
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
#endif

// Writes, or adds, the sums of N accumulators to N elements of y. Lanes are added by the same tree as in sum().
template <int N>
VLLMLITE_INLINE void store_sums(const F* acc, float* y, bool add) {
#if defined(__AVX512F__)
  if constexpr (N == 4) {
    const __m512 four = add_quarters(acc);
    const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0xee));
    const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0x55));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m128 sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(order, one));
    _mm_storeu_ps(y, add ? _mm_add_ps(_mm_loadu_ps(y), sums) : sums);
    return;
  }
#endif
  for (int n = 0; n < N; ++n) y[n] = add ? y[n] + sum(acc[n]) : sum(acc[n]);
}

// Elements in a cache line of w, the unit in which a tile proceeds along k.
template <typename P>
inline constexpr int kLine = 64 / static_cast<int>(sizeof(typename P::W));

struct Tile {
  int k;
  std::ptrdiff_t x_stride, w_stride, y_stride;  // from row to row
  std::ptrdiff_t x_step, w_step;                // from line to line of a row
  bool packed;                                  // whether w is in the order of pack()
  bool add;                                     // whether to add to y instead of overwriting it
  const char* ahead;                            // rows to prefetch, one after the other
  std::ptrdiff_t ahead_stride;
  int ahead_rows;
};

template <typename P, int M, int N>
void tile(const typename P::X* x, const typename P::W* w, float* y, const Tile& t) {
  F acc[M * N] = {};
  const int row_bytes = t.k / kLine<P> * 64;
  const char *ahead = t.ahead, *row_end = ahead + row_bytes;
  int k = 0;
  for (; k + kLine<P> <= t.k; k += kLine<P>, x += t.x_step, w += t.w_step) {
    for (int row = 0; row < t.ahead_rows; ++row) {
      prefetch(ahead);
      if ((ahead += 64) == row_end) {
        ahead += t.ahead_stride - row_bytes;
        row_end += t.ahead_stride;
      }
    }
#pragma GCC unroll 8
    for (int step = 0; step < kLine<P>; step += P::kVector) {
      typename P::V wv[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) wv[n] = P::load_w(w + n * t.w_stride + step);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const typename P::V xv = P::load_x(x + m * t.x_stride + step);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[m * N + n] = P::add(acc[m * N + n], xv, wv[n]);
      }
    }
  }
  for (; k < t.k; k += P::kVector, x += P::kVector, w += P::kVector) {
    const int count = smaller(P::kVector, t.k - k);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename P::V xv = P::load_some_x(x + m * t.x_stride, count);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        acc[m * N + n] = P::add(acc[m * N + n], xv, P::load_some_w(w + n * t.w_stride, count));
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) store_sums<N>(acc + m * N, y + m * t.y_stride, t.add);
}

template <typename P>
constexpr int round_up_to_lines(int k) {
  return (k + kLine<P> - 1) / kLine<P> * kLine<P>;
}

// Packs n rows of k elements into panels that a tile reads as one stream: line by line, with the same line of all rows
// of the tile together. Rows that do not fill a tile follow one by one.
template <typename P>
void pack(const typename P::W* w, std::ptrdiff_t stride, int n, int k, typename P::W* to) {
  constexpr int kWidth = tile_width(kRegisterRows);
  for (int row = 0; row < n;) {
    const int width = n - row >= kWidth ? kWidth : 1;
    for (int at = 0; at < k; at += kLine<P>) {
      const std::size_t bytes = static_cast<std::size_t>(smaller(kLine<P>, k - at)) * sizeof(typename P::W);
      for (int i = 0; i < width; ++i, to += kLine<P>) {
        if (bytes == 64)
          __builtin_memcpy(to, w + (row + i) * stride + at, 64);
        else
          __builtin_memcpy(to, w + (row + i) * stride + at, bytes);
      }
    }
    row += width;
  }
}

// Multiplies M rows of x with n rows of w. Each of the `passes` passes over w prefetches one in `passes` of the next
// rows.
template <typename P, int M>
void pass(const typename P::X* x, const typename P::W* w, int n, float* y, Tile t, const char* next, int index,
          int passes) {
  constexpr int N = tile_width(M);
  const std::ptrdiff_t row_size = t.packed ? round_up_to_lines<P>(t.k) : t.w_stride;
  const auto row_bytes = t.w_stride * static_cast<std::ptrdiff_t>(sizeof(typename P::W));
  t.ahead_stride = passes * row_bytes;
  const auto look_ahead = [&](int row, int rows) {
    const int first = (row - index + passes - 1) / passes * passes + index;
    const bool some = next != nullptr && first < row + rows;
    t.ahead = some ? next + first * row_bytes : reinterpret_cast<const char*>(w);
    t.ahead_rows = some ? (row + rows - first + passes - 1) / passes : 0;
  };
  if (t.packed) {
    t.w_stride = kLine<P>;
    t.w_step = N * kLine<P>;
  }
  int row = 0;
  for (; row + N <= n; row += N) {
    look_ahead(row, N);
    tile<P, M, N>(x, w + row * row_size, y + row, t);
  }
  t.w_step = kLine<P>;
  for (; row < n; ++row) {
    look_ahead(row, 1);
    tile<P, M, 1>(x, w + row * row_size, y + row, t);
  }
}

// The number of passes over w that m rows of x need.
inline int passes_of(int m) { return (m + kRegisterRows - 1) / kRegisterRows; }

// The number of rows of x before a pass. Rows are divided among the passes as evenly as possible, the longer ones last.
inline int rows_before(int m, int pass, int passes) {
  return m / passes * pass + larger(0, pass - (passes - m % passes));
}

// A panel of x holds the rows of one pass, line by line.
template <typename P>
std::size_t packed_bytes(int m, int k) {
  if (m <= kPlainRows) return 0;
  return sizeof(typename P::X) * static_cast<std::size_t>(m) * static_cast<std::size_t>(round_up_to_lines<P>(k));
}

template <typename P>
void pack_panel(const LinearInput& input, int panel) {
  const int passes = passes_of(input.m), first = rows_before(input.m, panel, passes);
  const int rows = rows_before(input.m, panel + 1, passes) - first;
  const auto* x = static_cast<const typename P::X*>(input.x) + static_cast<std::ptrdiff_t>(first) * input.k;
  auto* to =
      static_cast<typename P::X*>(input.panels) + static_cast<std::ptrdiff_t>(first) * round_up_to_lines<P>(input.k);
  for (int k = 0; k < input.k; k += kLine<P>) {
    const auto bytes = static_cast<std::size_t>(smaller(kLine<P>, input.k - k)) * sizeof(typename P::X);
    for (int row = 0; row < rows; ++row, to += kLine<P>)
      __builtin_memcpy(to, x + static_cast<std::ptrdiff_t>(row) * input.k + k, bytes);
  }
}

template <typename P>
std::size_t packed_w_bytes(int k) {
  return sizeof(typename P::W) * kLinearBlockRows *
         static_cast<std::size_t>(smaller(kLinearChunk, round_up_to_lines<P>(k)));
}

template <typename P>
std::size_t scratch_bytes(int m, int k) {
  return m > kSkinnyRows ? packed_w_bytes<P>(k) : 0;
}

inline void add_bias(const LinearBlock& block) {
  for (int i = 0; i < 2 && block.w[i] != nullptr; ++i)
    if (block.bias[i] != nullptr)
      for (int m = 0; m < block.m; ++m)
        for (int n = 0; n < block.n; ++n) block.y[m * block.y_stride + i * block.n + n] += block.bias[i][n];
}

// Multiplies with the rows of w in place or, if `packed`, with packed chunks of them: pack_chunk(i, k, count, to)
// writes `count` elements along k of the rows of w[i] to `to`, in the order of pack().
template <typename P, typename PackChunk>
VLLMLITE_INLINE void product(const LinearBlock& block, bool packed, PackChunk pack_chunk) {
  using W = typename P::W;
  using Pass = decltype(&pass<P, 1>);
  static constexpr Pass kPasses[] = {
      nullptr,    pass<P, 1>, pass<P, 2>, pass<P, 3>, pass<P, 4>,
#if defined(__AVX512F__) || defined(__aarch64__)
      pass<P, 5>, pass<P, 6>,
#endif
  };
  static_assert(sizeof kPasses / sizeof *kPasses == kRegisterRows + 1 &&
                tile_width(kRegisterRows) == tile_width(kRegisterRows - 1));
  const auto* x = static_cast<const typename P::X*>(block.x);
  auto* const scratch = reinterpret_cast<W*>(block.scratch);
  const bool panels = block.m > kPlainRows;
  const int passes = passes_of(block.m), blocks = block.w[1] == nullptr ? 1 : 2;
  const int x_size = panels ? round_up_to_lines<P>(block.k) : block.k;
  for (int k = 0; k < block.k; k += kLinearChunk) {
    Tile t{};
    t.k = smaller(kLinearChunk, block.k - k);
    t.w_stride = block.w_stride;
    t.w_step = kLine<P>;
    t.y_stride = block.y_stride;
    t.add = k > 0;
    t.packed = packed;
    const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(block.n) * round_up_to_lines<P>(t.k);
    if (packed)
      for (int i = 0; i < blocks; ++i) pack_chunk(i, k, t.k, scratch + i * size);
    const bool last = k + kLinearChunk >= block.k;
    for (int index = 0; index < passes; ++index) {
      const int first = rows_before(block.m, index, passes), rows = rows_before(block.m, index + 1, passes) - first;
      t.x_stride = panels ? kLine<P> : block.k;
      t.x_step = panels ? rows * kLine<P> : kLine<P>;
      const typename P::X* from =
          x + static_cast<std::ptrdiff_t>(first) * x_size + (panels ? static_cast<std::ptrdiff_t>(k) * rows : k);
      for (int i = 0; i < blocks; ++i) {
        const W* w = static_cast<const W*>(block.w[i]) + k;
        const void* next = !block.fetch ? nullptr : last ? block.next[i] : w + kLinearChunk;
        kPasses[rows](from, packed ? scratch + i * size : w, block.n, block.y + first * block.y_stride + i * block.n, t,
                      static_cast<const char*>(next), index, passes);
      }
    }
  }
  add_bias(block);
}

template <typename P>
void linear(const LinearBlock& block) {
  using W = typename P::W;
  product<P>(block, block.m > kSkinnyRows, [&](int i, int k, int count, W* to) {
    pack<P>(static_cast<const W*>(block.w[i]) + k, block.w_stride, block.n, count, to);
  });
}

template <typename P>
inline constexpr LinearKernel linear_kernel{P::kInput, packed_bytes<P>, scratch_bytes<P>,
                                            passes_of, pack_panel<P>,   linear<P>};

}  // namespace vllmlite::cpu::VLLMLITE_ISA
