// Measures a GPU's memory read bandwidth and its rate of bfloat16 matrix products on random numbers.
// Prints {"read_gb_s": ..., "bf16_tflop_s": ...}.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define CHECK(call)                                                      \
  do {                                                                   \
    if (const auto status = (call); status != 0) {                       \
      std::fprintf(stderr, "%s: %d\n", #call, static_cast<int>(status)); \
      std::exit(1);                                                      \
    }                                                                    \
  } while (false)

__global__ void fill(std::uint32_t* to, std::size_t words) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < words;
       i += std::size_t{gridDim.x} * blockDim.x) {
    std::uint32_t x = static_cast<std::uint32_t>(i) * 2654435761U + 1;
    x ^= x >> 15;
    x *= 2246822519U;
    x ^= x >> 13;
    // Two random bfloat16 in [-2, 2).
    to[i] = (x & 0x807f807fU) | 0x3f803f80U;
  }
}

__global__ void read(const uint4* from, std::size_t each, std::uint32_t* to) {
  const uint4* own = from + blockIdx.x * each;
  std::uint32_t sum = 0;
#pragma unroll 8
  for (std::size_t i = threadIdx.x; i < each; i += blockDim.x) {
    const uint4 x = own[i];
    sum += x.x ^ x.y ^ x.z ^ x.w;
  }
  if (sum == 0x12345678U) *to = sum;
}

static double median_ms(int runs, const std::function<void()>& work) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> taken;
  for (int run = -3; run < runs; ++run) {
    CHECK(cudaEventRecord(begin));
    work();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (run >= 0) taken.push_back(ms);
  }
  std::sort(taken.begin(), taken.end());
  return taken[taken.size() / 2];
}

int main() {
  std::size_t free = 0, total = 0;
  CHECK(cudaMemGetInfo(&free, &total));
  const std::size_t bytes = std::min<std::size_t>(std::size_t{8} << 30, free / 2) >> 20 << 20;
  char* memory = nullptr;
  CHECK(cudaMalloc(&memory, bytes));
  fill<<<4096, 256>>>(reinterpret_cast<std::uint32_t*>(memory), bytes / 4);
  const std::size_t each = (std::size_t{256} << 10) / sizeof(uint4);
  const auto blocks = static_cast<unsigned>(bytes / sizeof(uint4) / each);
  const double read_ms = median_ms(15, [&] {
    read<<<blocks, 512>>>(reinterpret_cast<const uint4*>(memory), each, reinterpret_cast<std::uint32_t*>(memory));
  });
  CHECK(cudaGetLastError());

  constexpr int kSize = 8192;
  cublasLtHandle_t handle;
  CHECK(cublasLtCreate(&handle));
  cublasLtMatmulDesc_t operation;
  CHECK(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transposed = CUBLAS_OP_T;
  CHECK(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
  cublasLtMatrixLayout_t layout;
  CHECK(cublasLtMatrixLayoutCreate(&layout, CUDA_R_16BF, kSize, kSize, kSize));
  cublasLtMatmulPreference_t preference;
  CHECK(cublasLtMatmulPreferenceCreate(&preference));
  const std::size_t workspace = 32 << 20;
  CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                             sizeof workspace));
  cublasLtMatmulHeuristicResult_t best;
  int found = 0;
  CHECK(
      cublasLtMatmulAlgoGetHeuristic(handle, operation, layout, layout, layout, layout, preference, 1, &best, &found));
  const std::size_t matrix = std::size_t{kSize} * kSize * 2;
  const float one = 1, zero = 0;
  const double product_ms = median_ms(15, [&] {
    CHECK(cublasLtMatmul(handle, operation, &one, memory, layout, memory + matrix, layout, &zero, memory + 2 * matrix,
                         layout, memory + 2 * matrix, layout, &best.algo, memory + 3 * matrix, workspace, nullptr));
  });
  std::printf("{\"read_gb_s\": %.1f, \"bf16_tflop_s\": %.1f}\n", static_cast<double>(bytes) / read_ms / 1e6,
              2.0 * kSize * kSize * kSize / product_ms / 1e9);
  return 0;
}
