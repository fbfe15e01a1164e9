// The extension's interface to the CUDA runtime, in plain C++: only .cu files include CUDA's headers.
// Work runs in order on each device's legacy default stream; copies to and from the host have finished on return.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor/tensor.hpp"

namespace vllmlite::cuda {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct OutOfMemory : Error {
  using Error::Error;
};

struct DeviceInfo {
  int index;
  std::string name;
  int major;
  int minor;
  std::size_t total_bytes;
  int multiprocessors;
};

// The devices, or the reason why there are none. Versions are in CUDA's format (12040 is 12.4); driver_version 0 means
// that there is no driver.
struct Probe {
  int driver_version = 0;
  int runtime_version = 0;
  std::vector<DeviceInfo> devices;
  std::string reason;
};

// Creates no context, and does not throw if there is no driver or device.
Probe probe();

struct Memory {
  std::size_t free_bytes;
  std::size_t total_bytes;
};

Memory memory(int device);

Tensor empty(const std::vector<std::int64_t>& shape, DType dtype, int device);

// Copies between the host and a device, or within a device; both sides have one dtype and shape.
void copy(const Tensor& source, const Tensor& target);

void synchronize(int device);

}  // namespace vllmlite::cuda
