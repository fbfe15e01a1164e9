// The tensor that every native backend shares: a typed, shaped, contiguous piece of memory and whoever keeps it alive.
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

// The wrong kind of value, where std::invalid_argument is a wrong value; Python sees a TypeError.
struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Copies share the memory. `data` is never written through when `readonly` is set (a mapped checkpoint, say).
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

// Checks a shape before memory is asked for: no negative size, and a byte count that std::size_t holds.
std::size_t checked_bytes(const std::vector<std::int64_t>& shape, DType dtype);

std::string describe(const std::vector<std::int64_t>& shape);
std::string describe(const Tensor& tensor);

}  // namespace vllmlite
