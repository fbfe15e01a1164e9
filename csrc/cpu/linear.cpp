// Products with packed weights: how the work is cut, and who does what.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.hpp"
#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

// Rows of w in a task; multiples of every tile width. Few rows of x want small tasks, because each thread prefetches
// one ahead; many want as many as the second-level cache holds, because each rereads x.
constexpr int kFewRows = 48;

// Some rows of w; of two blocks of as many where a gate's sums and their factors' are wanted together.
struct Task {
  const std::byte* w[2];
  std::int64_t row;  // of the first block, in the whole
  int rows;
};

// Where the rows of a weight are.
struct Rows {
  const LinearWeight& weight;
  std::size_t row_bytes = static_cast<std::size_t>(weight.in()) * item_size(weight.parts[0].dtype);

  // The address of a row, and how many lie behind it in its part with it.
  std::pair<const std::byte*, std::int64_t> at(std::int64_t row) const {
    auto part = weight.parts.begin();
    for (; row >= part->shape[0]; ++part) row -= part->shape[0];
    return {static_cast<const std::byte*>(part->data) + static_cast<std::size_t>(row) * row_bytes,
            part->shape[0] - row};
  }
};

// Tasks of at most `most` rows, or of two blocks of them, `offset` rows apart.
std::vector<Task> tasks_of(const LinearWeight& weight, std::int64_t most, std::int64_t offset) {
  const Rows rows{weight};
  const std::int64_t end = offset == 0 ? weight.out() : offset;
  std::vector<Task> tasks;
  for (std::int64_t row = 0; row < end; row += tasks.back().rows) {
    const auto [first, left] = rows.at(row);
    Task task{{first, nullptr}, row, static_cast<int>(std::min({most, left, end - row}))};
    if (offset != 0) {
      const auto [second, there] = rows.at(offset + row);
      task.w[1] = second;
      task.rows = static_cast<int>(std::min<std::int64_t>(task.rows, there));
    }
    tasks.push_back(task);
  }
  return tasks;
}

// x in the order that the kernel takes it.
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

// Rows of x in groups, each packed by itself where there are enough of them: how many is not known before they are.
struct Grouped {
  static constexpr int kUnit = 16;  // rows, in whole numbers of which there is room for each group

  const LinearKernel* kernel;
  const std::byte* x;
  std::byte* panels;
  int k;
  std::size_t row_bytes, unit_bytes;

  std::byte* room(const Groups& groups, std::size_t group) const {
    const auto units = static_cast<std::size_t>((groups.first[group] + kUnit - 1) / kUnit) + group;
    return panels + units * unit_bytes;
  }

  const std::byte* plain(const Groups& groups, std::size_t group) const {
    return x + static_cast<std::size_t>(groups.first[group]) * row_bytes;
  }

  const std::byte* start(const Groups& groups, std::size_t group, int rows) const {
    return kernel->packed_bytes(rows, k) == 0 ? plain(groups, group) : room(groups, group);
  }
};

Grouped packed(Runtime& runtime, const LinearKernel& kernel, const Tensor& x, std::int64_t count,
               const std::shared_ptr<Groups>& groups) {
  const int k = static_cast<int>(x.shape[1]);
  // Of rows enough to be packed.
  constexpr int kSome = 4 * Grouped::kUnit;
  const std::size_t unit = kernel.packed_bytes(kSome, k) / (kSome / Grouped::kUnit);
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
      const LinearInput input{found.plain(*groups, group), rows, found.k, found.room(*groups, group)};
      for (int panel = 0; panel < found.kernel->panels(rows); ++panel) found.kernel->pack(input, panel);
    }
  });
  return found;
}

// The product, or where a gate is given the gated activation of it.
Tensor product(Runtime& runtime, const Tensor& given, const LinearWeight& weight, std::optional<Activation> gate) {
  if (given.shape.size() != 2 || given.shape[1] != weight.in())
    throw std::invalid_argument("linear: x must be [rows, " + std::to_string(weight.in()) + "], not " +
                                describe(given));
  if (gate && weight.out() % 2 != 0) throw std::invalid_argument("gated_linear: the weight has an odd number of rows");
  const Kernels& kernels = runtime.kernels();
  const LinearKernel& kernel = kernels.linear[static_cast<std::size_t>(float_of(weight.parts[0].dtype))];
  const std::int64_t rows = given.shape[0], width = gate ? weight.out() / 2 : weight.out();
  const Tensor y = runtime.make({rows, width}, gate ? runtime.product_input() : DType::float32);
  if (rows == 0) return y;
  const Tensor x = packed(runtime, kernel, converted(runtime, given, dtype_of(kernel.input)));

  const bool many = rows > kLinearFew;
  const int most = many ? kLinearRows / (gate ? 2 : 1) : kFewRows;
  LinearBlock all{};
  all.x = x.data;
  all.m = static_cast<int>(rows);
  all.w_stride = weight.in();
  all.k = static_cast<int>(weight.in());
  all.fetch = !reads_ahead() || kernel.panels(all.m) > 1;
  const std::size_t room = many ? kLinearRows * kLinearChunk * item_size(weight.parts[0].dtype) : 0;
  const std::size_t sums = gate ? static_cast<std::size_t>(rows) * 2 * static_cast<std::size_t>(most) : 0;
  runtime.reserve_scratch(room + sums * sizeof(float));
  for (const Tensor& part : weight.parts) runtime.keep(part);
  if (weight.bias) runtime.keep(*weight.bias);
  runtime.keep(x);
  runtime.issue([&kernels, run = kernel.run, all, tasks = tasks_of(weight, most, gate ? width : 0), gate, width, room,
                 bias = weight.bias ? static_cast<const float*>(weight.bias->data) : nullptr,
                 out = static_cast<std::byte*>(y.data), type = float_of(y.dtype),
                 item = item_size(y.dtype)](Worker& worker) {
    worker.take_ahead(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t index, std::int64_t following) {
      const Task& task = tasks[static_cast<std::size_t>(index)];
      LinearBlock block = all;
      block.n = task.rows;
      block.scratch = worker.scratch();
      for (int i = 0; i < 2; ++i) {
        block.w[i] = task.w[i];
        block.next[i] = following < 0 ? nullptr : tasks[static_cast<std::size_t>(following)].w[i];
        block.bias[i] = bias == nullptr ? nullptr : bias + task.row + i * width;
      }
      if (gate) {
        block.y = reinterpret_cast<float*>(worker.scratch() + room);
        block.y_stride = 2 * task.rows;
        run(block);
        for (std::int64_t row = 0; row < block.m; ++row) {
          const float* const gates = block.y + row * block.y_stride;
          kernels.activate(*gate, gates, gates + task.rows,
                           out + static_cast<std::size_t>(row * width + task.row) * item, type, task.rows);
        }
      } else {
        block.y = reinterpret_cast<float*>(out) + task.row;
        block.y_stride = width;
        run(block);
      }
    });
  });
  return y;
}

}  // namespace

std::int64_t LinearWeight::out() const {
  std::int64_t rows = 0;
  for (const Tensor& part : parts) rows += part.shape[0];
  return rows;
}

LinearWeight make_weight(std::vector<Tensor> parts, std::optional<Tensor> bias) {
  if (parts.empty()) throw std::invalid_argument("a weight needs at least one part");
  for (const Tensor& part : parts) {
    if (part.shape.size() != 2) throw std::invalid_argument("a weight must be [out, in], not " + describe(part));
    if (part.dtype != parts[0].dtype || part.shape[1] != parts[0].shape[1])
      throw std::invalid_argument("parts of a weight differ: " + describe(parts[0]) + " and " + describe(part));
    float_of(part.dtype);
  }
  LinearWeight weight{std::move(parts), std::move(bias)};
  if (weight.bias && (weight.bias->dtype != DType::float32 || weight.bias->size() != weight.out()))
    throw std::invalid_argument("a bias of " + std::to_string(weight.out()) + " float32 is needed, not " +
                                describe(*weight.bias));
  return weight;
}

Tensor linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight) {
  return product(runtime, x, weight, std::nullopt);
}

Tensor gated_linear(Runtime& runtime, const Tensor& x, const LinearWeight& weight, Activation f) {
  // The sums of few rows are small, and single blocks of w are what is fetched fastest.
  if (x.shape.empty() || x.shape[0] <= kLinearFew) return gated_activation(runtime, linear(runtime, x, weight), f);
  return product(runtime, x, weight, f);
}

Tensor grouped_linear(Runtime& runtime, const Tensor& given, const std::vector<LinearWeight>& weights,
                      const std::shared_ptr<Groups>& groups) {
  const LinearWeight& like = weights.front();
  const LinearKernel& kernel = runtime.kernels().linear[static_cast<std::size_t>(float_of(like.parts[0].dtype))];
  const Tensor x = converted(runtime, given, dtype_of(kernel.input));
  const std::int64_t rows = x.shape[0], out = like.out();
  const Tensor y = runtime.make({rows, out}, DType::float32);
  const auto each = static_cast<std::int64_t>(weights.size());
  const Grouped grouped = packed(runtime, kernel, x, each, groups);
  if (rows > kLinearFew) runtime.reserve_scratch(kLinearRows * kLinearChunk * item_size(like.parts[0].dtype));
  LinearBlock all{};
  all.w_stride = like.in();
  all.k = static_cast<int>(like.in());
  all.y_stride = out;
  // Tasks on the first weight: those of others differ in their addresses alone.
  const std::int64_t most = rows / each <= kLinearFew ? kFewRows : kLinearRows;
  runtime.issue([run = kernel.run, panels = kernel.panels, &weights, groups, grouped, all,
                 own = tasks_of(like, most, 0), alone = reads_ahead(),
                 out_rows = static_cast<float*>(y.data)](Worker& worker) {
    const auto each_own = static_cast<std::int64_t>(own.size());
    const std::int64_t count = each_own * static_cast<std::int64_t>(groups->active.size());
    const auto group_of = [&](std::int64_t task) {
      return static_cast<std::size_t>(groups->active[static_cast<std::size_t>(task / each_own)]);
    };
    const auto start = [&](std::int64_t task) {
      return Rows{weights[group_of(task)]}.at(own[static_cast<std::size_t>(task % each_own)].row).first;
    };
    worker.take_ahead(count, [&](std::int64_t index, std::int64_t following) {
      const std::size_t group = group_of(index);
      const Task& task = own[static_cast<std::size_t>(index % each_own)];
      LinearBlock block = all;
      block.m = groups->first[group + 1] - groups->first[group];
      block.x = grouped.start(*groups, group, block.m);
      block.w[0] = start(index);
      block.n = task.rows;
      block.y = out_rows + groups->first[group] * block.y_stride + task.row;
      block.next[0] = following < 0 ? nullptr : start(following);
      block.fetch = !alone || panels(block.m) > 1;
      block.scratch = worker.scratch();
      run(block);
    });
  });
  return y;
}

}  // namespace vllmlite::cpu
