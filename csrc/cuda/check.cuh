// Every CUDA call goes through VLLMLITE_CUDA_CHECK.
//
// What a .cu file has to itself is `static`, or a class whose name no other file has, not in an anonymous namespace:
// nvcc names those after the path that it builds in, and no two builds would be the same.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/device.hpp"

namespace vllmlite::cuda {

inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch would report this failure as its own
  const std::string message = std::string(call) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorMemoryAllocation) throw OutOfMemory(message);
  throw Error(message);
}

// Makes a device current for one scope.
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
