// Weights of products: checked, and put into the tiles that kernels read where they are grouped integers.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void check(const Tensor& tensor, std::initializer_list<DType> dtypes, const std::vector<std::int64_t>& shape,
           const char* what) {
  if (std::ranges::find(dtypes, tensor.dtype) == dtypes.end() || tensor.shape != shape)
    throw std::invalid_argument(std::string(what) + " must be " + describe(shape) + ", not " + describe(tensor));
}

}  // namespace

std::size_t LinearPart::unit_bytes() const {
  return grouped() ? layout.tile_bytes(static_cast<int>(in)) : static_cast<std::size_t>(in) * item_size(data.dtype);
}

const std::byte* LinearPart::at(std::int64_t row) const {
  const auto unit = static_cast<std::size_t>(grouped() ? row / kGroupedRows : row);
  return static_cast<const std::byte*>(data.data) + unit * unit_bytes();
}

std::int64_t LinearWeight::out() const {
  std::int64_t rows = 0;
  for (const LinearPart& part : parts) rows += part.rows;
  return rows;
}

LinearPart float_part(Tensor data) {
  if (data.shape.size() != 2) throw std::invalid_argument("a weight must be [out, in], not " + describe(data));
  float_of(data.dtype);
  const std::int64_t rows = data.shape[0], in = data.shape[1];
  return {std::move(data), rows, in};
}

void check_grouped(const GroupedWeight& stored) {
  if (stored.bits != 4 && stored.bits != 8) throw std::invalid_argument("quantised weights must have 4 or 8 bits");
  if (stored.group_size < kGroupUnit || stored.group_size % kGroupUnit != 0)
    if (stored.group_size < stored.columns)
      throw std::invalid_argument("groups must be of multiples of " + std::to_string(kGroupUnit) + " columns");
  if (stored.qweight.shape.size() != 2 || stored.qweight.size() == 0)
    throw std::invalid_argument("a weight must have rows and columns");
  const std::int64_t rows = stored.qweight.shape[0], groups = divided_up(stored.columns, stored.group_size);
  check(stored.qweight, {DType::uint8}, {rows, divided_up(stored.columns * stored.bits, 8)}, "qweight");
  check(stored.scales, {DType::float16, DType::bfloat16, DType::float32}, {rows, groups}, "scales");
  if (stored.zeros) check(*stored.zeros, {DType::uint8}, {rows, groups}, "zeros");
  if (stored.order) {
    check(*stored.order, {DType::int32}, {stored.columns}, "the order");
    const auto* index = static_cast<const std::int32_t*>(stored.order->data);
    if (std::any_of(index, index + stored.columns, [&](std::int32_t i) { return i < 0 || i >= stored.columns; }))
      throw std::invalid_argument("the order must hold columns");
  }
  if (stored.floats && stored.bits == 8) {
    const auto* values = static_cast<const std::uint8_t*>(stored.qweight.data);
    if (std::any_of(values, values + stored.qweight.size(), [](std::uint8_t value) { return (value & 127) == 127; }))
      throw std::invalid_argument("a value is not a number");
  }
}

LinearPart grouped_part(Runtime& runtime, const GroupedWeight& stored) {
  check_grouped(stored);
  const std::int64_t rows = stored.qweight.shape[0], groups = divided_up(stored.columns, stored.group_size);
  LinearPart part{{}, rows, stored.columns, {}, stored.order};
  part.layout.bits = stored.bits;
  part.layout.floats = stored.floats;
  part.layout.group = static_cast<int>(std::min(stored.group_size, stored.columns));
  part.layout.scale = float_of(stored.scales.dtype);
  part.layout.zeros = stored.zeros.has_value();
  const auto tile_bytes = static_cast<std::int64_t>(part.unit_bytes());
  const std::int64_t tiles = divided_up(rows, kGroupedRows);
  part.data = allocate({tiles, tile_bytes}, DType::uint8);
  runtime.issue([&, pack = runtime.kernels().grouped[runtime.product_input() == DType::bfloat16 ? 1 : 0].pack_tile,
                 scale_bytes = groups * static_cast<std::int64_t>(item_size(stored.scales.dtype))](Worker& worker) {
    for (std::int64_t tile; (tile = worker.take()) < tiles;) {
      const std::int64_t row = tile * kGroupedRows;
      pack({static_cast<const std::uint8_t*>(stored.qweight.data) + row * stored.qweight.shape[1],
            static_cast<const std::byte*>(stored.scales.data) + row * scale_bytes,
            stored.zeros ? static_cast<const std::uint8_t*>(stored.zeros->data) + row * groups : nullptr,
            static_cast<int>(std::min<std::int64_t>(kGroupedRows, rows - row)), static_cast<int>(part.in), part.layout,
            static_cast<std::byte*>(part.data.data) + tile * tile_bytes});
    }
  });
  runtime.flush();
  return part;
}

LinearWeight make_weight(std::vector<LinearPart> parts, std::optional<Tensor> bias) {
  if (parts.empty()) throw std::invalid_argument("a weight needs at least one part");
  for (const LinearPart& part : parts)
    if (part.data.dtype != parts[0].data.dtype || part.in != parts[0].in)
      throw std::invalid_argument("parts of a weight differ: " + describe(parts[0].data) + " and " +
                                  describe(part.data));
  LinearWeight weight{std::move(parts), std::move(bias)};
  if (weight.bias && (weight.bias->dtype != DType::float32 || weight.bias->size() != weight.out()))
    throw std::invalid_argument("a bias of " + std::to_string(weight.out()) + " float32 is needed, not " +
                                describe(*weight.bias));
  return weight;
}

}  // namespace vllmlite::cpu
