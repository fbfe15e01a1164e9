// Quantised weights: how they are made, checked, and multiplied with.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

// Strips of w in a task: a multiple of every tile's, whose codes stay in the second-level cache for all rows of x.
constexpr std::int64_t kTaskStrips = 6;

constexpr std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Task {
  const std::uint8_t* codes;
  const std::uint16_t* scales;
  std::int64_t row, rows;  // of the whole weight
};

struct QuantizedX {
  Tensor codes, scales, sums;
};

QuantizedX quantize_x(Runtime& runtime, const Tensor& x, std::int64_t groups) {
  const std::int64_t rows = x.shape[0], size = x.shape[1];
  QuantizedX found{runtime.make({rows, groups * kGroup}, DType::int8), runtime.make({rows, groups}, DType::float32),
                   runtime.make({rows, groups}, DType::int32)};
  QuantizedRow row{};
  row.x = static_cast<const float*>(x.data);
  row.size = static_cast<int>(size);
  row.codes = static_cast<std::int8_t*>(found.codes.data);
  row.scales = static_cast<float*>(found.scales.data);
  row.sums = static_cast<std::int32_t*>(found.sums.data);
  runtime.keep(x);
  runtime.issue([&kernels = runtime.kernels(), row, rows, size, groups](Worker& worker) {
    for (std::int64_t index; (index = worker.take()) < rows;) {
      QuantizedRow one = row;
      one.x += index * size;
      one.codes += index * groups * kGroup;
      one.scales += index * groups;
      one.sums += index * groups;
      kernels.quantize_x(one);
    }
  });
  return found;
}

void check(const Tensor& tensor, DType dtype, const std::vector<std::int64_t>& shape, const char* what) {
  if (tensor.dtype != dtype || tensor.shape != shape)
    throw std::invalid_argument(std::string(what) + " must be " + std::string(name(dtype)) + describe(shape) +
                                ", not " + describe(tensor));
}

}  // namespace

std::int64_t QuantizedWeight::out() const {
  std::int64_t rows = 0;
  for (const QuantizedPart& part : parts) rows += part.rows;
  return rows;
}

QuantizedPart quantize(Runtime& runtime, const Tensor& w, Codes codes) {
  if (w.shape.size() != 2 || w.size() == 0)
    throw std::invalid_argument("a weight must be [out, in], not " + describe(w));
  const std::int64_t rows = w.shape[0], size = w.shape[1];
  const std::int64_t strips = divided_up(rows, kStripRows), groups = divided_up(size, kGroup);
  QuantizedPart part{allocate({strips, groups, group_bytes(codes)}, DType::uint8),
                     allocate({strips, groups, kStripRows}, DType::bfloat16), rows};
  QuantizedStrip strip{};
  strip.w = w.data;
  strip.type = float_of(w.dtype);
  strip.stride = size;
  strip.size = static_cast<int>(size);
  strip.codes = static_cast<std::uint8_t*>(part.codes.data);
  strip.scales = static_cast<std::uint16_t*>(part.scales.data);
  std::atomic<bool> finite{true};
  runtime.issue([kernel = runtime.kernels().quantize_strip[static_cast<int>(codes)], strip, rows, strips, groups,
                 row_bytes = size * static_cast<std::int64_t>(item_size(w.dtype)), codes, &finite](Worker& worker) {
    for (std::int64_t index; (index = worker.take()) < strips;) {
      QuantizedStrip one = strip;
      one.w = static_cast<const std::byte*>(strip.w) + index * kStripRows * row_bytes;
      one.rows = static_cast<int>(std::min<std::int64_t>(kStripRows, rows - index * kStripRows));
      one.codes += index * groups * group_bytes(codes);
      one.scales += index * groups * kStripRows;
      if (!kernel(one)) finite = false;
    }
  });
  runtime.flush();
  if (!finite) throw std::invalid_argument("values that are not finite cannot be quantised");
  return part;
}

QuantizedWeight make_quantized(Codes codes, std::vector<QuantizedPart> parts, std::int64_t in,
                               std::optional<Tensor> bias) {
  if (parts.empty()) throw std::invalid_argument("a weight needs at least one part");
  QuantizedWeight weight{codes, std::move(parts), in, std::move(bias)};
  for (const QuantizedPart& part : weight.parts) {
    const std::int64_t strips = divided_up(part.rows, kStripRows), groups = divided_up(in, kGroup);
    if (part.rows < 1 || in < 1) throw std::invalid_argument("a weight must have rows and columns");
    check(part.codes, DType::uint8, {strips, groups, group_bytes(codes)}, "codes");
    check(part.scales, DType::bfloat16, {strips, groups, kStripRows}, "scales");
  }
  if (weight.bias) check(*weight.bias, DType::float32, {weight.out()}, "the bias");
  return weight;
}

Tensor linear(Runtime& runtime, const Tensor& given, const QuantizedWeight& weight) {
  if (given.shape.size() != 2 || given.shape[1] != weight.in)
    throw std::invalid_argument("linear: x must be [rows, " + std::to_string(weight.in) + "], not " + describe(given));
  const std::int64_t rows = given.shape[0], out = weight.out(), groups = weight.groups();
  const Tensor y = runtime.make({rows, out}, DType::float32);
  if (rows == 0) return y;
  const QuantizedX x = quantize_x(runtime, converted(runtime, given, DType::float32), groups);

  QuantizedBlock block{};
  block.x = static_cast<const std::int8_t*>(x.codes.data);
  block.x_scales = static_cast<const float*>(x.scales.data);
  block.x_sums = static_cast<const std::int32_t*>(x.sums.data);
  block.m = static_cast<int>(rows);
  block.groups = static_cast<int>(groups);
  block.y = static_cast<float*>(y.data);
  block.y_stride = out;
  block.bias = weight.bias ? static_cast<const float*>(weight.bias->data) : nullptr;
  std::vector<Task> tasks;
  std::int64_t first = 0;
  for (const QuantizedPart& part : weight.parts) {
    for (std::int64_t strip = 0; strip * kStripRows < part.rows; strip += kTaskStrips)
      tasks.push_back({static_cast<const std::uint8_t*>(part.codes.data) + strip * groups * group_bytes(weight.codes),
                       static_cast<const std::uint16_t*>(part.scales.data) + strip * groups * kStripRows,
                       first + strip * kStripRows, std::min(kTaskStrips * kStripRows, part.rows - strip * kStripRows)});
    first += part.rows;
    runtime.keep(part.codes);
    runtime.keep(part.scales);
  }
  if (weight.bias) runtime.keep(*weight.bias);
  runtime.issue([kernel = runtime.kernels().quantized[static_cast<int>(weight.codes)], block,
                 tasks = std::move(tasks)](Worker& worker) {
    worker.take_ahead(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t index, std::int64_t following) {
      const Task& task = tasks[static_cast<std::size_t>(index)];
      QuantizedBlock one = block;
      one.codes = task.codes;
      one.scales = task.scales;
      one.n = static_cast<int>(task.rows);
      one.y += task.row;
      if (one.bias != nullptr) one.bias += task.row;
      // Prefetching past the end of a shorter task's codes is harmless.
      one.next = following < 0 ? nullptr : tasks[static_cast<std::size_t>(following)].codes;
      kernel(one);
    });
  });
  return y;
}

Tensor gated_linear(Runtime& runtime, const Tensor& x, const QuantizedWeight& weight, Activation f) {
  return gated_activation(runtime, linear(runtime, x, weight), f);
}

Tensor grouped_linear(Runtime& runtime, const Tensor& given, const std::vector<QuantizedWeight>& weights,
                      const std::shared_ptr<Groups>& groups) {
  const QuantizedWeight& like = weights.front();
  const std::int64_t rows = given.shape[0], out = like.out(), size = like.groups();
  const Tensor y = runtime.make({rows, out}, DType::float32);
  const QuantizedX x = quantize_x(runtime, converted(runtime, given, DType::float32), size);
  QuantizedBlock block{};
  block.x = static_cast<const std::int8_t*>(x.codes.data);
  block.x_scales = static_cast<const float*>(x.scales.data);
  block.x_sums = static_cast<const std::int32_t*>(x.sums.data);
  block.groups = static_cast<int>(size);
  block.y = static_cast<float*>(y.data);
  block.y_stride = out;
  // Tasks on the first weight: those of others differ in their addresses alone.
  struct Place {
    std::size_t part;
    std::int64_t strip, row, rows;
  };
  std::vector<Place> places;
  std::int64_t first_row = 0;
  for (std::size_t part = 0; part < like.parts.size(); ++part) {
    const std::int64_t part_rows = like.parts[part].rows;
    for (std::int64_t strip = 0; strip * kStripRows < part_rows; strip += kTaskStrips)
      places.push_back({part, strip, first_row + strip * kStripRows,
                        std::min(kTaskStrips * kStripRows, part_rows - strip * kStripRows)});
    first_row += part_rows;
  }
  runtime.issue([kernel = runtime.kernels().quantized[static_cast<int>(like.codes)], &weights, groups, block,
                 places = std::move(places), size, bytes = group_bytes(like.codes)](Worker& worker) {
    const auto each = static_cast<std::int64_t>(places.size());
    const auto group_of = [&](std::int64_t task) {
      return static_cast<std::size_t>(groups->active[static_cast<std::size_t>(task / each)]);
    };
    const auto part_of = [&](std::int64_t task) -> const QuantizedPart& {
      return weights[group_of(task)].parts[places[static_cast<std::size_t>(task % each)].part];
    };
    const auto codes = [&](std::int64_t task) {
      return static_cast<const std::uint8_t*>(part_of(task).codes.data) +
             places[static_cast<std::size_t>(task % each)].strip * size * bytes;
    };
    const std::int64_t tasks = each * static_cast<std::int64_t>(groups->active.size());
    worker.take_ahead(tasks, [&](std::int64_t task, std::int64_t following) {
      const std::size_t group = group_of(task);
      const std::int64_t first = groups->first[group];
      const Place& place = places[static_cast<std::size_t>(task % each)];
      QuantizedBlock one = block;
      one.x += first * size * kGroup;
      one.x_scales += first * size;
      one.x_sums += first * size;
      one.m = groups->first[group + 1] - static_cast<int>(first);
      one.codes = codes(task);
      one.scales = static_cast<const std::uint16_t*>(part_of(task).scales.data) + place.strip * size * kStripRows;
      one.n = static_cast<int>(place.rows);
      one.y += first * one.y_stride + place.row;
      one.next = following < 0 ? nullptr : codes(following);
      kernel(one);
    });
  });
  return y;
}

}  // namespace vllmlite::cpu
