// Ops that go over rows once.
#include <algorithm>

#include "cuda/checks.hpp"
#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"

namespace vllmlite::cuda {

constexpr unsigned kThreads = 256;
constexpr std::int64_t kMostBlocks = 1 << 20;

static unsigned grid_for(std::int64_t count, std::int64_t each) {
  return static_cast<unsigned>(std::min((count + each - 1) / each, kMostBlocks));
}

template <typename From, typename To>
static __global__ void convert_kernel(const From* from, To* to, std::int64_t size) {
  wait_for_previous();
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride)
    to[i] = narrow<To>(wide(from[i]));
}

void convert(Runtime& runtime, const Tensor& source, const Tensor& target) {
  const DeviceGuard guard(runtime.device());
  with_float(source.dtype, [&](auto* from) {
    with_float(target.dtype, [&](auto* to) {
      using From = Pointee<decltype(from)>;
      using To = Pointee<decltype(to)>;
      launch(runtime, convert_kernel<From, To>, grid_for(source.size(), kThreads), kThreads, 0,
             static_cast<const From*>(source.data), static_cast<To*>(target.data), source.size());
    });
  });
}

// Rows as words of 16 bytes, or of one.
template <typename Word>
static __global__ void gather_kernel(const Word* from, const std::int32_t* index, Word* to, std::int64_t words,
                                     std::int64_t limit) {
  let_next_begin();
  wait_for_previous();
  const std::int64_t row = index[blockIdx.x];
  if (row < 0 || row >= limit) return;
  for (std::int64_t i = threadIdx.x; i < words; i += blockDim.x)
    to[static_cast<std::int64_t>(blockIdx.x) * words + i] = from[row * words + i];
}

Tensor gather_rows(Runtime& runtime, const Tensor& x, const Tensor& index) {
  if (x.shape.empty()) throw std::invalid_argument("rows of a scalar");
  check_rank(index, 1, "the index of rows");
  check_dtype(index, DType::int32, "the index of rows");
  const DeviceGuard guard(runtime.device());
  std::vector<std::int64_t> shape = x.shape;
  shape[0] = index.shape[0];
  Tensor out = runtime.make(shape, x.dtype);
  if (out.bytes() == 0) return out;
  const auto bytes = static_cast<std::int64_t>(out.bytes()) / shape[0];
  const auto count = static_cast<unsigned>(shape[0]);
  const auto* rows = static_cast<const std::int32_t*>(index.data);
  if (bytes % 16 == 0 && aligned(x.data, 16))
    launch(runtime, gather_kernel<uint4>, count, kThreads, 0, static_cast<const uint4*>(x.data), rows,
           static_cast<uint4*>(out.data), bytes / 16, x.shape[0]);
  else
    launch(runtime, gather_kernel<std::uint8_t>, count, kThreads, 0, static_cast<const std::uint8_t*>(x.data), rows,
           static_cast<std::uint8_t*>(out.data), bytes, x.shape[0]);
  return out;
}

Tensor embedding(Runtime& runtime, const Tensor& ids, const Tensor& table) {
  check_rank(table, 2, "the embedding table");
  check_dtype(table, runtime.dtype(), "the embedding table");
  return gather_rows(runtime, table, ids);
}

// ---- Norm

template <typename T, int kSize>
static __global__ void rms_norm_kernel(const T* x, const T* weight, T* residual, T* out, int packs, float eps) {
  using P = Pack<T, kSize>;
  __shared__ float room[32];
  let_next_begin();
  wait_for_previous();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * packs;
  const P* from = reinterpret_cast<const P*>(x) + row;
  P* sums = residual == nullptr ? nullptr : reinterpret_cast<P*>(residual) + row;
  P kept{};
  float squares = 0;
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += static_cast<int>(blockDim.x)) {
    kept = from[i];
    if (sums != nullptr) {
      const P other = sums[i];
#pragma unroll
      for (int j = 0; j < kSize; ++j) kept.at[j] = narrow<T>(wide(kept.at[j]) + wide(other.at[j]));
      sums[i] = kept;
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) squares = fmaf(wide(kept.at[j]), wide(kept.at[j]), squares);
  }
  const float factor = rsqrtf(block_sum(squares, room) / static_cast<float>(packs * kSize) + eps);
  const bool once = packs <= static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += static_cast<int>(blockDim.x)) {
    if (!once) kept = sums == nullptr ? from[i] : sums[i];
    const P scale = reinterpret_cast<const P*>(weight)[i];
    P normed;
#pragma unroll
    for (int j = 0; j < kSize; ++j) normed.at[j] = narrow<T>(wide(kept.at[j]) * factor * wide(scale.at[j]));
    reinterpret_cast<P*>(out)[row + i] = normed;
  }
}

std::pair<Tensor, Tensor> rms_norm(Runtime& runtime, const Tensor& x, const Tensor& weight, float eps,
                                   const std::optional<Tensor>& residual) {
  check_rank(x, 2, "x of rms_norm");
  check_dtype(x, runtime.dtype(), "x of rms_norm");
  check_shape(weight, {x.shape[1]}, "the weight of rms_norm");
  check_dtype(weight, x.dtype, "the weight of rms_norm");
  if (residual) {
    check_shape(*residual, x.shape, "the residual of rms_norm");
    check_dtype(*residual, x.dtype, "the residual of rms_norm");
  }
  const DeviceGuard guard(runtime.device());
  Tensor out = runtime.make(x.shape, x.dtype);
  if (out.bytes() != 0)
    with_float(x.dtype, [&](auto* pointer) {
      using T = Pointee<decltype(pointer)>;
      const auto run = [&](auto* kernel, std::int64_t size) {
        const std::int64_t packs = x.shape[1] / size;
        const auto threads = static_cast<unsigned>(std::clamp<std::int64_t>((packs + 31) / 32 * 32, 32, 1024));
        launch(runtime, kernel, static_cast<unsigned>(x.shape[0]), threads, 0, static_cast<const T*>(x.data),
               static_cast<const T*>(weight.data), residual ? static_cast<T*>(residual->data) : nullptr,
               static_cast<T*>(out.data), static_cast<int>(packs), eps);
      };
      if (x.shape[1] % kPack<T> == 0)
        run(rms_norm_kernel<T, kPack<T>>, kPack<T>);
      else
        run(rms_norm_kernel<T, 1>, 1);
    });
  return {out, residual ? *residual : x};
}

// ---- Gated activation

template <Gate kGate>
__device__ __forceinline__ float gate_of(float x) {
  if constexpr (kGate == Gate::silu) return x / (1 + expf(-x));
  if constexpr (kGate == Gate::gelu) return 0.5F * x * erfcf(-x * 0.70710678118654752F);
  constexpr float kFactor = 0.79788456080286536F;  // sqrt(2 / pi)
  return 0.5F * x * (1 + tanhf(kFactor * fmaf(0.044715F * x * x, x, x)));
}

// A row of blocks a row.
template <typename T, int kSize, Gate kGate>
static __global__ void gated_kernel(const T* x, T* out, int packs) {
  using P = Pack<T, kSize>;
  let_next_begin();
  wait_for_previous();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * packs;
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= packs) return;
  const P gate = reinterpret_cast<const P*>(x)[2 * row + column];
  const P up = reinterpret_cast<const P*>(x)[2 * row + packs + column];
  P result;
#pragma unroll
  for (int j = 0; j < kSize; ++j) result.at[j] = narrow<T>(gate_of<kGate>(wide(gate.at[j])) * wide(up.at[j]));
  reinterpret_cast<P*>(out)[row + column] = result;
}

template <typename T, Gate kGate>
static void run_gated(Runtime& runtime, const Tensor& x, const Tensor& out) {
  const std::int64_t rows = out.shape[0], width = out.shape[1];
  const auto run = [&](auto* kernel, std::int64_t size) {
    const dim3 grid(static_cast<unsigned>(rows), blocks_for(width / size, kThreads));
    launch(runtime, kernel, grid, kThreads, 0, static_cast<const T*>(x.data), static_cast<T*>(out.data),
           static_cast<int>(width / size));
  };
  if (width % kPack<T> == 0)
    run(gated_kernel<T, kPack<T>, kGate>, kPack<T>);
  else
    run(gated_kernel<T, 1, kGate>, 1);
}

Tensor gated_activation(Runtime& runtime, const Tensor& x, Gate gate) {
  check_rank(x, 2, "x of gated_activation");
  check_dtype(x, runtime.dtype(), "x of gated_activation");
  if (x.shape[1] % 2 != 0) throw std::invalid_argument("gated_activation: the width of x is odd");
  const DeviceGuard guard(runtime.device());
  Tensor out = runtime.make({x.shape[0], x.shape[1] / 2}, x.dtype);
  if (out.bytes() != 0)
    with_float(x.dtype, [&](auto* pointer) {
      using T = Pointee<decltype(pointer)>;
      if (gate == Gate::silu) run_gated<T, Gate::silu>(runtime, x, out);
      if (gate == Gate::gelu) run_gated<T, Gate::gelu>(runtime, x, out);
      if (gate == Gate::gelu_tanh) run_gated<T, Gate::gelu_tanh>(runtime, x, out);
    });
  return out;
}

}  // namespace vllmlite::cuda
