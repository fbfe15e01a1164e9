#include <algorithm>

#include "cuda/activation.cuh"
#include "cuda/bytes.cuh"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

constexpr unsigned kThreads = 256;
constexpr int kMostOfRow = 512, kHeld = 4;  // threads of a row that is quantised, and packs that each holds

// Calls `function` with a std::integral_constant of the activation, so that it can be a template argument.
template <typename Function>
static void with_activation(Activation activation, Function function) {
  switch (activation) {
    case Activation::relu:
      return function(std::integral_constant<Activation, Activation::relu>());
    case Activation::silu:
      return function(std::integral_constant<Activation, Activation::silu>());
    case Activation::gelu:
      return function(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh:
      return function(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::clamped_swiglu:
      throw std::invalid_argument("activation clamped_swiglu: the cuda backend does not have it");
  }
}

// Grid: (rows, blocks of kThreads packs); each thread computes one pack of kSize elements of `out`, which has `packs`
// packs a row. A gated row of x has twice as many, the gate's first.
template <typename T, int kSize, Activation kActivation, bool kGated>
static __global__ void activation_kernel(const T* x, T* out, int packs) {
  using P = Pack<T, kSize>;
  let_next_begin();
  wait_for_previous();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * packs;
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= packs) return;
  const P* from = reinterpret_cast<const P*>(x) + (kGated ? 2 * row : row);
  const P values = from[column];
  P result;
  if constexpr (kGated) {
    const P up = from[packs + column];
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      result.at[j] = from_float<T>(activated<kActivation>(to_float(values.at[j])) * to_float(up.at[j]));
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j) result.at[j] = from_float<T>(activated<kActivation>(to_float(values.at[j])));
  }
  reinterpret_cast<P*>(out)[row + column] = result;
}

// One block a row: the gated activation of x, rounded to T and quantised.
template <typename T, Activation kActivation, bool kIntegers>
static __global__ __launch_bounds__(kMostOfRow) void quantised_activation_kernel(
    const T* x, int packs, const __grid_constant__ QuantisedRows to) {
  using P = Pack<T, 8>;
  __shared__ float shared[32];
  let_next_begin();
  wait_for_previous();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * packs;
  const P* from = reinterpret_cast<const P*>(x) + 2 * row;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  P held[kHeld], up[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = thread + i * threads;
    if (column < packs) {
      held[i] = from[column];
      up[i] = from[packs + column];
    }
  }
  RowQuantiser<kIntegers> quantiser(to);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (thread + i * threads >= packs) break;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      held[i].at[j] = from_float<T>(activated<kActivation>(to_float(held[i].at[j])) * to_float(up[i].at[j]));
    quantiser.see(held[i]);
  }
  quantiser.settle(shared);
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (thread + i * threads < packs) to.values[row + thread + i * threads] = quantiser.codes(held[i]);
  quantiser.finish(blockIdx.x, shared);
}

static ByteActivations run_quantised(Runtime& runtime, const Tensor& x, Activation activation, const ByteRows& rows) {
  const ByteActivations made = make_byte_activations(runtime, x.shape[0], rows.columns, rows.inputs);
  const int packs = rows.columns / 8;
  const auto go = [&](auto* type) {
    using T = Pointee<decltype(type)>;
    with_activation(activation, [&](auto constant) {
      launch(runtime,
             rows.inputs.integers ? quantised_activation_kernel<T, constant(), true>
                                  : quantised_activation_kernel<T, constant(), false>,
             static_cast<unsigned>(x.shape[0]), static_cast<unsigned>(std::min((packs + 31) / 32 * 32, kMostOfRow)), 0,
             static_cast<const T*>(x.data), packs, quantised_rows(made, rows.inputs));
    });
  };
  x.dtype == DType::float16 ? go(static_cast<f16*>(nullptr)) : go(static_cast<bf16*>(nullptr));
  return made;
}

template <bool kGated>
static void run(const Runtime& runtime, const Tensor& x, const Tensor& out, Activation activation) {
  const std::int64_t rows = out.shape[0], width = out.shape[1];
  if (out.bytes() == 0) return;
  with_float(x.dtype, [&](auto* pointer) {
    with_activation(activation, [&](auto constant) {
      using T = Pointee<decltype(pointer)>;
      constexpr Activation kActivation = constant();
      const auto go = [&](auto* kernel, std::int64_t size) {
        const dim3 grid(static_cast<unsigned>(rows), blocks_for(width / size, kThreads));
        launch(runtime, kernel, grid, kThreads, 0, static_cast<const T*>(x.data), static_cast<T*>(out.data),
               static_cast<int>(width / size));
      };
      if (width % kPack<T> == 0)
        go(activation_kernel<T, kPack<T>, kActivation, kGated>, kPack<T>);
      else
        go(activation_kernel<T, 1, kActivation, kGated>, 1);
    });
  });
}

Activations gated_activation(Runtime& runtime, const Tensor& x, Activation activation, const LinearWeight* feeds) {
  check_rank(x, 2, "x of gated_activation");
  check_dtype(x, runtime.dtype(), "x of gated_activation");
  if (x.shape[1] % 2 != 0) throw std::invalid_argument("gated_activation: the width of x is odd");
  if (activation == Activation::relu)
    throw std::invalid_argument("activation relu: gated, there are silu, gelu and gelu_tanh");
  const DeviceGuard guard(runtime.device());
  const ByteRows* rows = feeds == nullptr ? nullptr : rows_that_quantise(*feeds);
  if (rows != nullptr && x.shape[1] == 2 * rows->columns && rows->columns <= kMostOfRow * kHeld * 8)
    return run_quantised(runtime, x, activation, *rows);
  Tensor out = runtime.make({x.shape[0], x.shape[1] / 2}, x.dtype);
  run<true>(runtime, x, out, activation);
  return out;
}

Tensor activation(Runtime& runtime, const Tensor& x, Activation activation) {
  check_rank(x, 2, "x of activation");
  check_dtype(x, runtime.dtype(), "x of activation");
  const DeviceGuard guard(runtime.device());
  run<false>(runtime, x, x, activation);
  return x;
}

}  // namespace vllmlite::cuda
