// Products of 8-bit floats: how activations are quantised, and which kernel multiplies.
#include <algorithm>
#include <cmath>

#include "cuda/fp8.cuh"
#include "cuda/fp8.hpp"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

constexpr int kMostThreads = 512, kHeld = 4;

// ---- Quantising

// One block a row of `packs` packs of eight, of which each thread holds the first kHeld: a scale for the row, its
// largest magnitude's, or `constant` if that is not 0, or that of its pair if `pairs` has constants.
template <typename T>
static __global__ __launch_bounds__(kMostThreads) void quantise_rows_kernel(const T* x, uint2* to, float* scales,
                                                                            int packs, float constant,
                                                                            const __grid_constant__ Fp8Pairs pairs) {
  using P = Pack<T, 8>;
  __shared__ float shared[32];
  let_next_begin();
  wait_for_previous();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * packs;
  const P* from = reinterpret_cast<const P*>(x) + row;
  if (pairs.constants != nullptr) {
    const int pair = pairs.pairs[blockIdx.x];
    constant = pairs.constants[pairs.experts[pair]];
    if (pairs.of_tokens) from = reinterpret_cast<const P*>(x) + static_cast<std::int64_t>(pair / pairs.top_k) * packs;
  }
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  P held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (thread + i * threads < packs) held[i] = from[thread + i * threads];
  float most = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (thread + i * threads < packs) most = fmaxf(most, largest_magnitude(held[i]));
  for (int i = thread + kHeld * threads; i < packs; i += threads) most = fmaxf(most, largest_magnitude(from[i]));
  const float scale = fp8_row_scale(most, constant, shared);
  const float inverse = 1 / scale;
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (thread + i * threads < packs) to[row + thread + i * threads] = quantised(held[i], inverse);
  for (int i = thread + kHeld * threads; i < packs; i += threads) to[row + i] = quantised(from[i], inverse);
  if (thread == 0) scales[blockIdx.x] = scale;
}

// Grid: (rows, blocks of kMostThreads packs). Each thread quantises a pack; the 16 of a block of columns share a scale.
template <typename T>
static __global__ __launch_bounds__(kMostThreads) void quantise_blocks_kernel(const T* x, uint2* to, float* scales,
                                                                              int packs, int stride) {
  using P = Pack<T, 8>;
  let_next_begin();
  wait_for_previous();
  const int pack = static_cast<int>(blockIdx.y) * kMostThreads + static_cast<int>(threadIdx.x);
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * packs + pack;
  P values{};
  if (pack < packs) values = reinterpret_cast<const P*>(x)[at];
  float most = largest_magnitude(values);
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, offset));
  if (pack >= packs) return;
  const float scale = fp8_scale(most);
  to[at] = quantised(values, 1 / scale);
  if (pack % 16 == 0) scales[static_cast<std::int64_t>(pack / 16) * stride + blockIdx.x] = scale;
}

static Fp8Activations make_activations(Runtime& runtime, std::int64_t m, std::int64_t columns, bool blocks) {
  constexpr std::int64_t kUnit = 128;  // so that tiles find a scale for each of their rows
  return {runtime.make({m, columns}, DType::uint8),
          runtime.make({blocks ? (columns + kFp8Block - 1) / kFp8Block : 1, (m + kUnit - 1) / kUnit * kUnit},
                       DType::float32)};
}

Fp8Activations make_fp8_activations(Runtime& runtime, std::int64_t m, const Fp8Rows& rows) {
  return make_activations(runtime, m, rows.columns, rows.blocks);
}

// By blocks, or rows; by `constant` if that is not 0, or by those of `pairs`.
static Fp8Activations quantised(Runtime& runtime, const Tensor& x, bool blocks, float constant,
                                const Fp8Pairs& pairs = {}) {
  const std::int64_t rows = pairs.constants == nullptr ? x.shape[0] : pairs.count;
  const Fp8Activations to = make_activations(runtime, rows, x.shape[1], blocks);
  const auto m = static_cast<unsigned>(rows);
  const int packs = static_cast<int>(x.shape[1] / 8);
  const auto threads = static_cast<unsigned>(std::clamp((packs + 31) / 32 * 32, 32, kMostThreads));
  const auto go = [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const T* from = static_cast<const T*>(x.data);
    auto* values = static_cast<uint2*>(to.values.data);
    auto* scales = static_cast<float*>(to.scales.data);
    if (blocks)
      launch(runtime, quantise_blocks_kernel<T>, dim3(m, blocks_for(packs, kMostThreads)), kMostThreads, 0, from,
             values, scales, packs, static_cast<int>(to.scales.shape[1]));
    else
      launch(runtime, quantise_rows_kernel<T>, m, threads, 0, from, values, scales, packs, constant, pairs);
  };
  runtime.dtype() == DType::float16 ? go(static_cast<f16*>(nullptr)) : go(static_cast<bf16*>(nullptr));
  return to;
}

Fp8Activations quantise_fp8(Runtime& runtime, const Tensor& x, const Fp8Rows& rows) {
  return quantised(runtime, x, rows.blocks, rows.input_scale.value_or(0));
}

Fp8Activations quantise_fp8(Runtime& runtime, const Tensor& x) {
  check_rank(x, 2, "a matrix to be quantised");
  check_dtype(x, runtime.dtype(), "a matrix to be quantised");
  if (!takes_fp8(runtime, static_cast<int>(x.shape[1])))
    throw std::invalid_argument("columns of " + describe(x) +
                                " cannot be quantised: their number is no multiple of 16");
  const DeviceGuard guard(runtime.device());
  return quantised(runtime, x, false, 0);
}

Fp8Activations quantise_fp8(Runtime& runtime, const Tensor& x, const Fp8Pairs& pairs) {
  return quantised(runtime, x, false, 0, pairs);
}

static bool quantise_alike(const Fp8Rows& one, const Fp8Rows& other) {
  return one.blocks == other.blocks && one.input_scale == other.input_scale;
}

const Fp8Rows* rows_that_quantise(const LinearWeight& weight) {
  const auto* parts = std::get_if<std::vector<Fp8Rows>>(&weight.weight);
  if (parts == nullptr) return nullptr;
  const Fp8Rows& first = parts->at(0);
  const bool alike = std::ranges::all_of(*parts, [&](const Fp8Rows& part) { return quantise_alike(first, part); });
  return alike && !first.blocks ? &first : nullptr;
}

// ---- Dequantising

// One thread for each 16 elements of a row.
template <typename T>
static __global__ void dequantise_kernel(const uint4* weight, const float* scales, T* to, int words, std::int64_t count,
                                         bool blocks) {
  wait_for_previous();
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const std::int64_t row = at / words;
  const int word = static_cast<int>(at % words), blocks_of_row = (words * 16 + kFp8Block - 1) / kFp8Block;
  const float scale = scales[blocks ? row / kFp8Block * blocks_of_row + word * 16 / kFp8Block : row];
  const uint4 sixteen = weight[at];
  const std::uint32_t fours[] = {sixteen.x, sixteen.y, sixteen.z, sixteen.w};
  Pack<T, 8> made[2];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    // The bits of e4m3 are those of float16 but for the bias of the exponent: 2^8 times as much.
    const auto code = static_cast<std::uint16_t>(fours[i / 4] >> (i % 4 * 8) & 0xffU);
    const auto bits = static_cast<std::uint16_t>((code & 0x80U) << 8 | (code & 0x7fU) << 7);
    const float value = (code & 0x7fU) == 0x7fU ? NAN : to_float(reinterpret_cast<const f16&>(bits)) * 256;
    made[i / 8].at[i % 8] = from_float<T>(value * scale);
  }
  reinterpret_cast<Pack<T, 8>*>(to)[2 * at] = made[0];
  reinterpret_cast<Pack<T, 8>*>(to)[2 * at + 1] = made[1];
}

Tensor dequantise(Runtime& runtime, const std::vector<Fp8Rows>& parts) {
  std::int64_t rows = 0;
  for (const Fp8Rows& part : parts) rows += part.rows;
  Tensor made = runtime.make({rows, parts.at(0).columns}, runtime.dtype());
  const auto fill = [&](auto* to) {
    for (const Fp8Rows& part : parts) {
      const std::int64_t count = part.weight.size() / 16;
      launch(runtime, dequantise_kernel<Pointee<decltype(to)>>, blocks_for(count, kMostThreads), kMostThreads, 0,
             static_cast<const uint4*>(part.weight.data), static_cast<const float*>(part.scales.data), to,
             part.columns / 16, count, part.blocks);
      to += part.weight.size();
    }
  };
  runtime.dtype() == DType::float16 ? fill(static_cast<f16*>(made.data)) : fill(static_cast<bf16*>(made.data));
  return made;
}

// ---- Products

bool takes_fp8(const Runtime& runtime, int columns) {
  return runtime.dtype() != DType::float32 && runtime.capability() >= 89 && columns % 16 == 0;
}

static void multiply(Runtime& runtime, const Fp8Product& product) {
  if (runtime.batch_invariant())
    multiply_fp8_tiles(runtime, product);
  else if (takes_skinny_fp8(product))
    multiply_skinny_fp8(runtime, product);
  else if (takes_fp8_on_hopper(runtime, product))
    multiply_fp8_on_hopper(runtime, product);
  else
    multiply_fp8_tiles(runtime, product);
}

// Some of the columns of y, from `first` on.
static void multiply_rows(Runtime& runtime, const Fp8Activations& x, const Fp8Rows& part, const Tensor* bias,
                          const Tensor& y, std::int64_t first) {
  const auto at = static_cast<std::size_t>(first);
  const void* own = bias == nullptr ? nullptr : static_cast<const char*>(bias->data) + at * item_size(bias->dtype);
  multiply(runtime, {{x.values.data, part.weight.data, own, static_cast<char*>(y.data) + at * item_size(y.dtype),
                      static_cast<int>(x.values.shape[0]), part.rows, part.columns, runtime.dtype(), y.dtype},
                     {static_cast<const float*>(x.scales.data), static_cast<const float*>(part.scales.data),
                      static_cast<int>(x.scales.shape[1])},
                     static_cast<int>(y.shape[1]),
                     part.blocks});
}

void multiply_fp8(Runtime& runtime, const Fp8Activations& x, const std::vector<Fp8Rows>& parts, const Tensor* bias,
                  const Tensor& y) {
  std::int64_t first = 0;
  for (const Fp8Rows& part : parts) {
    multiply_rows(runtime, x, part, bias, y, first);
    first += part.rows;
  }
}

void multiply_fp8(Runtime& runtime, const Tensor& x, const std::vector<Fp8Rows>& parts, const Tensor* bias,
                  const Tensor& y) {
  std::int64_t first = 0;
  Fp8Activations own;
  const Fp8Rows* before = nullptr;
  for (const Fp8Rows& part : parts) {
    if (before == nullptr || !quantise_alike(*before, part)) own = quantise_fp8(runtime, x, part);
    before = &part;
    multiply_rows(runtime, own, part, bias, y, first);
    first += part.rows;
  }
}

}  // namespace vllmlite::cuda
