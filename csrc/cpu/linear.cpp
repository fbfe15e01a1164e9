// Products with weights of floats and of grouped integers: how they are divided into tasks for the threads.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.hpp"
#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

// Rows of w in a task of a skinny GEMM; a multiple of every tile width. Such tasks are small because each thread
// prefetches its next one. Tasks with more rows of x have kLinearBlockRows, which the second-level cache holds, because
// every task reads x again.
constexpr int kSkinnyTaskRows = 48;

// Some rows of a weight; for a gated product, the rows of the gate and as many rows of the up projection.
struct Task {
  const std::byte* w[2];
  std::ptrdiff_t w_stride;
  GroupedLayout layout;
  std::int64_t row;  // of w[0], in the whole weight
  int rows;
};

// The part that a row of a weight is in, and its place there.
struct PartRow {
  std::size_t part;
  std::int64_t row;
};

PartRow locate(const std::vector<LinearPart>& parts, std::int64_t row) {
  std::size_t part = 0;
  for (; row >= parts[part].rows; ++part) row -= parts[part].rows;
  return {part, row};
}

// Consecutive parts that take the columns of x in the same order; `first` is the first of them.
struct Run {
  std::size_t first, count;
  std::int64_t row, rows;  // in the whole weight
};

// Divides a run into tasks of at most `most` rows. With an `offset`, each task also has the rows `offset` rows further.
std::vector<Task> tasks_of(const std::vector<LinearPart>& parts, const Run& run, std::int64_t most,
                           std::int64_t offset) {
  const std::int64_t end = offset == 0 ? run.row + run.rows : offset;
  std::vector<Task> tasks;
  for (std::int64_t row = run.row; row < end; row += tasks.back().rows) {
    const auto [index, first] = locate(parts, row);
    const LinearPart& part = parts[index];
    Task task{{part.at(first), nullptr}, part.in, part.layout, row, 0};
    task.rows = static_cast<int>(std::min({most, part.rows - first, end - row}));
    if (offset != 0) {
      const auto [other, second] = locate(parts, offset + row);
      task.w[1] = parts[other].at(second);
      task.rows = static_cast<int>(std::min<std::int64_t>(task.rows, parts[other].rows - second));
    }
    tasks.push_back(task);
  }
  return tasks;
}

bool same_order(const LinearPart& a, const LinearPart& b) {
  if (!a.order || !b.order) return !a.order && !b.order;
  return std::memcmp(a.order->data, b.order->data, a.order->bytes()) == 0;
}

// Divides the parts into as few runs as possible; several weights must all have the same runs.
std::vector<Run> runs_of(std::span<const LinearWeight> weights) {
  const std::vector<LinearPart>& parts = weights.front().parts;
  std::vector<Run> runs;
  for (std::size_t part = 0; part < parts.size(); ++part) {
    const bool joined = part > 0 && std::ranges::all_of(weights, [part](const LinearWeight& weight) {
                          return same_order(weight.parts[part - 1], weight.parts[part]);
                        });
    const std::int64_t row = runs.empty() ? 0 : runs.back().row + runs.back().rows;
    if (!joined) runs.push_back({part, 0, row, 0});
    ++runs.back().count;
    runs.back().rows += parts[part].rows;
  }
  return runs;
}

const LinearKernel& kernel_of(const Runtime& runtime, const LinearWeight& weight) {
  const Kernels& kernels = runtime.kernels();
  if (weight.grouped()) return kernels.grouped[runtime.product_input() == DType::bfloat16 ? 1 : 0].linear;
  return kernels.linear[static_cast<std::size_t>(float_of(weight.parts[0].data.dtype))];
}

// Copies a row, taking its columns in the given order.
void permute(const std::int32_t* order, std::int64_t columns, std::size_t item, const std::byte* from, std::byte* to) {
  const auto gather = [&](const auto* source, auto* target) {
    for (std::int64_t i = 0; i < columns; ++i) target[i] = source[order[i]];
  };
  if (item == sizeof(float))
    gather(reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to));
  else
    gather(reinterpret_cast<const std::uint16_t*>(from), reinterpret_cast<std::uint16_t*>(to));
}

const std::int32_t* order_of(const LinearPart& part) {
  return part.order ? static_cast<const std::int32_t*>(part.order->data) : nullptr;
}

// Returns x with its columns in the order that the part takes them.
Tensor permuted(Runtime& runtime, const Tensor& x, const LinearPart& part) {
  if (!part.order) return x;
  const Tensor y = runtime.make(x.shape, x.dtype);
  runtime.keep(x);
  runtime.keep(*part.order);
  runtime.issue([rows = x.shape[0], columns = x.shape[1], order = order_of(part), item = item_size(x.dtype),
                 from = static_cast<const std::byte*>(x.data), to = static_cast<std::byte*>(y.data)](Worker& worker) {
    for (std::int64_t row; (row = worker.take()) < rows;) {
      const auto at = static_cast<std::size_t>(row * columns) * item;
      permute(order, columns, item, from + at, to + at);
    }
  });
  return y;
}

// Returns x packed into panels, or x itself if the kernel reads it in place.
Tensor packed(Runtime& runtime, const LinearKernel& kernel, const Tensor& x) {
  const int m = static_cast<int>(x.shape[0]), k = static_cast<int>(x.shape[1]);
  const std::size_t bytes = kernel.packed_bytes(m, k);
  if (bytes == 0) return x;
  Tensor panels = runtime.make({static_cast<std::int64_t>(bytes)}, DType::uint8);
  runtime.keep(x);
  runtime.issue(
      [pack = kernel.pack, input = LinearInput{x.data, m, k, panels.data}, count = kernel.panels(m)](Worker& worker) {
        for (std::int64_t panel; (panel = worker.take()) < count;) pack(input, static_cast<int>(panel));
      });
  return panels;
}

// Rows of x sorted by group. Groups with enough rows are packed into panels. Their sizes are only known when the phase
// runs, so each group has memory for a whole number of units of kUnit rows.
struct Grouped {
  static constexpr int kUnit = 16;

  const LinearKernel* kernel;
  const std::byte* x;
  std::byte* panels;
  int k;
  std::size_t row_bytes, unit_bytes;

  std::byte* panels_of(const Groups& groups, std::size_t group) const {
    const auto units = static_cast<std::size_t>((groups.first[group] + kUnit - 1) / kUnit) + group;
    return panels + units * unit_bytes;
  }

  const std::byte* rows_of(const Groups& groups, std::size_t group) const {
    return x + static_cast<std::size_t>(groups.first[group]) * row_bytes;
  }

  const std::byte* start(const Groups& groups, std::size_t group, int rows) const {
    return kernel->packed_bytes(rows, k) == 0 ? rows_of(groups, group) : panels_of(groups, group);
  }
};

Grouped packed(Runtime& runtime, const LinearKernel& kernel, const Tensor& x, std::int64_t count,
               const std::shared_ptr<Groups>& groups) {
  const int k = static_cast<int>(x.shape[1]);
  constexpr int kPackedRows = 4 * Grouped::kUnit;  // enough that every kernel packs them
  const std::size_t unit = kernel.packed_bytes(kPackedRows, k) / (kPackedRows / Grouped::kUnit);
  const std::int64_t units = x.shape[0] / Grouped::kUnit + 1 + count;
  const Tensor panels = runtime.make({units * static_cast<std::int64_t>(unit)}, DType::uint8);
  runtime.keep(x);
  const Grouped found{&kernel,
                      static_cast<const std::byte*>(x.data),
                      static_cast<std::byte*>(panels.data),
                      k,
                      static_cast<std::size_t>(k) * item_size(x.dtype),
                      unit};
  runtime.issue([found, groups](Worker& worker) {
    const auto active = static_cast<std::int64_t>(groups->active.size());
    for (std::int64_t index; (index = worker.take()) < active;) {
      const auto group = static_cast<std::size_t>(groups->active[static_cast<std::size_t>(index)]);
      const int rows = groups->first[group + 1] - groups->first[group];
      if (found.kernel->packed_bytes(rows, found.k) == 0) continue;
      const LinearInput input{found.rows_of(*groups, group), rows, found.k, found.panels_of(*groups, group)};
      for (int panel = 0; panel < found.kernel->panels(rows); ++panel) found.kernel->pack(input, panel);
    }
  });
  return found;
}

// Returns x with the columns of each group's rows in the order of a part of that group's weight.
Tensor permuted(Runtime& runtime, const Tensor& x, const std::vector<LinearWeight>& weights, std::size_t part,
                const std::shared_ptr<Groups>& groups) {
  if (std::ranges::none_of(weights,
                           [part](const LinearWeight& weight) { return weight.parts[part].order.has_value(); }))
    return x;
  const Tensor y = runtime.make(x.shape, x.dtype);
  runtime.keep(x);
  runtime.issue([&weights, part, groups, columns = x.shape[1], item = item_size(x.dtype),
                 from = static_cast<const std::byte*>(x.data), to = static_cast<std::byte*>(y.data)](Worker& worker) {
    const std::size_t row_bytes = static_cast<std::size_t>(columns) * item;
    const auto active = static_cast<std::int64_t>(groups->active.size());
    for (std::int64_t index; (index = worker.take()) < active;) {
      const auto group = static_cast<std::size_t>(groups->active[static_cast<std::size_t>(index)]);
      const std::int32_t* const order = order_of(weights[group].parts[part]);
      for (std::int32_t row = groups->first[group]; row < groups->first[group + 1]; ++row) {
        const std::size_t at = static_cast<std::size_t>(row) * row_bytes;
        if (order == nullptr)
          std::memcpy(to + at, from + at, row_bytes);
        else
          permute(order, columns, item, from + at, to + at);
      }
    }
  });
  return y;
}

// Issues the product of x with the parts of a run, which writes their columns of y; with a gate, the gated activation
// of the product.
void multiply(Runtime& runtime, const Tensor& given, const LinearWeight& weight, const Run& run,
              std::optional<Activation> gate, const Tensor& y) {
  const Kernels& kernels = runtime.kernels();
  const LinearKernel& kernel = kernel_of(runtime, weight);
  const std::int64_t rows = given.shape[0], width = y.shape[1];
  const Tensor x = packed(runtime, kernel, permuted(runtime, given, weight.parts[run.first]));
  const int most = rows > kSkinnyRows ? kLinearBlockRows / (gate ? 2 : 1) : kSkinnyTaskRows;
  LinearBlock all{};
  all.x = x.data;
  all.m = static_cast<int>(rows);
  all.k = static_cast<int>(weight.in());
  all.fetch = !reads_ahead() || kernel.panels(all.m) > 1;
  const std::size_t scratch = kernel.scratch_bytes(all.m, all.k);
  const std::size_t sums = gate ? static_cast<std::size_t>(rows) * 2 * static_cast<std::size_t>(most) : 0;
  runtime.reserve_scratch(scratch + sums * sizeof(float));
  for (const LinearPart& part : weight.parts) runtime.keep(part.data);
  if (weight.bias) runtime.keep(*weight.bias);
  runtime.keep(x);
  runtime.issue([&kernels, run_kernel = kernel.run, all, tasks = tasks_of(weight.parts, run, most, gate ? width : 0),
                 gate, width, scratch, bias = weight.bias ? static_cast<const float*>(weight.bias->data) : nullptr,
                 out = static_cast<std::byte*>(y.data), type = float_of(y.dtype),
                 item = item_size(y.dtype)](Worker& worker) {
    worker.take_ahead(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t index, std::int64_t following) {
      const Task& task = tasks[static_cast<std::size_t>(index)];
      LinearBlock block = all;
      block.w_stride = task.w_stride;
      block.layout = task.layout;
      block.n = task.rows;
      block.scratch = worker.scratch();
      for (int i = 0; i < 2; ++i) {
        block.w[i] = task.w[i];
        block.next[i] = following < 0 ? nullptr : tasks[static_cast<std::size_t>(following)].w[i];
        block.bias[i] = bias == nullptr ? nullptr : bias + task.row + i * width;
      }
      if (gate) {
        block.y = reinterpret_cast<float*>(worker.scratch() + scratch);
        block.y_stride = 2 * task.rows;
        run_kernel(block);
        for (std::int64_t row = 0; row < block.m; ++row) {
          const float* const gates = block.y + row * block.y_stride;
          kernels.activate(*gate, gates, gates + task.rows,
                           out + static_cast<std::size_t>(row * width + task.row) * item, type, task.rows);
        }
      } else {
        block.y = reinterpret_cast<float*>(out) + task.row;
        block.y_stride = width;
        run_kernel(block);
      }
    });
  });
}

Tensor product(Runtime& runtime, const Tensor& given, const LinearWeight& weight, std::optional<Activation> gate) {
  if (given.shape.size() != 2 || given.shape[1] != weight.in())
    throw std::invalid_argument("linear: x must be [rows, " + std::to_string(weight.in()) + "], not " +
                                describe(given));
  if (gate && weight.out() % 2 != 0) throw std::invalid_argument("gated_linear: the weight has an odd number of rows");
  const std::int64_t rows = given.shape[0], width = gate ? weight.out() / 2 : weight.out();
  const Tensor y = runtime.make({rows, width}, gate ? runtime.product_input() : DType::float32);
  if (rows == 0) return y;
  const Tensor x = converted(runtime, given, dtype_of(kernel_of(runtime, weight).input));
  for (const Run& run : runs_of({&weight, 1})) multiply(runtime, x, weight, run, gate, y);
  return y;
}

// Whether the rows of the gate and of the up projection have one layout, so that one task can compute both.
bool uniform(const LinearWeight& weight) {
  const LinearPart& first = weight.parts.front();
  return std::ranges::all_of(weight.parts, [&](const LinearPart& part) {
    return part.layout == first.layout && same_order(part, first) &&
           (!part.grouped() || part.rows / 2 % kGroupedRows == 0);
  });
}

}  // namespace

Tensor linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight) {
  return product(runtime, x, weight, std::nullopt);
}

Tensor gated_linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight, Activation f) {
  // In a skinny GEMM the results are small, and a single stream of w is read fastest.
  if (x.shape.empty() || x.shape[0] <= kSkinnyRows || !uniform(weight))
    return gated_activation(runtime, linear(runtime, x, weight), f);
  return product(runtime, x, weight, f);
}

Tensor grouped_linear(Runtime& runtime, const Tensor& given, const std::vector<LinearWeight>& weights,
                      const std::shared_ptr<Groups>& groups) {
  const LinearWeight& like = weights.front();
  const LinearKernel& kernel = kernel_of(runtime, like);
  const Tensor x = converted(runtime, given, dtype_of(kernel.input));
  const std::int64_t rows = x.shape[0], out = like.out();
  const Tensor y = runtime.make({rows, out}, DType::float32);
  const auto each = static_cast<std::int64_t>(weights.size());
  LinearBlock all{};
  all.k = static_cast<int>(like.in());
  all.y_stride = out;
  runtime.reserve_scratch(kernel.scratch_bytes(static_cast<int>(rows), all.k));
  const std::int64_t most = rows / each <= kSkinnyRows ? kSkinnyTaskRows : kLinearBlockRows;
  for (const Run& run : runs_of(weights)) {
    const Grouped grouped = packed(runtime, kernel, permuted(runtime, x, weights, run.first, groups), each, groups);
    // The tasks of the first weight; those of the others differ only in their parts.
    runtime.issue([run_kernel = kernel.run, panels = kernel.panels, &weights, groups, grouped, all,
                   own = tasks_of(like.parts, run, most, 0), alone = reads_ahead(),
                   out_rows = static_cast<float*>(y.data)](Worker& worker) {
      const auto each_own = static_cast<std::int64_t>(own.size());
      const std::int64_t count = each_own * static_cast<std::int64_t>(groups->active.size());
      const auto group_of = [&](std::int64_t task) {
        return static_cast<std::size_t>(groups->active[static_cast<std::size_t>(task / each_own)]);
      };
      const auto start = [&](std::int64_t task) -> std::pair<const LinearPart&, std::int64_t> {
        const std::vector<LinearPart>& parts = weights[group_of(task)].parts;
        const PartRow at = locate(parts, own[static_cast<std::size_t>(task % each_own)].row);
        return {parts[at.part], at.row};
      };
      worker.take_ahead(count, [&](std::int64_t index, std::int64_t following) {
        const std::size_t group = group_of(index);
        const Task& task = own[static_cast<std::size_t>(index % each_own)];
        const auto [part, row] = start(index);
        LinearBlock block = all;
        block.m = groups->first[group + 1] - groups->first[group];
        block.x = grouped.start(*groups, group, block.m);
        block.w[0] = part.at(row);
        block.w_stride = part.in;
        block.layout = part.layout;
        block.n = task.rows;
        if (weights[group].bias) block.bias[0] = static_cast<const float*>(weights[group].bias->data) + task.row;
        block.y = out_rows + groups->first[group] * block.y_stride + task.row;
        if (following >= 0) {
          const auto [next, next_row] = start(following);
          block.next[0] = next.at(next_row);
        }
        block.fetch = !alone || panels(block.m) > 1;
        block.scratch = worker.scratch();
        run_kernel(block);
      });
    });
  }
  return y;
}

}  // namespace vllmlite::cpu
