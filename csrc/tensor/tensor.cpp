#include "tensor/tensor.hpp"

#include <array>
#include <limits>

namespace vllmlite {

namespace {

struct DTypeInfo {
  DType dtype;
  std::string_view name;
  std::size_t item_size;
};

constexpr std::array kDTypes{
    DTypeInfo{DType::float64, "float64", 8}, DTypeInfo{DType::float32, "float32", 4},
    DTypeInfo{DType::float16, "float16", 2}, DTypeInfo{DType::bfloat16, "bfloat16", 2},
    DTypeInfo{DType::int64, "int64", 8},     DTypeInfo{DType::int32, "int32", 4},
    DTypeInfo{DType::int16, "int16", 2},     DTypeInfo{DType::int8, "int8", 1},
    DTypeInfo{DType::uint8, "uint8", 1},     DTypeInfo{DType::boolean, "bool", 1},
};

const DTypeInfo& info(DType dtype) { return kDTypes.at(static_cast<std::size_t>(dtype)); }

}  // namespace

std::size_t item_size(DType dtype) { return info(dtype).item_size; }

std::string_view name(DType dtype) { return info(dtype).name; }

DType dtype_from_name(std::string_view wanted) {
  std::string known;
  for (const DTypeInfo& candidate : kDTypes) {
    if (candidate.name == wanted) return candidate.dtype;
    known += known.empty() ? "" : ", ";
    known += candidate.name;
  }
  throw TypeError("unknown dtype '" + std::string(wanted) + "'; one of " + known);
}

std::string name(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::int64_t Tensor::size() const {
  std::int64_t count = 1;
  for (std::int64_t extent : shape) count *= extent;
  return count;
}

std::size_t Tensor::bytes() const { return static_cast<std::size_t>(size()) * item_size(dtype); }

std::size_t checked_bytes(const std::vector<std::int64_t>& shape, DType dtype) {
  // Byte counts must fit a pointer difference, hence the signed limit. The other sizes of an empty tensor are limited
  // too, so that no product of sizes overflows anywhere.
  constexpr auto limit = static_cast<std::size_t>(std::numeric_limits<std::ptrdiff_t>::max());
  std::size_t bytes = item_size(dtype);
  bool empty = false;
  for (std::int64_t extent : shape) {
    if (extent < 0) throw std::invalid_argument("shape " + describe(shape) + ": a size is negative");
    empty = empty || extent == 0;
    const auto factor = static_cast<std::size_t>(extent == 0 ? 1 : extent);
    if (bytes > limit / factor) throw std::invalid_argument("shape " + describe(shape) + " is too large");
    bytes *= factor;
  }
  return empty ? 0 : bytes;
}

std::string describe(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

std::string describe(const Tensor& tensor) {
  return std::string(name(tensor.dtype)) + describe(tensor.shape) + " on " + name(tensor.device);
}

}  // namespace vllmlite
