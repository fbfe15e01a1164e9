// Every CUDA call goes through VLLMLITE_CUDA_CHECK.
//
// Functions and variables of one .cu file are `static`, and its classes have names that no other file uses, instead of
// an anonymous namespace: nvcc names those after the build path, and builds would not be reproducible.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/device.hpp"

namespace vllmlite::cuda {

inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // clears it, or the next launch would report it
  const std::string message = std::string(call) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorMemoryAllocation) throw OutOfMemory(message);
  throw Error(message);
}

// Makes a device current until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { (void)cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace vllmlite::cuda

#define VLLMLITE_CUDA_CHECK(function, ...) ::vllmlite::cuda::check(function(__VA_ARGS__), #function)
