// The tensor that all native backends share: dtype, shape, contiguous memory, and the owner that keeps it alive.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace vllmlite {

enum class DType : std::uint8_t {
  float64,
  float32,
  float16,
  bfloat16,
  int64,
  int32,
  int16,
  int8,
  uint8,
  boolean,
};

std::size_t item_size(DType dtype);
std::string_view name(DType dtype);
DType dtype_from_name(std::string_view name);

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;

  bool operator==(const Device&) const = default;
};

std::string name(Device device);

// A value of the wrong kind, whereas std::invalid_argument is a wrong value; Python sees a TypeError.
struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Copies share the memory. If `readonly` is set (say, a mapped checkpoint), nothing writes to `data`.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::float32;
  Device device;
  std::vector<std::int64_t> shape;
  std::shared_ptr<void> owner;
  bool readonly = false;

  std::int64_t size() const;
  std::size_t bytes() const;
};

// Bytes of a tensor of this shape. std::invalid_argument if a size is negative or the byte count is too large.
std::size_t checked_bytes(const std::vector<std::int64_t>& shape, DType dtype);

std::string describe(const std::vector<std::int64_t>& shape);
std::string describe(const Tensor& tensor);

}  // namespace vllmlite
