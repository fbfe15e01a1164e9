// Products of 8-bit elements: how activations are quantised, and which kernel multiplies.
#include <algorithm>
#include <cmath>

#include "cuda/bytes.cuh"
#include "cuda/bytes.hpp"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

constexpr int kMostThreads = 512, kHeld = 4;

// ---- Quantising

// One block a row of `columns` columns, of which each thread holds the first kHeld packs of eight. Codes are padded to
// `packs` packs. Unless rows are kWhole packs, their elements are loaded one by one.
template <typename T, bool kIntegers, bool kWhole>
static __global__ __launch_bounds__(kMostThreads) void quantise_rows_kernel(const T* x, int columns, int packs,
                                                                            const __grid_constant__ QuantisedRows to,
                                                                            const __grid_constant__ BytePairs pairs) {
  using P = Pack<T, 8>;
  __shared__ float shared[32];
  let_next_begin();
  wait_for_previous();
  RowQuantiser<kIntegers> quantiser(to);
  std::int64_t row = blockIdx.x;
  if (pairs.constants != nullptr) {
    const int pair = pairs.pairs[blockIdx.x];
    quantiser.set_constant(pairs.constants[pairs.experts[pair]]);
    if (pairs.of_tokens) row = pair / pairs.top_k;
  }
  const T* from = x + row * columns;
  const auto load = [&](int pack) {
    if constexpr (kWhole) {
      if (pack * 8 < columns) return reinterpret_cast<const P*>(from)[pack];
      return P{};
    } else {
      P made{};
      for (int i = 0; i < 8; ++i)
        if (pack * 8 + i < columns) made.at[i] = from[pack * 8 + i];
      return made;
    }
  };
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  P held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (thread + i * threads < packs) held[i] = load(thread + i * threads);
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (thread + i * threads < packs) quantiser.see(held[i]);
  for (int i = thread + kHeld * threads; i < packs; i += threads) quantiser.see(load(i));
  quantiser.settle(shared);
  uint2* codes = to.values + static_cast<std::int64_t>(blockIdx.x) * packs;
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (thread + i * threads < packs) codes[thread + i * threads] = quantiser.codes(held[i]);
  for (int i = thread + kHeld * threads; i < packs; i += threads) codes[i] = quantiser.codes(load(i));
  quantiser.finish(blockIdx.x, shared);
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

ByteActivations make_byte_activations(Runtime& runtime, std::int64_t m, int columns, const ByteInputs& inputs) {
  constexpr std::int64_t kUnit = 128;  // so that tiles find a scale for each of their rows
  const std::int64_t padded = (m + kUnit - 1) / kUnit * kUnit;
  return {runtime.make({m, (columns + 15) / 16 * 16}, DType::uint8),
          runtime.make({inputs.blocks ? (columns + kFp8Block - 1) / kFp8Block : 1, padded}, DType::float32),
          inputs.integers ? runtime.make({padded, 2}, DType::int32) : Tensor{}};
}

// The scales of `inputs`, or of `pairs` if it has any.
static ByteActivations quantised(Runtime& runtime, const Tensor& x, const ByteInputs& inputs, const BytePairs& pairs) {
  const std::int64_t rows = pairs.constants == nullptr ? x.shape[0] : pairs.count;
  const int columns = static_cast<int>(x.shape[1]);
  const ByteActivations to = make_byte_activations(runtime, rows, columns, inputs);
  const auto m = static_cast<unsigned>(rows);
  const int packs = static_cast<int>(to.values.shape[1] / 8);
  const auto threads = static_cast<unsigned>(std::clamp((packs + 31) / 32 * 32, 32, kMostThreads));
  const auto go = [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const T* from = static_cast<const T*>(x.data);
    const auto by_rows = [&](auto* kernel) {
      launch(runtime, kernel, m, threads, 0, from, columns, packs, quantised_rows(to, inputs), pairs);
    };
    if (inputs.blocks)
      launch(runtime, quantise_blocks_kernel<T>, dim3(m, blocks_for(packs, kMostThreads)), kMostThreads, 0, from,
             static_cast<uint2*>(to.values.data), static_cast<float*>(to.scales.data), packs,
             static_cast<int>(to.scales.shape[1]));
    else if (!inputs.integers)
      by_rows(quantise_rows_kernel<T, false, true>);
    else
      columns % 8 == 0 ? by_rows(quantise_rows_kernel<T, true, true>) : by_rows(quantise_rows_kernel<T, true, false>);
  };
  runtime.dtype() == DType::float16 ? go(static_cast<f16*>(nullptr)) : go(static_cast<bf16*>(nullptr));
  return to;
}

ByteActivations quantise_bytes(Runtime& runtime, const Tensor& x, const ByteInputs& inputs) {
  check_rank(x, 2, "a matrix to be quantised");
  check_dtype(x, runtime.dtype(), "a matrix to be quantised");
  if (!inputs.integers && !takes_fp8(runtime, static_cast<int>(x.shape[1])))
    throw std::invalid_argument("columns of " + describe(x) +
                                " cannot be quantised: their number is no multiple of 16");
  const DeviceGuard guard(runtime.device());
  return quantised(runtime, x, inputs, {});
}

ByteActivations quantise_bytes(Runtime& runtime, const Tensor& x, const ByteInputs& inputs, const BytePairs& pairs) {
  return quantised(runtime, x, inputs, pairs);
}

const ByteRows* rows_that_quantise(const LinearWeight& weight) {
  const auto* parts = std::get_if<std::vector<ByteRows>>(&weight.weight);
  if (parts == nullptr) return nullptr;
  const ByteRows& first = parts->at(0);
  const bool alike = std::ranges::all_of(*parts, [&](const ByteRows& part) { return first.inputs == part.inputs; });
  return alike && !first.inputs.blocks && first.columns % 16 == 0 ? &first : nullptr;
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

// One thread for each element of a row.
template <typename T>
static __global__ void dequantise_integers_kernel(const std::int8_t* weight, const float* scales, const ByteZero* zeros,
                                                  T* to, int columns, int padded, std::int64_t count) {
  wait_for_previous();
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const std::int64_t row = at / columns;
  to[at] = from_float<T>(static_cast<float>(weight[row * padded + at % columns] - zeros[row].zero) * scales[row]);
}

Tensor dequantise(Runtime& runtime, const std::vector<ByteRows>& parts) {
  std::int64_t rows = 0;
  for (const ByteRows& part : parts) rows += part.rows;
  Tensor made = runtime.make({rows, parts.at(0).columns}, runtime.dtype());
  const auto fill = [&](auto* to) {
    using T = Pointee<decltype(to)>;
    for (const ByteRows& part : parts) {
      const std::int64_t count = static_cast<std::int64_t>(part.rows) * part.columns;
      const auto* scales = static_cast<const float*>(part.scales.data);
      if (part.inputs.integers)
        launch(runtime, dequantise_integers_kernel<T>, blocks_for(count, kMostThreads), kMostThreads, 0,
               static_cast<const std::int8_t*>(part.weight.data), scales,
               static_cast<const ByteZero*>(part.zeros->data), to, part.columns, static_cast<int>(part.weight.shape[1]),
               count);
      else
        launch(runtime, dequantise_kernel<T>, blocks_for(count / 16, kMostThreads), kMostThreads, 0,
               static_cast<const uint4*>(part.weight.data), scales, to, part.columns / 16, count / 16,
               part.inputs.blocks);
      to += count;
    }
  };
  runtime.dtype() == DType::float16 ? fill(static_cast<f16*>(made.data)) : fill(static_cast<bf16*>(made.data));
  return made;
}

// ---- Products

bool takes_fp8(const Runtime& runtime, int columns) {
  return runtime.dtype() != DType::float32 && runtime.capability() >= 89 && columns % 16 == 0;
}

static void multiply(Runtime& runtime, const ByteProduct& product) {
  const bool any_order = product.integers || !runtime.batch_invariant();  // sums of integers are exact
  if (any_order && takes_skinny_bytes(runtime, product))
    multiply_skinny_bytes(runtime, product);
  else if (any_order && takes_fp8_on_hopper(runtime, product))
    multiply_fp8_on_hopper(runtime, product);
  else
    multiply_byte_tiles(runtime, product);
}

// Some of the columns of y, from `first` on.
static void multiply_rows(Runtime& runtime, const ByteActivations& x, const ByteRows& part, const Tensor* bias,
                          const Tensor& y, std::int64_t first) {
  const auto at = static_cast<std::size_t>(first);
  const void* own = bias == nullptr ? nullptr : static_cast<const char*>(bias->data) + at * item_size(bias->dtype);
  multiply(runtime, {{x.values.data, part.weight.data, own, static_cast<char*>(y.data) + at * item_size(y.dtype),
                      static_cast<int>(x.values.shape[0]), part.rows, static_cast<int>(part.weight.shape[1]),
                      runtime.dtype(), y.dtype},
                     {static_cast<const float*>(x.scales.data), static_cast<const float*>(part.scales.data),
                      static_cast<int>(x.scales.shape[1]), static_cast<const ByteZero*>(x.zeros.data),
                      static_cast<const ByteZero*>(part.zeros ? part.zeros->data : nullptr)},
                     static_cast<int>(y.shape[1]),
                     part.inputs.blocks,
                     part.inputs.integers});
}

void multiply_bytes(Runtime& runtime, const ByteActivations& x, const std::vector<ByteRows>& parts, const Tensor* bias,
                    const Tensor& y) {
  std::int64_t first = 0;
  for (const ByteRows& part : parts) {
    multiply_rows(runtime, x, part, bias, y, first);
    first += part.rows;
  }
}

void multiply_bytes(Runtime& runtime, const Tensor& x, const std::vector<ByteRows>& parts, const Tensor* bias,
                    const Tensor& y) {
  std::int64_t first = 0;
  ByteActivations own;
  const ByteRows* before = nullptr;
  for (const ByteRows& part : parts) {
    if (before == nullptr || before->inputs != part.inputs) own = quantise_bytes(runtime, x, part.inputs);
    before = &part;
    multiply_rows(runtime, own, part, bias, y, first);
    first += part.rows;
  }
}

}  // namespace vllmlite::cuda
