// Quantised weights in tiles: made from floats, checked, and multiplied.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

// Tiles of w in a task: few enough to stay in the second-level cache while all rows of x are multiplied.
constexpr std::int64_t kTaskTiles = 6;

constexpr std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Task {
  TileScheme scheme;
  QuantizedX x;
  QuantizedTiles w;
  std::int64_t row, rows;  // in the whole weight
};

constexpr QuantizedX from_row(const QuantizedX& x, std::int64_t row, std::int64_t groups) {
  return {x.values + row * groups * kGroup, x.scales + row * groups,      x.sums + row * groups,
          x.half_sums + row * groups,       x.scaled_sums + row * groups, x.zeros + row};
}

// A quantised x and its memory, which later ops may reuse as soon as this is destroyed.
struct HeldX {
  QuantizedX x;
  std::vector<Tensor> memory;
};

// Quantises the rows of x, each as input(row) says.
template <typename InputOf>
HeldX quantize_x(Runtime& runtime, const Tensor& x, std::int64_t groups, InputOf input) {
  const std::int64_t rows = x.shape[0], size = x.shape[1];
  HeldX found;
  const auto make = [&](std::int64_t each, DType dtype) {
    return found.memory.emplace_back(runtime.make({rows, each}, dtype)).data;
  };
  RowToQuantize row{};
  row.x = static_cast<const float*>(x.data);
  row.size = static_cast<int>(size);
  row.to = {static_cast<std::int8_t*>(make(groups * kGroup, DType::int8)),
            static_cast<float*>(make(groups, DType::float32)),
            static_cast<std::int32_t*>(make(groups, DType::int32)),
            static_cast<std::int32_t*>(make(groups, DType::int32)),
            static_cast<float*>(make(groups, DType::float32)),
            static_cast<std::int32_t*>(make(1, DType::int32))};
  runtime.keep(x);
  runtime.reserve_scratch(static_cast<std::size_t>(size) * sizeof(float));
  runtime.issue([&kernels = runtime.kernels(), row, rows, size, groups, input](Worker& worker) {
    for (std::int64_t index; (index = worker.take()) < rows;) {
      RowToQuantize one = row;
      one.x += index * size;
      one.to = from_row(row.to, index, groups);
      one.input = input(index);
      if (one.input.order != nullptr) {
        auto* const permuted = reinterpret_cast<float*>(worker.scratch());
        for (std::int64_t k = 0; k < size; ++k) permuted[k] = one.x[one.input.order[k]];
        one.x = permuted;
      }
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

bool same_data(const std::optional<Tensor>& a, const std::optional<Tensor>& b) {
  return a && b && a->bytes() == b->bytes() && std::memcmp(a->data, b->data, a->bytes()) == 0;
}

struct Shapes {
  std::vector<std::int64_t> qweight, scales, sub_scales;
  DType dtype;  // of scales
};

Shapes shapes_of(TileScheme scheme, std::int64_t rows, std::int64_t in) {
  const TileLayout layout = layout_of(scheme);
  const std::int64_t tiles = divided_up(rows, kTileRows), groups = divided_up(in, kGroup);
  Shapes shapes{{tiles, groups, layout.group_bytes()}, {tiles, layout.units(groups), kTileRows}, {}, DType::float16};
  if (layout.row_scales) {
    shapes.dtype = DType::uint8;
    shapes.scales = {tiles, static_cast<std::int64_t>(sizeof(RowScales))};
  }
  if (layout.bf16) shapes.dtype = DType::bfloat16;
  if (layout.offsets) shapes.scales = {tiles, layout.units(groups), 2, kTileRows};
  if (layout.sub_scales) shapes.sub_scales = {tiles, groups, layout.group_sub_scales() / kTileRows, kTileRows};
  return shapes;
}

}  // namespace

std::int64_t QuantizedWeight::out() const {
  std::int64_t rows = 0;
  for (const QuantizedPart& part : parts) rows += part.rows;
  return rows;
}

QuantizedTiles QuantizedPart::from(std::int64_t tile) const {
  const TileLayout layout = layout_of(scheme);
  QuantizedTiles tiles{};
  tiles.qweight = static_cast<const std::uint8_t*>(qweight.data) + tile * groups() * layout.group_bytes();
  if (layout.grouped) {
    const std::int64_t first = tile * scales.shape[1] * kTileRows;
    tiles.scales =
        static_cast<const std::byte*>(scales.data) + first * static_cast<std::int64_t>(item_size(scales.dtype));
    tiles.zeros = static_cast<const std::uint8_t*>(zeros->data) + first;
    tiles.scale_type = float_of(scales.dtype);
    tiles.groups_per_scale = groups_per_scale;
  } else if (layout.row_scales)
    tiles.row_scales = static_cast<const RowScales*>(scales.data) + tile;
  else
    tiles.scales =
        static_cast<const std::uint16_t*>(scales.data) + tile * layout.units(groups()) * layout.unit_floats();
  if (sub_scales)
    tiles.sub_scales = static_cast<const std::int8_t*>(sub_scales->data) + tile * groups() * layout.group_sub_scales();
  return tiles;
}

QuantizedPart allocate_tiles(TileScheme scheme, std::int64_t rows, std::int64_t in) {
  const Shapes shapes = shapes_of(scheme, rows, in);
  QuantizedPart part{scheme, allocate(shapes.qweight, DType::uint8), allocate(shapes.scales, shapes.dtype), {}, rows};
  if (!shapes.sub_scales.empty()) part.sub_scales = allocate(shapes.sub_scales, DType::int8);
  return part;
}

QuantizedPart quantize(Runtime& runtime, const Tensor& w, TileScheme scheme) {
  if (w.shape.size() != 2 || w.size() == 0)
    throw std::invalid_argument("a weight must be [out, in], not " + describe(w));
  if (static_cast<int>(scheme) >= kFloatSchemes)
    throw std::invalid_argument("floats can be quantised to int8 and int4 only");
  const std::int64_t rows = w.shape[0], size = w.shape[1];
  const std::int64_t tiles = divided_up(rows, kTileRows), groups = divided_up(size, kGroup);
  QuantizedPart part = allocate_tiles(scheme, rows, size);
  TileToQuantize tile{};
  tile.w = w.data;
  tile.type = float_of(w.dtype);
  tile.stride = size;
  tile.size = static_cast<int>(size);
  tile.qweight = static_cast<std::uint8_t*>(part.qweight.data);
  tile.scales = static_cast<std::uint16_t*>(part.scales.data);
  std::atomic<bool> finite{true};
  runtime.issue([kernel = runtime.kernels().quantize_tile[static_cast<int>(scheme)], tile, rows, tiles, groups,
                 row_bytes = size * static_cast<std::int64_t>(item_size(w.dtype)),
                 bytes = layout_of(scheme).group_bytes(), &finite](Worker& worker) {
    for (std::int64_t index; (index = worker.take()) < tiles;) {
      TileToQuantize one = tile;
      one.w = static_cast<const std::byte*>(tile.w) + index * kTileRows * row_bytes;
      one.rows = static_cast<int>(std::min<std::int64_t>(kTileRows, rows - index * kTileRows));
      one.qweight += index * groups * bytes;
      one.scales += index * groups * kTileRows;
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
  for (std::size_t index = 0; index < weight.parts.size(); ++index) {
    QuantizedPart& part = weight.parts[index];
    if (index > 0 && part.order && same_data(part.order, weight.parts[index - 1].order))
      part.order = weight.parts[index - 1].order;  // so that x is quantised once for both
    if (part.order) part.input.order = static_cast<const std::int32_t*>(part.order->data);
    if (part.rows < 1 || in < 1) throw std::invalid_argument("a weight must have rows and columns");
    const Shapes shapes = shapes_of(part.scheme, part.rows, in);
    check(part.qweight, DType::uint8, shapes.qweight, "qweight");
    if (layout_of(part.scheme).grouped) continue;  // grouped_tiles has checked it
    check(part.scales, shapes.dtype, shapes.scales, "scales");
    if (part.sub_scales.has_value() != !shapes.sub_scales.empty())
      throw std::invalid_argument("sub_scales must be given for the schemes that have them, and for no others");
    if (part.sub_scales) check(*part.sub_scales, DType::int8, shapes.sub_scales, "sub_scales");
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
  const Tensor floats = converted(runtime, given, DType::float32);
  std::vector<HeldX> inputs;  // of runs of parts that quantise x alike
  block.m = static_cast<int>(rows);
  block.groups = static_cast<int>(groups);
  block.y = static_cast<float*>(y.data);
  block.y_stride = out;
  block.bias = weight.bias ? static_cast<const float*>(weight.bias->data) : nullptr;
  std::vector<Task> tasks;
  std::int64_t first = 0;
  for (std::size_t index = 0; index < weight.parts.size(); ++index) {
    const QuantizedPart& part = weight.parts[index];
    if (index == 0 || weight.parts[index - 1].input != part.input)
      inputs.push_back(quantize_x(runtime, floats, groups, [input = part.input](std::int64_t) { return input; }));
    for (std::int64_t tile = 0; tile * kTileRows < part.rows; tile += kTaskTiles)
      tasks.push_back({part.scheme, inputs.back().x, part.from(tile), first + tile * kTileRows,
                       std::min(kTaskTiles * kTileRows, part.rows - tile * kTileRows)});
    first += part.rows;
    runtime.keep(part.qweight);
    runtime.keep(part.scales);
    for (const std::optional<Tensor>* held : {&part.sub_scales, &part.order, &part.zeros})
      if (*held) runtime.keep(**held);
  }
  if (weight.bias) runtime.keep(*weight.bias);
  runtime.issue([&kernels = runtime.kernels().quantized, block, tasks = std::move(tasks)](Worker& worker) {
    worker.take_ahead(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t index, std::int64_t following) {
      const Task& task = tasks[static_cast<std::size_t>(index)];
      QuantizedBlock one = block;
      one.x = task.x;
      one.w = task.w;
      one.n = static_cast<int>(task.rows);
      one.y += task.row;
      if (one.bias != nullptr) one.bias += task.row;
      // Prefetching past the end of the qweight of a shorter task is harmless.
      one.next = following < 0 ? nullptr : tasks[static_cast<std::size_t>(following)].w.qweight;
      kernels[static_cast<int>(task.scheme)](one);
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
  const Tensor x = converted(runtime, given, DType::float32);
  // The quantised x of each part, which is the same for consecutive parts that quantise it alike in all weights.
  std::vector<HeldX> inputs;
  for (std::size_t part = 0; part < like.parts.size(); ++part) {
    const bool shared = part > 0 && std::ranges::all_of(weights, [part](const QuantizedWeight& weight) {
                          return weight.parts[part - 1].input == weight.parts[part].input;
                        });
    inputs.push_back(shared ? inputs.back() : quantize_x(runtime, x, size, [&weights, groups, part](std::int64_t row) {
      const auto after = std::upper_bound(groups->first.begin(), groups->first.end(), row);
      return weights[static_cast<std::size_t>(after - groups->first.begin()) - 1].parts[part].input;
    }));
  }
  block.groups = static_cast<int>(size);
  block.y = static_cast<float*>(y.data);
  block.y_stride = out;
  // The tasks of the first weight; those of the others differ only in their addresses.
  struct Place {
    std::size_t part;
    QuantizedX x;
    std::int64_t tile, row, rows;
  };
  std::vector<Place> places;
  std::int64_t first_row = 0;
  for (std::size_t part = 0; part < like.parts.size(); ++part) {
    const std::int64_t part_rows = like.parts[part].rows;
    for (std::int64_t tile = 0; tile * kTileRows < part_rows; tile += kTaskTiles)
      places.push_back({part, inputs[part].x, tile, first_row + tile * kTileRows,
                        std::min(kTaskTiles * kTileRows, part_rows - tile * kTileRows)});
    first_row += part_rows;
  }
  runtime.issue([&kernels = runtime.kernels().quantized, &weights, groups, block, places = std::move(places),
                 size](Worker& worker) {
    const auto each = static_cast<std::int64_t>(places.size());
    const auto group_of = [&](std::int64_t task) {
      return static_cast<std::size_t>(groups->active[static_cast<std::size_t>(task / each)]);
    };
    const auto tiles = [&](std::int64_t task) {
      const Place& place = places[static_cast<std::size_t>(task % each)];
      return weights[group_of(task)].parts[place.part].from(place.tile);
    };
    const std::int64_t tasks = each * static_cast<std::int64_t>(groups->active.size());
    worker.take_ahead(tasks, [&](std::int64_t task, std::int64_t following) {
      const std::size_t group = group_of(task);
      const std::int64_t first = groups->first[group];
      const Place& place = places[static_cast<std::size_t>(task % each)];
      QuantizedBlock one = block;
      one.x = from_row(place.x, first, size);
      one.m = groups->first[group + 1] - static_cast<int>(first);
      one.w = tiles(task);
      one.n = static_cast<int>(place.rows);
      if (weights[group].bias) one.bias = static_cast<const float*>(weights[group].bias->data) + place.row;
      one.y += first * one.y_stride + place.row;
      one.next = following < 0 ? nullptr : tiles(following).qweight;
      kernels[static_cast<int>(weights[group].parts[place.part].scheme)](one);
    });
  });
  return y;
}

}  // namespace vllmlite::cpu
