// Elements of the key/value cache: floats, and the bytes of quantised caches, which are multiplied by a scale.
#pragma once

#include <cuda_fp8.h>

#include "contract/data.hpp"
#include "cuda/kernel.cuh"

namespace vllmlite::cuda {

using i8 = std::int8_t;
struct e5m2 {  // an 8-bit float with 5 bits of exponent and 2 of mantissa
  std::uint8_t bits;
};

template <typename E>
constexpr bool kQuantized = sizeof(E) == 1;

// The largest byte; a head's own scale is its largest magnitude divided by it.
template <typename E>
constexpr float kLargest = std::is_same_v<E, i8>     ? 127.0F
                           : std::is_same_v<E, e4m3> ? 448.0F
                                                     : 57344.0F;
constexpr float kLeastScale = 0x1p-126F;

__device__ __forceinline__ float to_float(i8 x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(e4m3 x) {
  return __half2float(f16(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)));
}
__device__ __forceinline__ float to_float(e5m2 x) {
  return __half2float(f16(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E5M2)));
}

// Larger numbers, infinities too, become the largest float8; NaN stays NaN. An i8 must be within its range.
template <>
__device__ __forceinline__ i8 from_float<i8>(float x) {
  return static_cast<i8>(__float2int_rn(x));
}
template <>
__device__ __forceinline__ e4m3 from_float<e4m3>(float x) {
  return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)};
}
template <>
__device__ __forceinline__ e5m2 from_float<e5m2>(float x) {
  return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2)};
}

// Converts four bytes, of elements 0 to 3, to two pairs of f16, exactly: 0 and 1, 2 and 3; or, unless kAdjacent, 0 and
// 2, 1 and 3.
template <typename E, bool kAdjacent>
__device__ __forceinline__ void to_halves(std::uint32_t bytes, std::uint32_t& first, std::uint32_t& second) {
  if constexpr (std::is_same_v<E, i8>) {
    // 0x6400 + n is the f16 1024 + n.
    const std::uint32_t shifted = bytes ^ 0x80808080U, base = 0x64806480U;
    first = __byte_perm(shifted, 0x64646464U, kAdjacent ? 0x4140 : 0x4240);
    second = __byte_perm(shifted, 0x64646464U, kAdjacent ? 0x4342 : 0x4341);
    for (std::uint32_t* both : {&first, &second})
      reinterpret_cast<__half2&>(*both) =
          __hsub2(reinterpret_cast<const __half2&>(*both), reinterpret_cast<const __half2&>(base));
    return;
  }
#if __CUDA_ARCH__ >= 890
  if constexpr (std::is_same_v<E, e4m3>) {
    const std::uint32_t ordered = kAdjacent ? bytes : __byte_perm(bytes, 0, 0x3120);
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(first) : "h"(static_cast<std::uint16_t>(ordered)));
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(second) : "h"(static_cast<std::uint16_t>(ordered >> 16)));
    return;
  }
#endif
  // An e5m2 is the upper byte of an f16.
  first = __byte_perm(bytes, 0, kAdjacent ? 0x1404 : 0x2404);
  second = __byte_perm(bytes, 0, kAdjacent ? 0x3424 : 0x3414);
  if constexpr (std::is_same_v<E, e4m3>) {
    // One bit of exponent less, of a bias that is less by 8; what comes out as 480 is NaN.
    for (std::uint32_t* both : {&first, &second}) {
      const std::uint32_t bits = (*both & 0x80008000U) | (*both >> 1 & 0x3f803f80U);
      const __half2 number = __hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(256));
      *both = reinterpret_cast<const std::uint32_t&>(number) |
              (__hgt2_mask(__habs2(number), __float2half2_rn(464)) & 0x7fff7fffU);
    }
  }
}

// Calls `function` with a null pointer to the C++ type of the cache's elements.
template <typename Function>
void with_element(CacheElement element, Function&& function) {
  switch (element) {
    case CacheElement::float32:
      return function(static_cast<float*>(nullptr));
    case CacheElement::float16:
      return function(static_cast<f16*>(nullptr));
    case CacheElement::bfloat16:
      return function(static_cast<bf16*>(nullptr));
    case CacheElement::int8:
      return function(static_cast<i8*>(nullptr));
    case CacheElement::fp8_e4m3:
      return function(static_cast<e4m3*>(nullptr));
    case CacheElement::fp8_e5m2:
      return function(static_cast<e5m2*>(nullptr));
  }
}

}  // namespace vllmlite::cuda
