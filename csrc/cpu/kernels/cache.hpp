// Formats of quantised key/value caches: bytes that are multiplied by a scale when they are read. A format converts a
// vector of numbers within its range to bytes and back, in float32, rounding halves to even.
#pragma once

#include "cpu/kernels/simd.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

// int8. Integers are multiplied where they stand, in the topmost byte, hence kUnit.
struct Int8Format {
  static constexpr float kLargest = 127, kUnit = 0x1p-24F;
  static VLLMLITE_INLINE I encode(F x) { return (I)(x + kRound); }
  static VLLMLITE_INLINE F decode_top(U byte) { return __builtin_convertvector((I)byte, F); }
  static VLLMLITE_INLINE F decode(const std::int8_t* from) { return from_i8(from); }
};

// 8-bit floats with kMantissa bits behind the point (Micikevicius et al. 2022). What is larger than kLargest is stored
// as that, and infinities are not stored, so that in both formats a magnitude of all ones is the only NaN.
template <int kMantissa, int kBias, int kLargestValue>
struct Float8Format {
  static constexpr float kLargest = kLargestValue, kUnit = 1;
  static constexpr std::int32_t kNan = 0x7f;

  static VLLMLITE_INLINE I encode(F x) {
    constexpr int kShift = 23 - kMantissa;
    const I sign = (I)((U)x >> 24 & 0x80);
    const F magnitude = (F)((U)x & 0x7fffffff);
    const F bounded = magnitude < kLargest ? magnitude : set(kLargest);
    const U bits = (U)bounded;
    const I normal =
        (I)((bits + ((1U << (kShift - 1)) - 1) + (bits >> kShift & 1)) >> kShift) - ((127 - kBias) << kMantissa);
    // The sum's last bit is worth as much as the format's smallest number.
    const F addend = (F)(U{} + ((127U + 24 - kBias - kMantissa) << 23));
    const I subnormal = (I)(bounded + addend) - (I)addend;
    I byte = bounded < least_normal() ? subnormal : normal;
    byte = magnitude == magnitude ? byte : (I{} + kNan);
    return byte | sign;
  }

  static VLLMLITE_INLINE F decode_top(U byte) {
    const I magnitude = (I)((byte & 0x7f000000) >> (1 + kMantissa));
    const F normal = (F)(magnitude + ((127 - kBias) << 23));
    const F subnormal = (F)(magnitude + ((128 - kBias) << 23)) - least_normal();
    U bits = (U)(magnitude < 1 << 23 ? subnormal : normal);
    bits = magnitude == (kNan << 24) >> (1 + kMantissa) ? (U{} + 0x7fc00000) : bits;
    return (F)(bits | (byte & 0x80000000));
  }

  static VLLMLITE_INLINE F decode(const std::int8_t* from) { return decode_top((U)wide_i8(from) << 24); }

 private:
  static VLLMLITE_INLINE F least_normal() { return (F)(U{} + ((128U - kBias) << 23)); }
};

using E4m3Format = Float8Format<3, 7, 448>;
using E5m2Format = Float8Format<2, 15, 57344>;

// The scale of a head of its own: its largest magnitude / kLargest. A head that holds an infinity or NaN has it for its
// scale.
inline float head_scale(const float* x, int size, float largest_byte) {
  const auto magnitude = [](F v) { return (I)v & 0x7fffffff; };  // ordered as the numbers are, NaN last
  I most{};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) most = larger(most, magnitude(load<F>(x + i)));
  if (i < size) most = larger(most, magnitude(load_some<F>(x + i, size - i)));
  std::int32_t lanes[kLanes], top = 0;
  store(lanes, most);
  for (const std::int32_t lane : lanes) top = larger(top, lane);
  float absmax;
  __builtin_memcpy(&absmax, &top, sizeof top);
  return absmax / largest_byte < kLeastScale ? kLeastScale : absmax / largest_byte;
}

// Converts a head to bytes with `scale`, or its own where that is 0; returns the scale.
template <typename Format>
float quantize_head(const float* x, std::int8_t* bytes, int size, float scale) {
  if (scale == 0) scale = head_scale(x, size, Format::kLargest);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) store_i8(bytes + i, Format::encode(load<F>(x + i) / scale), kLanes);
  if (i < size) store_i8(bytes + i, Format::encode(load_some<F>(x + i, size - i) / scale), size - i);
  return scale;
}

}  // namespace vllmlite::cpu::VLLMLITE_ISA
