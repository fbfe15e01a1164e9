// Products of activations with row-major weights that stay where the checkpoint has them.
//
// An output element has one accumulator of kLanes lanes, over k in ascending vectors, summed by one tree for each
// chunk of kLinearChunk; every tile shape below keeps to that, so a row's result does not depend on the rows beside it.
#pragma once

#include "cpu/kernels/simd.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

inline constexpr int kRegisterRows = kManyRegisters ? 8 : 4;

// With many rows, tiles of six by four need fewer loads than those of eight by three.
inline constexpr int kManyPassRows = kManyRegisters ? 6 : 4;

// Rows of w in a register tile, by rows of x.
inline constexpr int kTileWidth[9] = {
    0, 8, kManyRegisters ? 8 : 4, kManyRegisters ? 8 : 3, kManyRegisters ? 6 : 3, 4, 4, 3, 3};

// w of type T against x in float32.
template <typename T>
struct FloatProduct {
  using W = typename T::Item;
  using X = float;
  using V = F;
  static constexpr int kVector = kLanes;
  static VLLMLITE_INLINE V load_w(const W* w) { return T::load(w); }
  static VLLMLITE_INLINE V load_x(const X* x) { return load<F>(x); }
  static VLLMLITE_INLINE V load_some_w(const W* w, int count) { return T::load_some(w, count); }
  static VLLMLITE_INLINE V load_some_x(const X* x, int count) { return load_some<F>(x, count); }
  static VLLMLITE_INLINE F add(F sum, V x, V w) { return fma(x, w, sum); }
};

#if defined(__AVX512BF16__)
// w and x in bfloat16, two products a lane.
struct Bf16Product {
  using W = std::uint16_t;
  using X = std::uint16_t;
  using V = __m512bh;
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
// Adds the halves of two vectors each: eight lanes of a, then eight of b.
VLLMLITE_INLINE __m512 add_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

// Four lanes of each of four accumulators.
VLLMLITE_INLINE __m512 add_quarters(const F* acc) {
  const __m512 ab = add_halves((__m512)acc[0], (__m512)acc[1]), cd = add_halves((__m512)acc[2], (__m512)acc[3]);
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
#endif

// Sums of N accumulators, each by the tree of sum(), many at a time.
template <int N>
VLLMLITE_INLINE void sums(const F* acc, float* out) {
  int n = 0;
#if defined(__AVX512F__)
  for (; n + 16 <= N; n += 16) {
    const __m512 a = add_quarters(acc + n), b = add_quarters(acc + n + 4);
    const __m512 c = add_quarters(acc + n + 8), d = add_quarters(acc + n + 12);
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_ps(c, d, 0x44), _mm512_shuffle_ps(c, d, 0xee));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_ps(out + n, _mm512_permutexvar_ps(order, all));
  }
  for (; n + 4 <= N; n += 4) {
    const __m512 four = add_quarters(acc + n);
    const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0xee));
    const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0x55));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out + n, _mm512_castps512_ps128(_mm512_permutexvar_ps(order, one)));
  }
#endif
  for (; n < N; ++n) out[n] = sum(acc[n]);
}

// Elements in a cache line of w: what a tile goes forward at a time.
template <typename P>
inline constexpr int kLine = 64 / static_cast<int>(sizeof(typename P::W));

struct Tile {
  int k;
  std::ptrdiff_t x_stride, w_stride, y_stride;  // from row to row
  std::ptrdiff_t w_step;                        // from line to line of a row of w
  bool packed;                                  // w is in the order of pack()
  bool add;                                     // to what y holds
  const char* ahead;                            // rows to prefetch while at it
  std::ptrdiff_t ahead_stride;
  int ahead_rows;
};

// Rows of x from which on the rows ahead are fetched one after the other, which memory delivers faster beside so much
// arithmetic; with fewer they are fetched abreast, which costs less.
inline constexpr int kFetchInTurn = 5;

template <typename P, int M, int N>
void tile(const typename P::X* x, const typename P::W* w, float* y, const Tile& t) {
  F acc[M * N] = {};
  const int row_bytes = t.k / kLine<P> * 64;
  const char *ahead = t.ahead, *row_end = ahead + row_bytes;
  int k = 0;
  for (; k + kLine<P> <= t.k; k += kLine<P>, w += t.w_step) {
    for (int row = 0; row < t.ahead_rows; ++row) {
      if constexpr (M < kFetchInTurn) {
        prefetch(t.ahead + row * t.ahead_stride + k * static_cast<int>(sizeof(typename P::W)));
      } else {
        prefetch(ahead);
        if ((ahead += 64) == row_end) {
          ahead += t.ahead_stride - row_bytes;
          row_end += t.ahead_stride;
        }
      }
    }
#pragma GCC unroll 8
    for (int step = 0; step < kLine<P>; step += P::kVector) {
      typename P::V wv[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) wv[n] = P::load_w(w + n * t.w_stride + step);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const typename P::V xv = P::load_x(x + m * t.x_stride + k + step);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[m * N + n] = P::add(acc[m * N + n], xv, wv[n]);
      }
    }
  }
  for (; k < t.k; k += P::kVector, w += P::kVector) {
    const int count = smaller(P::kVector, t.k - k);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename P::V xv = P::load_some_x(x + m * t.x_stride + k, count);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        acc[m * N + n] = P::add(acc[m * N + n], xv, P::load_some_w(w + n * t.w_stride, count));
    }
  }
  float found[M * N];
  sums<M * N>(acc, found);
  for (int m = 0; m < M; ++m) {
    float* row = y + m * t.y_stride;
    for (int n = 0; n < N; ++n) row[n] = t.add ? row[n] + found[m * N + n] : found[m * N + n];
  }
}

// Copies n rows of k elements so that a tile reads them in one stream: line by line, and of each line the rows of the
// tile, kTileWidth[kManyPassRows] of them, then rows that fill no tile one by one.
template <typename P>
void pack(const typename P::W* w, std::ptrdiff_t stride, int n, int k, typename P::W* to) {
  constexpr int kWidth = kTileWidth[kManyPassRows];
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

// One pass of M rows of x over n rows of w, whose share of the rows to come (one in `passes`) is prefetched.
template <typename P, int M>
void pass(const typename P::X* x, const typename P::W* w, int n, float* y, Tile t, const char* next, int index,
          int passes) {
  constexpr int N = kTileWidth[M];
  const std::ptrdiff_t row_size = t.packed ? (t.k + kLine<P> - 1) / kLine<P> * kLine<P> : t.w_stride;
  const auto row_bytes = t.w_stride * static_cast<std::ptrdiff_t>(sizeof(typename P::W));
  t.ahead_stride = passes * row_bytes;
  const auto look_ahead = [&](int row, int rows) {
    const int first = (row - index + passes - 1) / passes * passes + index;
    t.ahead = next + first * row_bytes;
    t.ahead_rows = next == nullptr || first >= row + rows ? 0 : (row + rows - first + passes - 1) / passes;
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

template <typename P>
void linear(const LinearBlock& block) {
  using Pass = decltype(&pass<P, 1>);
  static constexpr Pass kPasses[] = {
      nullptr,    pass<P, 1>, pass<P, 2>, pass<P, 3>, pass<P, 4>,
#if defined(__AVX512F__) || defined(__aarch64__)
      pass<P, 5>, pass<P, 6>, pass<P, 7>, pass<P, 8>,
#endif
  };
  static_assert(kTileWidth[kManyPassRows] == kTileWidth[kManyPassRows - 1]);
  const auto* x = static_cast<const typename P::X*>(block.x);
  const auto* w = static_cast<const typename P::W*>(block.w);
  auto* const room = reinterpret_cast<typename P::W*>(block.scratch);
  const bool many = block.m > kLinearFew;
  const int most = many ? kManyPassRows : kRegisterRows;
  const int passes = (block.m + most - 1) / most;
  for (int k = 0; k < block.k; k += kLinearChunk) {
    Tile t{};
    t.k = smaller(kLinearChunk, block.k - k);
    t.x_stride = block.x_stride;
    t.w_stride = block.w_stride;
    t.w_step = kLine<P>;
    t.y_stride = block.y_stride;
    t.add = k > 0;
    t.packed = many;
    if (many) pack<P>(w + k, block.w_stride, block.n, t.k, room);
    const bool last = k + kLinearChunk >= block.k;
    const void* next = last ? block.next : w + k + kLinearChunk;
    for (int index = 0, m = 0; index < passes; ++index) {
      const int rows = (block.m - m + passes - index - 1) / (passes - index);
      kPasses[rows](x + m * block.x_stride + k, many ? room : w + k, block.n, block.y + m * block.y_stride, t,
                    static_cast<const char*>(next), index, passes);
      m += rows;
    }
  }
  if (block.bias != nullptr)
    for (int m = 0; m < block.m; ++m)
      for (int n = 0; n < block.n; ++n) block.y[m * block.y_stride + n] += block.bias[n];
}

}  // namespace vllmlite::cpu::VLLMLITE_ISA
