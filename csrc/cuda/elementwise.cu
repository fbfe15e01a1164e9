// Elementwise ops and row gathers.
#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

constexpr unsigned kThreads = 256;
constexpr std::int64_t kMaxBlocks = 1 << 20;

static unsigned grid_for(std::int64_t count, std::int64_t each) {
  return static_cast<unsigned>(std::min((count + each - 1) / each, kMaxBlocks));
}

// Converts `size` elements; a grid-stride loop, one element a thread.
template <typename From, typename To>
static __global__ void convert_kernel(const From* from, To* to, std::int64_t size) {
  wait_for_previous();
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride)
    to[i] = from_float<To>(to_float(from[i]));
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

// Grid: (rows of `to`). Each block copies one row in words of 16 bytes or of 1; rows out of range are left unwritten.
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

// ---- Sums and products

struct Add {
  __device__ float operator()(float x, float other) const { return x + other; }
};

struct Scale {
  float factor;
  __device__ float operator()(float x) const { return x * factor; }
};

struct SoftCap {
  float cap;
  __device__ float operator()(float x) const { return cap * tanhf(x / cap); }
};

// Replaces each element of `to` by function(element), or by function(element of x, element) if it takes two arguments.
// A grid-stride loop, one pack of kSize elements a thread.
template <typename T, int kSize, typename Function>
static __global__ void edit_kernel(const T* x, T* to, std::int64_t packs, Function function) {
  using P = Pack<T, kSize>;
  let_next_begin();
  wait_for_previous();
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < packs; i += stride) {
    P values = reinterpret_cast<const P*>(to)[i];
    if constexpr (std::is_invocable_v<Function, float, float>) {
      const P others = reinterpret_cast<const P*>(x)[i];
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        values.at[j] = from_float<T>(function(to_float(others.at[j]), to_float(values.at[j])));
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) values.at[j] = from_float<T>(function(to_float(values.at[j])));
    }
    reinterpret_cast<P*>(to)[i] = values;
  }
}

template <typename Function>
static Tensor edit(const Runtime& runtime, const Tensor* x, const Tensor& to, Function function) {
  const DeviceGuard guard(runtime.device());
  with_float(to.dtype, [&](auto* pointer) {
    using T = Pointee<decltype(pointer)>;
    const auto* from = x == nullptr ? nullptr : static_cast<const T*>(x->data);
    const auto go = [&](auto* kernel, std::int64_t packs) {
      launch(runtime, kernel, grid_for(packs, kThreads), kThreads, 0, from, static_cast<T*>(to.data), packs, function);
    };
    if (to.size() % kPack<T> == 0 && aligned(to.data, 16) && aligned(from, 16))
      go(edit_kernel<T, kPack<T>, Function>, to.size() / kPack<T>);
    else
      go(edit_kernel<T, 1, Function>, to.size());
  });
  return to;
}

Tensor add(Runtime& runtime, const Tensor& x, const Tensor& other) {
  check_shape(other, x.shape, "the second term of add");
  check_dtype(other, x.dtype, "the second term of add");
  return edit(runtime, &x, other, Add{});
}

Tensor scale(Runtime& runtime, const Tensor& x, float factor) { return edit(runtime, nullptr, x, Scale{factor}); }

Tensor soft_cap(Runtime& runtime, const Tensor& x, float cap) {
  check_dtype(x, DType::float32, "x of soft_cap");
  return edit(runtime, nullptr, x, SoftCap{cap});
}

// Grid: (rows, blocks of kThreads packs); each thread scales one pack of x by the sigmoid of its row's gate.
template <typename T, int kSize>
static __global__ void sigmoid_gate_kernel(T* x, const T* gate, int packs) {
  using P = Pack<T, kSize>;
  let_next_begin();
  wait_for_previous();
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= packs) return;
  const float factor = 1 / (1 + expf(-to_float(gate[blockIdx.x])));
  P& values = reinterpret_cast<P*>(x)[static_cast<std::int64_t>(blockIdx.x) * packs + column];
  P result = values;
#pragma unroll
  for (int j = 0; j < kSize; ++j) result.at[j] = from_float<T>(to_float(result.at[j]) * factor);
  values = result;
}

Tensor sigmoid_gate(Runtime& runtime, const Tensor& x, const Tensor& gate) {
  check_rank(x, 2, "x of sigmoid_gate");
  check_dtype(x, runtime.dtype(), "x of sigmoid_gate");
  check_shape(gate, {x.shape[0], 1}, "the gate of sigmoid_gate");
  check_dtype(gate, x.dtype, "the gate of sigmoid_gate");
  const DeviceGuard guard(runtime.device());
  with_float(x.dtype, [&](auto* pointer) {
    using T = Pointee<decltype(pointer)>;
    const auto go = [&](auto* kernel, std::int64_t packs) {
      const dim3 grid(static_cast<unsigned>(x.shape[0]), blocks_for(packs, kThreads));
      launch(runtime, kernel, grid, kThreads, 0, static_cast<T*>(x.data), static_cast<const T*>(gate.data),
             static_cast<int>(packs));
    };
    if (x.shape[1] % kPack<T> == 0)
      go(sigmoid_gate_kernel<T, kPack<T>>, x.shape[1] / kPack<T>);
    else
      go(sigmoid_gate_kernel<T, 1>, x.shape[1]);
  });
  return x;
}

}  // namespace vllmlite::cuda
