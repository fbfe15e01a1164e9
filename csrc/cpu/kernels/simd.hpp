// Vectors of one instruction set: GCC's vector types, and intrinsics where those do not suffice. Everything is in the
// namespace of the instruction set, so that the linker cannot use its code in another translation unit, for a CPU
// without that instruction set; for the same reason nothing here uses inline functions of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define VLLMLITE_INLINE inline __attribute__((always_inline))

namespace vllmlite::cpu::VLLMLITE_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr bool kManyRegisters = true;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
inline constexpr bool kManyRegisters = false;
#else
inline constexpr int kLanes = 4;
#if defined(__aarch64__)
inline constexpr bool kManyRegisters = true;
#else
inline constexpr bool kManyRegisters = false;
#endif
#endif

typedef float F __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t I __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t U __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t H __attribute__((vector_size(kLanes * 2)));
typedef std::int8_t B __attribute__((vector_size(kLanes)));

template <typename T>
VLLMLITE_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
VLLMLITE_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

template <typename V>
VLLMLITE_INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <typename V>
VLLMLITE_INLINE void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// Loads the first `count` elements; the others become zeros.
template <typename V, typename T>
VLLMLITE_INLINE V load_some(const T* from, int count) {
  T padded[sizeof(V) / sizeof(T)] = {};
  for (int i = 0; i < count; ++i) padded[i] = from[i];
  return load<V>(padded);
}

VLLMLITE_INLINE F set(float x) { return x - F{}; }  // not +, which would turn -0 into 0 and cost an instruction

VLLMLITE_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

VLLMLITE_INLINE F max(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Adds the lanes in a fixed order: lanes half a vector apart, then a quarter, and so on.
VLLMLITE_INLINE float sum(F v) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  const F four = v;
#endif
#if defined(__AVX2__)
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}

VLLMLITE_INLINE float largest(F v) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256((__m512)v),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  const F four = v;
#endif
#if defined(__AVX2__)
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  return larger(larger(four[0], four[1]), larger(four[2], four[3]));
#endif
}

VLLMLITE_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// ---- 16-bit floats

VLLMLITE_INLINE F from_bf16(H bits) { return (F)(__builtin_convertvector(bits, U) << 16); }

VLLMLITE_INLINE H to_bf16(F x) {
#if defined(__AVX512BF16__)
  return (H)_mm512_cvtneps_pbh((__m512)x);
#else
  const U bits = (U)x;
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector((x == x) ? rounded : ((bits >> 16) | 0x40), H);
#endif
}

VLLMLITE_INLINE F from_f16(H bits) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps((__m128i)bits);
#else
  // Exponents are rebased by a multiplication, which makes subnormals right as well.
  const U wide = __builtin_convertvector(bits, U);
  const F scaled = (F)((wide & 0x7fff) << 13) * 0x1p112F;
  const U special = (U)((wide & 0x7c00) == 0x7c00) & 0x7f800000;
  return (F)((U)scaled | special | (wide & 0x8000) << 16);
#endif
}

VLLMLITE_INLINE H to_f16(F x) {
#if defined(__AVX512F__)
  return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const U bits = (U)x, sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  const U normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  // Adding 0.5 moves a subnormal's bits to their place, rounded by the addition.
  const U subnormal = (U)((F)rest + 0.5F) - 0x3f000000;
  U half = rest < 0x38800000 ? subnormal : normal;
  half = rest >= 0x477ff000 ? (U{} + 0x7c00) : half;
  half = rest > 0x7f800000 ? (U{} + 0x7e00) : half;
  return __builtin_convertvector(half | sign, H);
#endif
}

// ---- 8-bit integers

VLLMLITE_INLINE I wide_i8(const std::int8_t* from) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  std::int32_t four;
  __builtin_memcpy(&four, from, sizeof four);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return (I)vmovl_s16(vget_low_s16(wide));
#else
  return __builtin_convertvector(load<B>(from), I);
#endif
}

VLLMLITE_INLINE F from_i8(const std::int8_t* from) { return __builtin_convertvector(wide_i8(from), F); }

// Stores the lowest bytes of the first `count` elements.
VLLMLITE_INLINE void store_i8(std::int8_t* to, I x, int count) {
  std::int32_t items[kLanes];
  store(items, x);
  for (int i = 0; i < count; ++i) to[i] = static_cast<std::int8_t>(items[i]);
}

// ---- Functions

// 1.5 * 2^23: adding it to less than 2^22 rounds to a whole number, halves to even, in the lowest bits of the sum.
inline constexpr float kRound = 12582912.0F;

// 2^x: the polynomial's error is below 1e-7 of the result; 0 below 2^-126, infinity from 2^128 up.
VLLMLITE_INLINE F exp2(F x) {
  const F clamped = x < 128.0F ? x : set(128.0F);
  const F bounded = clamped > -127.0F ? clamped : set(-127.0F);
  const F whole = (bounded + kRound) - kRound;
  const F f = bounded - whole;
  F p = set(1.5252734e-05F);
  p = fma(p, f, set(1.5403530e-04F));
  p = fma(p, f, set(1.3333558e-03F));
  p = fma(p, f, set(9.6181291e-03F));
  p = fma(p, f, set(5.5504109e-02F));
  p = fma(p, f, set(2.4022651e-01F));
  p = fma(p, f, set(6.9314718e-01F));
  p = fma(p, f, set(1.0F));
  const F scaled = (F)((I)p + (__builtin_convertvector(whole, I) << 23));
  return bounded > -126.0F ? scaled : F{};
}

inline constexpr float kLog2E = 1.4426950408889634F;

VLLMLITE_INLINE F exp(F x) { return exp2(x * kLog2E); }

// The error is at most 1e-7.
VLLMLITE_INLINE F tanh(F x) { return 1.0F - 2.0F / (exp(2.0F * x) + 1.0F); }

VLLMLITE_INLINE F capped(F x, float cap) { return cap * tanh(x * (1.0F / cap)); }

// ---- Element types

struct F32 {
  using Item = float;
  static VLLMLITE_INLINE F load(const Item* from) { return VLLMLITE_ISA::load<F>(from); }
  static VLLMLITE_INLINE F load_some(const Item* from, int count) { return VLLMLITE_ISA::load_some<F>(from, count); }
  static VLLMLITE_INLINE void store(Item* to, F x) { VLLMLITE_ISA::store(to, x); }
};

struct F16 {
  using Item = std::uint16_t;
  static VLLMLITE_INLINE F load(const Item* from) { return from_f16(VLLMLITE_ISA::load<H>(from)); }
  static VLLMLITE_INLINE F load_some(const Item* from, int count) {
    return from_f16(VLLMLITE_ISA::load_some<H>(from, count));
  }
  static VLLMLITE_INLINE void store(Item* to, F x) { VLLMLITE_ISA::store(to, to_f16(x)); }
};

struct BF16 {
  using Item = std::uint16_t;
  static VLLMLITE_INLINE F load(const Item* from) { return from_bf16(VLLMLITE_ISA::load<H>(from)); }
  static VLLMLITE_INLINE F load_some(const Item* from, int count) {
    return from_bf16(VLLMLITE_ISA::load_some<H>(from, count));
  }
  static VLLMLITE_INLINE void store(Item* to, F x) { VLLMLITE_ISA::store(to, to_bf16(x)); }
};

template <typename T>
VLLMLITE_INLINE void store_some(typename T::Item* to, F x, int count) {
  typename T::Item items[kLanes];
  T::store(items, x);
  for (int i = 0; i < count; ++i) to[i] = items[i];
}

// Calls `body` with a value of the element type `kind`.
template <typename Body>
VLLMLITE_INLINE void with_type(Float kind, Body body) {
  switch (kind) {
    case Float::f32:
      return body(F32{});
    case Float::f16:
      return body(F16{});
    case Float::bf16:
      return body(BF16{});
  }
}

}  // namespace vllmlite::cpu::VLLMLITE_ISA
