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
  Codes kind;
  QuantizedStrips w;
  std::int64_t row, rows;  // of the whole weight
};

constexpr QuantizedX from_row(const QuantizedX& x, std::int64_t row, std::int64_t groups) {
  return {x.codes + row * groups * kGroup, x.scales + row * groups, x.sums + row * groups, x.first + row * groups,
          x.totals + row * groups};
}

// A quantised x and its memory, which is another op's as soon as nobody holds it.
struct HeldX {
  QuantizedX x;
  std::vector<Tensor> memory;
};

HeldX quantize_x(Runtime& runtime, const Tensor& x, std::int64_t groups) {
  const std::int64_t rows = x.shape[0], size = x.shape[1];
  HeldX found;
  const auto make = [&](std::int64_t each, DType dtype) {
    return found.memory.emplace_back(runtime.make({rows, groups * each}, dtype)).data;
  };
  QuantizedRow row{};
  row.x = static_cast<const float*>(x.data);
  row.size = static_cast<int>(size);
  row.to = {static_cast<std::int8_t*>(make(kGroup, DType::int8)), static_cast<float*>(make(1, DType::float32)),
            static_cast<std::int32_t*>(make(1, DType::int32)), static_cast<std::int32_t*>(make(1, DType::int32)),
            static_cast<float*>(make(1, DType::float32))};
  runtime.keep(x);
  runtime.issue([&kernels = runtime.kernels(), row, rows, size, groups](Worker& worker) {
    for (std::int64_t index; (index = worker.take()) < rows;) {
      QuantizedRow one = row;
      one.x += index * size;
      one.to = from_row(row.to, index, groups);
      kernels.quantize_x(one);
    }
  });
  found.x = row.to;
  return found;
}

void check(const Tensor& tensor, DType dtype, const std::vector<std::int64_t>& shape, const char* what) {
  if (tensor.dtype != dtype || tensor.shape != shape)
    throw std::invalid_argument(std::string(what) + " must be " + std::string(name(dtype)) + describe(shape) +
                                ", not " + describe(tensor));
}

struct Shapes {
  std::vector<std::int64_t> codes, scales, factors;
  DType dtype;  // of scales
};

Shapes shapes_of(Codes kind, std::int64_t rows, std::int64_t in) {
  const Layout layout = layout_of(kind);
  const std::int64_t strips = divided_up(rows, kStripRows), groups = divided_up(in, kGroup);
  Shapes shapes{{strips, groups, layout.group_bytes()}, {strips, layout.units(groups), kStripRows}, {}, DType::float16};
  if (layout.bf16) shapes.dtype = DType::bfloat16;
  if (layout.offsets) shapes.scales.insert(shapes.scales.begin() + 2, 2);
  if (layout.factors) shapes.factors = {strips, groups, layout.group_factors() / kStripRows, kStripRows};
  return shapes;
}

}  // namespace

std::int64_t QuantizedWeight::out() const {
  std::int64_t rows = 0;
  for (const QuantizedPart& part : parts) rows += part.rows;
  return rows;
}

QuantizedStrips QuantizedPart::from(std::int64_t strip) const {
  const Layout layout = layout_of(kind);
  return {
      static_cast<const std::uint8_t*>(codes.data) + strip * groups() * layout.group_bytes(),
      static_cast<const std::uint16_t*>(scales.data) + strip * layout.units(groups()) * layout.unit_floats(),
      factors ? static_cast<const std::int8_t*>(factors->data) + strip * groups() * layout.group_factors() : nullptr};
}

QuantizedPart allocate_strips(Codes kind, std::int64_t rows, std::int64_t in) {
  const Shapes shapes = shapes_of(kind, rows, in);
  QuantizedPart part{kind, allocate(shapes.codes, DType::uint8), allocate(shapes.scales, shapes.dtype), {}, rows};
  if (!shapes.factors.empty()) part.factors = allocate(shapes.factors, DType::int8);
  return part;
}

QuantizedPart quantize(Runtime& runtime, const Tensor& w, Codes kind) {
  if (w.shape.size() != 2 || w.size() == 0)
    throw std::invalid_argument("a weight must be [out, in], not " + describe(w));
  if (static_cast<int>(kind) >= kMadeCodes) throw std::invalid_argument("floats are quantised to int8 or int4 alone");
  const std::int64_t rows = w.shape[0], size = w.shape[1];
  const std::int64_t strips = divided_up(rows, kStripRows), groups = divided_up(size, kGroup);
  QuantizedPart part = allocate_strips(kind, rows, size);
  QuantizedStrip strip{};
  strip.w = w.data;
  strip.type = float_of(w.dtype);
  strip.stride = size;
  strip.size = static_cast<int>(size);
  strip.codes = static_cast<std::uint8_t*>(part.codes.data);
  strip.scales = static_cast<std::uint16_t*>(part.scales.data);
  std::atomic<bool> finite{true};
  runtime.issue([kernel = runtime.kernels().quantize_strip[static_cast<int>(kind)], strip, rows, strips, groups,
                 row_bytes = size * static_cast<std::int64_t>(item_size(w.dtype)),
                 bytes = layout_of(kind).group_bytes(), &finite](Worker& worker) {
    for (std::int64_t index; (index = worker.take()) < strips;) {
      QuantizedStrip one = strip;
      one.w = static_cast<const std::byte*>(strip.w) + index * kStripRows * row_bytes;
      one.rows = static_cast<int>(std::min<std::int64_t>(kStripRows, rows - index * kStripRows));
      one.codes += index * groups * bytes;
      one.scales += index * groups * kStripRows;
      if (!kernel(one)) finite = false;
    }
  });
  runtime.flush();
  if (!finite) throw std::invalid_argument("values that are not finite cannot be quantised");
  return part;
}

QuantizedWeight make_quantized(std::vector<QuantizedPart> parts, std::int64_t in, std::optional<Tensor> bias) {
  if (parts.empty()) throw std::invalid_argument("a weight needs at least one part");
  QuantizedWeight weight{std::move(parts), in, std::move(bias)};
  for (const QuantizedPart& part : weight.parts) {
    if (part.rows < 1 || in < 1) throw std::invalid_argument("a weight must have rows and columns");
    const Shapes shapes = shapes_of(part.kind, part.rows, in);
    check(part.codes, DType::uint8, shapes.codes, "codes");
    check(part.scales, shapes.dtype, shapes.scales, "scales");
    if (part.factors.has_value() != !shapes.factors.empty())
      throw std::invalid_argument("factors must be given for the kinds that have them, and for no other");
    if (part.factors) check(*part.factors, DType::int8, shapes.factors, "factors");
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
  QuantizedBlock block{};
  const HeldX x = quantize_x(runtime, converted(runtime, given, DType::float32), groups);
  block.x = x.x;
  block.m = static_cast<int>(rows);
  block.groups = static_cast<int>(groups);
  block.y = static_cast<float*>(y.data);
  block.y_stride = out;
  block.bias = weight.bias ? static_cast<const float*>(weight.bias->data) : nullptr;
  std::vector<Task> tasks;
  std::int64_t first = 0;
  for (const QuantizedPart& part : weight.parts) {
    for (std::int64_t strip = 0; strip * kStripRows < part.rows; strip += kTaskStrips)
      tasks.push_back({part.kind, part.from(strip), first + strip * kStripRows,
                       std::min(kTaskStrips * kStripRows, part.rows - strip * kStripRows)});
    first += part.rows;
    runtime.keep(part.codes);
    runtime.keep(part.scales);
    if (part.factors) runtime.keep(*part.factors);
  }
  if (weight.bias) runtime.keep(*weight.bias);
  runtime.issue([&kernels = runtime.kernels().quantized, block, tasks = std::move(tasks)](Worker& worker) {
    worker.take_ahead(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t index, std::int64_t following) {
      const Task& task = tasks[static_cast<std::size_t>(index)];
      QuantizedBlock one = block;
      one.w = task.w;
      one.n = static_cast<int>(task.rows);
      one.y += task.row;
      if (one.bias != nullptr) one.bias += task.row;
      // Prefetching past the end of a shorter task's codes is harmless.
      one.next = following < 0 ? nullptr : tasks[static_cast<std::size_t>(following)].w.codes;
      kernels[static_cast<int>(task.kind)](one);
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
  QuantizedBlock block{};
  const HeldX x = quantize_x(runtime, converted(runtime, given, DType::float32), size);
  block.x = x.x;
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
  runtime.issue([&kernels = runtime.kernels().quantized, &weights, groups, block, places = std::move(places),
                 size](Worker& worker) {
    const auto each = static_cast<std::int64_t>(places.size());
    const auto group_of = [&](std::int64_t task) {
      return static_cast<std::size_t>(groups->active[static_cast<std::size_t>(task / each)]);
    };
    const auto strips = [&](std::int64_t task) {
      const Place& place = places[static_cast<std::size_t>(task % each)];
      return weights[group_of(task)].parts[place.part].from(place.strip);
    };
    const std::int64_t tasks = each * static_cast<std::int64_t>(groups->active.size());
    worker.take_ahead(tasks, [&](std::int64_t task, std::int64_t following) {
      const std::size_t group = group_of(task);
      const std::int64_t first = groups->first[group];
      const Place& place = places[static_cast<std::size_t>(task % each)];
      QuantizedBlock one = block;
      one.x = from_row(block.x, first, size);
      one.m = groups->first[group + 1] - static_cast<int>(first);
      one.w = strips(task);
      one.n = static_cast<int>(place.rows);
      one.y += first * one.y_stride + place.row;
      one.next = following < 0 ? nullptr : strips(following).codes;
      kernels[static_cast<int>(weights[group].parts[place.part].kind)](one);
    });
  });
  return y;
}

}  // namespace vllmlite::cpu
