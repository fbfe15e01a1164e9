// Shared by the kernels: number types, vector accesses, reductions, and launches that overlap.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/check.cuh"
#include "cuda/runtime.hpp"

namespace vllmlite::cuda {

using f16 = __half;
using bf16 = __nv_bfloat16;
struct e4m3 {  // an 8-bit float with 4 bits of exponent and 3 of mantissa
  std::uint8_t bits;
};

constexpr unsigned kAll = 0xffffffffU;  // mask of all lanes of a warp

// ---- Conversions to float and back, rounding to nearest

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T at[kSize];
};

// Number of elements in an access of 16 bytes.
template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// ---- Reductions, in a fixed order

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, offset));
  return x;
}

// Combines x over a block of whole warps; every thread gets the result. `shared` is shared memory for 32 values.
template <typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T x, T* shared, Combine combine) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(kAll, x, offset));
  __syncthreads();
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = shared[0];
  for (unsigned i = 1; i < warps; ++i) x = combine(x, shared[i]);
  return x;
}

__device__ __forceinline__ float block_sum(float x, float* shared) {
  return block_reduce(x, shared, [](float a, float b) { return a + b; });
}

// ---- Launches

// A kernel launched here may become resident while the kernels before it still run. It must call wait_for_previous
// before it reads or writes anything that another kernel of the step writes. Before that it may only read weights and
// what was written before the last fence: the batch, and keys and values of earlier steps. Most call let_next_begin
// at once, which is safe: the next kernel waits for the end of this one, and so for the end of all before it.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

constexpr unsigned kMaxGridAxis = 65535;          // blocks of a grid in its y and in its z dimension
constexpr std::size_t kDefaultShared = 48 << 10;  // bytes of shared memory that a kernel gets without asking for more

// `cluster`: blocks, next to each other in x, that share their shared memory.
template <typename... Parameters, typename... Arguments>
void launch_clusters(const Runtime& runtime, void (*kernel)(Parameters...), unsigned cluster, dim3 grid,
                     unsigned threads, std::size_t shared, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (grid.y > kMaxGridAxis || grid.z > kMaxGridAxis)
    throw std::invalid_argument("a step of this size takes more blocks of threads than a launch has: lower " +
                                std::string("max_num_batched_tokens or max_num_seqs"));
  if (shared > kDefaultShared)
    VLLMLITE_CUDA_CHECK(cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                        static_cast<int>(shared));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = runtime.stream();
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (runtime.overlap_next()) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {cluster, 1, 1};
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(std::forward<Arguments>(arguments))...),
        "cudaLaunchKernelEx");
}

template <typename... Parameters, typename... Arguments>
void launch(const Runtime& runtime, void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared,
            Arguments&&... arguments) {
  launch_clusters(runtime, kernel, 1, grid, threads, shared, std::forward<Arguments>(arguments)...);
}

inline unsigned blocks_for(std::int64_t count, std::int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

// Calls `function` with a null pointer to the C++ type of a float dtype; TypeError for other dtypes.
template <typename Function>
void with_float(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::float32:
      return function(static_cast<float*>(nullptr));
    case DType::float16:
      return function(static_cast<f16*>(nullptr));
    case DType::bfloat16:
      return function(static_cast<bf16*>(nullptr));
    default:
      throw TypeError("expected float32, float16 or bfloat16, not " + std::string(name(dtype)));
  }
}

// The same for a 16-bit dtype and that of results, which is float32 or the same.
template <typename Function>
void with_results(DType dtype, DType out, Function&& function) {
  const auto call = [&](auto* type) {
    return out == DType::float32 ? function(type, static_cast<float*>(nullptr)) : function(type, type);
  };
  return dtype == DType::float16 ? call(static_cast<f16*>(nullptr)) : call(static_cast<bf16*>(nullptr));
}

template <typename Pointer>
using Pointee = std::remove_pointer_t<Pointer>;

inline bool aligned(const void* pointer, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0;
}

}  // namespace vllmlite::cuda
