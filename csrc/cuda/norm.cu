// RMS and layer norms of rows, or of their sums with a residual; one block a row.
#include <algorithm>

#include "cuda/bytes.cuh"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

// Layer norm if kCentred, else RMS norm. Grid: (rows), up to 1024 threads each; a row has `packs` packs of kSize
// elements. With a residual, x + residual is rounded to T, written to it, and normalised. W is T or float. With a
// quantiser (RowQuantiser), a thread has one pack of eight, whose norm goes to `quantised` instead of `out`.
template <typename T, typename W, int kSize, bool kCentred, typename Quantiser>
static __global__ __launch_bounds__(1024) void norm_kernel(const T* x, const W* weight, const T* bias, T* residual,
                                                           T* out, int packs, float eps,
                                                           const __grid_constant__ QuantisedRows quantised) {
  constexpr bool kQuantised = !std::is_void_v<Quantiser>;
  using P = Pack<T, kSize>;
  __shared__ float shared[32];
  let_next_begin();
  wait_for_previous();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * packs;
  const P* from = reinterpret_cast<const P*>(x) + row;
  P* sums = residual == nullptr ? nullptr : reinterpret_cast<P*>(residual) + row;
  P kept{};  // the thread's pack, kept between passes if it has only one
  const bool once = packs <= static_cast<int>(blockDim.x);
  const auto for_each = [&](auto visit) {
    for (int i = static_cast<int>(threadIdx.x); i < packs; i += static_cast<int>(blockDim.x)) {
      if (!once) kept = sums == nullptr ? from[i] : sums[i];
      visit(i);
    }
  };
  const float size = static_cast<float>(packs * kSize);
  float plain = 0, squares = 0;
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += static_cast<int>(blockDim.x)) {
    kept = from[i];
    if (sums != nullptr) {
      const P other = sums[i];
#pragma unroll
      for (int j = 0; j < kSize; ++j) kept.at[j] = from_float<T>(to_float(kept.at[j]) + to_float(other.at[j]));
      sums[i] = kept;
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float value = to_float(kept.at[j]);
      if constexpr (kCentred)
        plain += value;
      else
        squares = fmaf(value, value, squares);
    }
  }
  float mean = 0;
  if constexpr (kCentred) {
    mean = block_sum(plain, shared) / size;
    for_each([&](int) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float away = to_float(kept.at[j]) - mean;
        squares = fmaf(away, away, squares);
      }
    });
  }
  P normed{};
  const float factor = rsqrtf(block_sum(squares, shared) / size + eps);
  for_each([&](int i) {
    const auto scale = reinterpret_cast<const Pack<W, kSize>*>(weight)[i];
    P added{};
    if (kCentred && bias != nullptr) added = reinterpret_cast<const P*>(bias)[i];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      float value = (to_float(kept.at[j]) - mean) * factor * to_float(scale.at[j]);
      if constexpr (kCentred) value += to_float(added.at[j]);
      normed.at[j] = from_float<T>(value);
    }
    if constexpr (!kQuantised) reinterpret_cast<P*>(out)[row + i] = normed;
  });
  if constexpr (kQuantised) {
    Quantiser quantiser(quantised);
    quantiser.see(normed);
    quantiser.settle(shared);
    const int i = static_cast<int>(threadIdx.x);
    if (i < packs) quantised.values[row + i] = quantiser.codes(normed);
    quantiser.finish(blockIdx.x, shared);
  }
}

constexpr std::int64_t kMostThreads = 1024;

template <typename T, typename W, bool kCentred>
static void run(const Runtime& runtime, const Tensor& x, const Tensor& weight, const Tensor* bias,
                const Tensor* residual, const Tensor& out, float eps, const QuantisedRows* quantised = nullptr) {
  const auto go = [&](auto* kernel, std::int64_t size) {
    const std::int64_t packs = x.shape[1] / size;
    const auto threads = static_cast<unsigned>(std::clamp<std::int64_t>((packs + 31) / 32 * 32, 32, kMostThreads));
    const auto optional = [](const Tensor* tensor) {
      return tensor == nullptr ? nullptr : static_cast<T*>(tensor->data);
    };
    launch(runtime, kernel, static_cast<unsigned>(x.shape[0]), threads, 0, static_cast<const T*>(x.data),
           static_cast<const W*>(weight.data), optional(bias), optional(residual), static_cast<T*>(out.data),
           static_cast<int>(packs), eps, quantised == nullptr ? QuantisedRows{} : *quantised);
  };
  if constexpr (sizeof(T) == 2 && !kCentred)
    if (quantised != nullptr)
      return quantised->inputs.integers ? go(norm_kernel<T, W, kPack<T>, false, RowQuantiser<true>>, kPack<T>)
                                        : go(norm_kernel<T, W, kPack<T>, false, RowQuantiser<false>>, kPack<T>);
  if (x.shape[1] % kPack<T> == 0)
    go(norm_kernel<T, W, kPack<T>, kCentred, void>, kPack<T>);
  else
    go(norm_kernel<T, W, 1, kCentred, void>, 1);
}

static void check_norm(Runtime& runtime, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual) {
  check_rank(x, 2, "x of a norm");
  check_dtype(x, runtime.dtype(), "x of a norm");
  check_shape(weight, {x.shape[1]}, "the weight of a norm");
  if (residual) {
    check_shape(*residual, x.shape, "the residual of a norm");
    check_dtype(*residual, x.dtype, "the residual of a norm");
  }
}

static const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

std::pair<Activations, Tensor> rms_norm(Runtime& runtime, const Tensor& x, const Tensor& weight, float eps,
                                        const std::optional<Tensor>& residual, const LinearWeight* feeds) {
  const DeviceGuard guard(runtime.device());
  check_norm(runtime, x, weight, residual);
  if (weight.dtype != DType::float32) check_dtype(weight, x.dtype, "the weight of rms_norm");
  const ByteRows* rows = feeds == nullptr ? nullptr : rows_that_quantise(*feeds);
  std::optional<ByteActivations> quantised;
  QuantisedRows to{};
  Tensor out;
  if (rows != nullptr && x.shape[1] == rows->columns && rows->columns <= kMostThreads * 8) {
    quantised = make_byte_activations(runtime, x.shape[0], rows->columns, rows->inputs);
    to = quantised_rows(*quantised, rows->inputs);
  } else {
    out = runtime.make(x.shape, x.dtype);
  }
  if (x.bytes() != 0)
    with_float(x.dtype, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      const QuantisedRows* rows_to = quantised ? &to : nullptr;
      if (weight.dtype == x.dtype)
        run<T, T, false>(runtime, x, weight, nullptr, pointer(residual), out, eps, rows_to);
      else
        run<T, float, false>(runtime, x, weight, nullptr, pointer(residual), out, eps, rows_to);
    });
  const Tensor sum = residual ? *residual : x;
  if (quantised) return {*quantised, sum};
  return {out, sum};
}

std::pair<Tensor, Tensor> layer_norm(Runtime& runtime, const Tensor& x, const Tensor& weight,
                                     const std::optional<Tensor>& bias, float eps,
                                     const std::optional<Tensor>& residual) {
  const DeviceGuard guard(runtime.device());
  check_norm(runtime, x, weight, residual);
  Tensor out = runtime.make(x.shape, x.dtype);
  check_dtype(weight, x.dtype, "the weight of layer_norm");
  if (bias) {
    check_shape(*bias, {x.shape[1]}, "the bias of layer_norm");
    check_dtype(*bias, x.dtype, "the bias of layer_norm");
  }
  if (out.bytes() != 0)
    with_float(x.dtype, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      run<T, T, true>(runtime, x, weight, pointer(bias), pointer(residual), out, eps);
    });
  return {out, residual ? *residual : x};
}

}  // namespace vllmlite::cuda
