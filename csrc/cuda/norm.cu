// RMS and layer norms of rows, or of their sums with a residual; one block a row.
#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

// Layer norm if kCentred, else RMS norm. Grid: (rows), up to 1024 threads each; a row has `packs` packs of kSize
// elements. With a residual, x + residual is rounded to T, written to it, and normalised. W is T or float.
template <typename T, typename W, int kSize, bool kCentred>
static __global__ __launch_bounds__(1024) void norm_kernel(const T* x, const W* weight, const T* bias, T* residual,
                                                           T* out, int packs, float eps) {
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
  const float factor = rsqrtf(block_sum(squares, shared) / size + eps);
  for_each([&](int i) {
    const auto scale = reinterpret_cast<const Pack<W, kSize>*>(weight)[i];
    P added{}, normed;
    if (kCentred && bias != nullptr) added = reinterpret_cast<const P*>(bias)[i];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      float value = (to_float(kept.at[j]) - mean) * factor * to_float(scale.at[j]);
      if constexpr (kCentred) value += to_float(added.at[j]);
      normed.at[j] = from_float<T>(value);
    }
    reinterpret_cast<P*>(out)[row + i] = normed;
  });
}

template <typename T, typename W, bool kCentred>
static void run(const Runtime& runtime, const Tensor& x, const Tensor& weight, const Tensor* bias,
                const Tensor* residual, const Tensor& out, float eps) {
  const auto go = [&](auto* kernel, std::int64_t size) {
    const std::int64_t packs = x.shape[1] / size;
    const auto threads = static_cast<unsigned>(std::clamp<std::int64_t>((packs + 31) / 32 * 32, 32, 1024));
    const auto optional = [](const Tensor* tensor) {
      return tensor == nullptr ? nullptr : static_cast<T*>(tensor->data);
    };
    launch(runtime, kernel, static_cast<unsigned>(x.shape[0]), threads, 0, static_cast<const T*>(x.data),
           static_cast<const W*>(weight.data), optional(bias), optional(residual), static_cast<T*>(out.data),
           static_cast<int>(packs), eps);
  };
  if (x.shape[1] % kPack<T> == 0)
    go(norm_kernel<T, W, kPack<T>, kCentred>, kPack<T>);
  else
    go(norm_kernel<T, W, 1, kCentred>, 1);
}

static Tensor prepare(Runtime& runtime, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual) {
  check_rank(x, 2, "x of a norm");
  check_dtype(x, runtime.dtype(), "x of a norm");
  check_shape(weight, {x.shape[1]}, "the weight of a norm");
  if (residual) {
    check_shape(*residual, x.shape, "the residual of a norm");
    check_dtype(*residual, x.dtype, "the residual of a norm");
  }
  return runtime.make(x.shape, x.dtype);
}

static const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

std::pair<Tensor, Tensor> rms_norm(Runtime& runtime, const Tensor& x, const Tensor& weight, float eps,
                                   const std::optional<Tensor>& residual) {
  const DeviceGuard guard(runtime.device());
  Tensor out = prepare(runtime, x, weight, residual);
  if (weight.dtype != DType::float32) check_dtype(weight, x.dtype, "the weight of rms_norm");
  if (out.bytes() != 0)
    with_float(x.dtype, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      if (weight.dtype == x.dtype)
        run<T, T, false>(runtime, x, weight, nullptr, pointer(residual), out, eps);
      else
        run<T, float, false>(runtime, x, weight, nullptr, pointer(residual), out, eps);
    });
  return {out, residual ? *residual : x};
}

std::pair<Tensor, Tensor> layer_norm(Runtime& runtime, const Tensor& x, const Tensor& weight,
                                     const std::optional<Tensor>& bias, float eps,
                                     const std::optional<Tensor>& residual) {
  const DeviceGuard guard(runtime.device());
  Tensor out = prepare(runtime, x, weight, residual);
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
