// Functions of the CUDA driver, found without a link to the driver's library.
#pragma once

#include <cuda.h>

#include <string>

#include "cuda/check.cuh"

namespace vllmlite::cuda {

// Returns the driver's function of type `Function` that is called `name`. Throws Error if the driver has none.
template <typename Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  VLLMLITE_CUDA_CHECK(cudaGetDriverEntryPointByVersion, name, &found, 12000, cudaEnableDefault, &result);
#else
  VLLMLITE_CUDA_CHECK(cudaGetDriverEntryPoint, name, &found, cudaEnableDefault, &result);
#endif
  if (result != cudaDriverEntryPointSuccess || found == nullptr)
    throw Error(std::string(name) + ": the driver has no such function");
  return reinterpret_cast<Function>(found);
}

}  // namespace vllmlite::cuda
