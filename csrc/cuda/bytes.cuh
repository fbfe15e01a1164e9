// Device code that quantises rows of activations to 8-bit elements, and scales sums of products; bytes.hpp defines the
// results.
#pragma once

#include "cuda/bytes.hpp"
#include "cuda/kernel.cuh"

namespace vllmlite::cuda {

constexpr float kLargestFp8 = 448;           // of e4m3
constexpr float kLeastFp8Scale = 0x1p-100F;  // whose reciprocal is a normal number

// Where the codes of quantised rows are written, and how the rows are quantised.
struct QuantisedRows {
  uint2* values;  // eight a pack
  float* scales;
  ByteZero* zeros;
  ByteInputs inputs;
};

__device__ __forceinline__ float fp8_scale(float largest) { return fmaxf(largest / kLargestFp8, kLeastFp8Scale); }

template <typename T>
__device__ __forceinline__ float largest_magnitude(const Pack<T, 8>& values) {
  float most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(to_float(values.at[i])));
  return most;
}

// The e4m3 codes of eight numbers times `inverse`.
template <typename T>
__device__ __forceinline__ uint2 quantised(const Pack<T, 8>& values, float inverse) {
  std::uint32_t words[2] = {};
#if __CUDA_ARCH__ >= 890
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    std::uint16_t two;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(two)
        : "f"(to_float(values.at[2 * i + 1]) * inverse), "f"(to_float(values.at[2 * i]) * inverse));
    words[i / 2] |= static_cast<std::uint32_t>(two) << (i % 2 * 16);
  }
#endif
  return make_uint2(words[0], words[1]);
}

// Quantises a row that a block's threads have in packs of eight: each calls see() for its packs, all call settle(),
// then codes() for the packs, then all call finish(). `shared` is shared memory for 32 floats.
template <bool kIntegers>
class RowQuantiser {
 public:
  __device__ __forceinline__ explicit RowQuantiser(const QuantisedRows& to) : to_(to), inputs_(to.inputs) {}

  __device__ __forceinline__ void set_constant(const ByteConstant& constant) {
    inputs_.constant = constant.scale;
    inputs_.zero = constant.zero;
  }

  template <typename T>
  __device__ __forceinline__ void see(const Pack<T, 8>& values) {
    if constexpr (kIntegers) {
      if (!inputs_.symmetric) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          high_ = fmaxf(high_, to_float(values.at[i]));
          low_ = fminf(low_, to_float(values.at[i]));
        }
        return;
      }
    }
    high_ = fmaxf(high_, largest_magnitude(values));
  }

  __device__ __forceinline__ void settle(float* shared) {
    if (inputs_.constant != 0) {
      scale_ = inputs_.constant;
      inverse_ = 1 / scale_;
      zero_ = kIntegers ? static_cast<float>(inputs_.zero) : 0;
      return;
    }
    high_ = block_reduce(high_, shared, [](float a, float b) { return fmaxf(a, b); });
    if constexpr (!kIntegers) {
      scale_ = fp8_scale(high_);
      inverse_ = 1 / scale_;
    } else {
      if (!inputs_.symmetric) low_ = block_reduce(low_, shared, [](float a, float b) { return fminf(a, b); });
      const float steps = inputs_.symmetric ? 127 : 255, span = high_ - low_;
      scale_ = span / steps;
      inverse_ = span > 0 ? steps / span : 0;
      zero_ = inputs_.symmetric ? 0 : rintf(-128 - __fmul_rn(low_, inverse_));
    }
  }

  template <typename T>
  __device__ __forceinline__ uint2 codes(const Pack<T, 8>& values) {
    if constexpr (kIntegers) {
      std::uint32_t words[2] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float rounded = rintf(to_float(values.at[i]) * inverse_) + zero_;
        const int integer = __float2int_rn(fminf(fmaxf(rounded, -128), 127));
        sum_ += integer - static_cast<int>(zero_);
        words[i / 4] |= (static_cast<std::uint32_t>(integer) & 0xffU) << (i % 4 * 8);
      }
      return make_uint2(words[0], words[1]);
    } else {
      return quantised(values, inverse_);
    }
  }

  __device__ __forceinline__ void finish(std::int64_t row, float* shared) {
    if (kIntegers && inputs_.with_sums)
      sum_ = block_reduce(sum_, reinterpret_cast<int*>(shared), [](int a, int b) { return a + b; });
    if (threadIdx.x != 0) return;
    to_.scales[row] = scale_;
    if constexpr (kIntegers) to_.zeros[row] = {static_cast<int>(zero_), sum_};
  }

 private:
  const QuantisedRows& to_;
  ByteInputs inputs_;
  float high_ = 0, low_ = 0, scale_ = 1, inverse_ = 1, zero_ = 0;
  int sum_ = 0;
};

// An element of a product, of row `row` of x and row `column` of w. Sums of products of blocks are scaled already.
template <bool kBlocks>
__device__ __forceinline__ float scaled(float sum, const ByteScales& scales, int row, int column, float bias) {
  return fmaf(sum, kBlocks ? 1 : scales.x[row] * scales.w[column], bias);
}

template <bool kBlocks>
__device__ __forceinline__ float scaled(int sum, const ByteScales& scales, int row, int column, float bias) {
  const ByteZero x = scales.x_zeros[row], w = scales.w_zeros[column];
  const std::int64_t exact =
      sum - static_cast<std::int64_t>(x.zero) * w.sum - static_cast<std::int64_t>(w.zero) * x.sum;
  return fmaf(static_cast<float>(exact), scales.x[row] * scales.w[column], bias);
}

inline QuantisedRows quantised_rows(const ByteActivations& to, const ByteInputs& inputs) {
  return {static_cast<uint2*>(to.values.data), static_cast<float*>(to.scales.data),
          static_cast<ByteZero*>(to.zeros.data), inputs};
}

}  // namespace vllmlite::cuda
