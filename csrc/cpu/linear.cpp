// Products with packed weights: how the work is cut, and who does what.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

// Rows of w in a task; multiples of every tile width. Few rows of x want small tasks, because each thread prefetches
// one ahead; many want as many as the second-level cache holds, because each rereads x.
constexpr int kFewRows = 48;

struct Part {
  const std::byte* data;
  std::int64_t first_row, rows, first_task;
};

struct Work {
  std::vector<Part> parts;
  LinearBlock block;
  std::int64_t rows_per_task, tasks;
  std::size_t row_bytes;

  std::size_t part_index(std::int64_t task) const {
    std::size_t index = parts.size() - 1;
    while (parts[index].first_task > task) --index;
    return index;
  }

  const Part& part_of(std::int64_t task) const { return parts[part_index(task)]; }

  const std::byte* start(std::int64_t task) const {
    const Part& part = part_of(task);
    return part.data + static_cast<std::size_t>((task - part.first_task) * rows_per_task) * row_bytes;
  }
};

// The work of multiplying `rows` rows of x, at once, with a weight.
Work cut(const LinearWeight& weight, std::int64_t rows, const Tensor& x, const Tensor& y) {
  Work work{};
  work.rows_per_task = rows <= kLinearFew ? kFewRows : kLinearRows;
  work.row_bytes = static_cast<std::size_t>(weight.in()) * item_size(weight.parts[0].dtype);
  work.block.x = x.data;
  work.block.x_stride = weight.in();
  work.block.m = static_cast<int>(rows);
  work.block.w_stride = weight.in();
  work.block.k = static_cast<int>(weight.in());
  work.block.y = static_cast<float*>(y.data);
  work.block.y_stride = weight.out();
  work.block.bias = weight.bias ? static_cast<const float*>(weight.bias->data) : nullptr;
  std::int64_t first = 0;
  for (const Tensor& part : weight.parts) {
    work.parts.push_back({static_cast<const std::byte*>(part.data), first, part.shape[0], work.tasks});
    work.tasks += (part.shape[0] + work.rows_per_task - 1) / work.rows_per_task;
    first += part.shape[0];
  }
  return work;
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

Tensor linear(Runtime& runtime, const Tensor& given, const LinearWeight& weight) {
  if (given.shape.size() != 2 || given.shape[1] != weight.in())
    throw std::invalid_argument("linear: x must be [rows, " + std::to_string(weight.in()) + "], not " +
                                describe(given));
  const Kernels& kernels = runtime.kernels();
  const auto type = static_cast<std::size_t>(float_of(weight.parts[0].dtype));
  const Tensor x = converted(runtime, given, dtype_of(kernels.linear_input[type]));
  const std::int64_t rows = x.shape[0], out = weight.out();
  const Tensor y = runtime.make({rows, out}, DType::float32);
  if (rows == 0) return y;

  Work work = cut(weight, rows, x, y);
  for (const Tensor& part : weight.parts) runtime.keep(part);
  if (weight.bias) runtime.keep(*weight.bias);
  runtime.keep(x);
  if (rows > kLinearFew) runtime.reserve_scratch(kLinearRows * kLinearChunk * item_size(weight.parts[0].dtype));
  runtime.issue([kernel = kernels.linear[type], work = std::move(work)](Worker& worker) {
    std::int64_t task = worker.take();
    while (task < work.tasks) {
      // Taken early, so that its weights can be fetched while this one's are multiplied.
      const std::int64_t next = worker.take();
      const Part& part = work.part_of(task);
      const std::int64_t at = (task - part.first_task) * work.rows_per_task;
      LinearBlock block = work.block;
      block.w = work.start(task);
      block.n = static_cast<int>(std::min(work.rows_per_task, part.rows - at));
      block.y += part.first_row + at;
      if (block.bias != nullptr) block.bias += part.first_row + at;
      block.next = next < work.tasks ? work.start(next) : nullptr;
      block.scratch = worker.scratch();
      kernel(block);
      task = next;
    }
  });
  return y;
}

Tensor grouped_linear(Runtime& runtime, const Tensor& given, const std::vector<LinearWeight>& weights,
                      const std::shared_ptr<Groups>& groups) {
  const LinearWeight& like = weights.front();
  const Kernels& kernels = runtime.kernels();
  const auto type = static_cast<std::size_t>(float_of(like.parts[0].dtype));
  const Tensor x = converted(runtime, given, dtype_of(kernels.linear_input[type]));
  const std::int64_t rows = x.shape[0];
  const Tensor y = runtime.make({rows, like.out()}, DType::float32);
  if (rows > kLinearFew) runtime.reserve_scratch(kLinearRows * kLinearChunk * item_size(like.parts[0].dtype));
  // Work on the first weight: those of others differ in their addresses alone.
  const auto each = static_cast<std::int64_t>(weights.size());
  runtime.issue([kernel = kernels.linear[type], &weights, groups, work = cut(like, rows / each, x, y),
                 x_row = static_cast<std::size_t>(like.in()) * item_size(x.dtype)](Worker& worker) {
    const std::int64_t tasks = work.tasks * static_cast<std::int64_t>(groups->active.size());
    const auto group_of = [&](std::int64_t task) {
      return static_cast<std::size_t>(groups->active[static_cast<std::size_t>(task / work.tasks)]);
    };
    const auto start = [&](std::int64_t task) {
      const std::int64_t own = task % work.tasks;
      const std::size_t part = work.part_index(own);
      return static_cast<const std::byte*>(weights[group_of(task)].parts[part].data) +
             static_cast<std::size_t>((own - work.parts[part].first_task) * work.rows_per_task) * work.row_bytes;
    };
    std::int64_t task = worker.take();
    while (task < tasks) {
      const std::int64_t next = worker.take();
      const std::size_t group = group_of(task);
      const std::int64_t first = groups->first[group];
      const Part& part = work.part_of(task % work.tasks);
      const std::int64_t at = (task % work.tasks - part.first_task) * work.rows_per_task;
      LinearBlock block = work.block;
      block.x = static_cast<const std::byte*>(block.x) + static_cast<std::size_t>(first) * x_row;
      block.m = groups->first[group + 1] - static_cast<int>(first);
      block.w = start(task);
      block.n = static_cast<int>(std::min(work.rows_per_task, part.rows - at));
      block.y += first * block.y_stride + part.first_row + at;
      block.next = next < tasks ? start(next) : nullptr;
      block.scratch = worker.scratch();
      kernel(block);
      task = next;
    }
  });
  return y;
}

}  // namespace vllmlite::cpu
