// Changes of linear layers by adapters: low-rank products of some rows, added to the layer's results.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cpu {

namespace {

constexpr std::int64_t kShrinkRows = 16;   // rows of a in a task
constexpr std::int64_t kExpandBlocks = 8;  // blocks of kLowRankColumns columns in a task

std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Copies b [columns, rank] into blocks [rank][kLowRankColumns], padded with zeros.
Tensor blocks_of(const Tensor& b) {
  const std::int64_t columns = b.shape[0], rank = b.shape[1];
  Tensor blocks = allocate({divided_up(columns, kLowRankColumns), rank, kLowRankColumns}, b.dtype);
  std::memset(blocks.data, 0, blocks.bytes());
  const auto copy = [&](const auto* from, auto* to) {
    for (std::int64_t column = 0; column < columns; ++column)
      for (std::int64_t r = 0; r < rank; ++r)
        to[(column / kLowRankColumns * rank + r) * kLowRankColumns + column % kLowRankColumns] =
            from[column * rank + r];
  };
  if (item_size(b.dtype) == sizeof(float))
    copy(static_cast<const float*>(b.data), static_cast<float*>(blocks.data));
  else
    copy(static_cast<const std::uint16_t*>(b.data), static_cast<std::uint16_t*>(blocks.data));
  return blocks;
}

// Calls body(group, change, task) for the tasks of each group of rows whose adapter changes the layer; `count` gives
// the number of tasks for a change.
template <typename Count, typename Body>
void take_tasks(Worker& worker, const AdapterRows& rows, const LowRankTables& tables, Count count, Body body) {
  std::int64_t before = 0, task = worker.take();
  for (const AdapterGroup& group : rows.groups) {
    const std::vector<std::shared_ptr<const LowRankChange>>& changes = tables[group.expert]->changes;
    const auto index = static_cast<std::size_t>(group.adapter);
    if (index >= changes.size() || !changes[index]) continue;
    const LowRankChange& change = *changes[index];
    const std::int64_t tasks = count(change);
    for (; task < before + tasks; task = worker.take()) body(group, change, task - before);
    before += tasks;
  }
}

// The products of rows of zeros with a one at an id: the elements of a's column.
void take_columns(const Kernels& kernels, const LowRankChange& change, const std::int32_t* ids, const AdapterRun& run,
                  std::int64_t first_rank, std::int64_t ranks, float* low, std::int64_t width) {
  const std::int64_t columns = change.a.shape[1];
  const std::size_t item = item_size(change.a.dtype);
  for (std::int64_t token = run.first; token < run.first + run.count; ++token)
    for (std::int64_t r = first_rank; r < first_rank + ranks; ++r)
      kernels.convert(
          static_cast<const std::byte*>(change.a.data) + static_cast<std::size_t>(r * columns + ids[token]) * item,
          float_of(change.a.dtype), low + token * width + r, Float::f32, 1);
}

// Multiplies columns of the rows of y by their gain and adds their shift; `gain` points to that of the first column.
void rescale(float* y, std::int64_t stride, std::int64_t rows, const float* gain, const float* shift,
             std::int64_t columns) {
  for (std::int64_t row = 0; row < rows; ++row, y += stride)
    for (std::int64_t column = 0; column < columns; ++column)
      y[column] = gain[column] == 0 ? shift[column] : y[column] * gain[column] + shift[column];
}

}  // namespace

LowRankTable::LowRankTable(std::vector<std::int64_t> rows_of_parts, std::int64_t the_columns, int adapters, int rank)
    : rows(std::move(rows_of_parts)),
      columns(the_columns),
      max_rank(rank),
      changes(static_cast<std::size_t>(adapters) + 1) {}

std::int64_t LowRankTable::out() const {
  std::int64_t sum = 0;
  for (const std::int64_t part : rows) sum += part;
  return sum;
}

void LowRankTable::set(int index, const std::vector<Tensor>& inputs, const std::vector<LowRankOutput>& outputs) {
  if (index < 1 || static_cast<std::size_t>(index) >= changes.size())
    throw std::out_of_range("adapter " + std::to_string(index) + " of " + std::to_string(changes.size() - 1));
  changes[static_cast<std::size_t>(index)] = nullptr;
  if (outputs.empty()) return;
  auto change = std::make_shared<LowRankChange>();
  std::vector<std::int64_t> first{0};
  for (const Tensor& a : inputs) {
    if (a.shape.size() != 2 || a.shape[1] != columns || a.dtype != inputs[0].dtype || a.shape[0] > max_rank)
      throw std::invalid_argument("an adapter's a must be [rank up to " + std::to_string(max_rank) + ", " +
                                  std::to_string(columns) + "], not " + describe(a));
    first.push_back(first.back() + a.shape[0]);
  }
  change->a = allocate({first.back(), columns}, inputs.at(0).dtype);
  auto* to = static_cast<std::byte*>(change->a.data);
  for (const Tensor& a : inputs) to = std::copy_n(static_cast<const std::byte*>(a.data), a.bytes(), to);
  for (const LowRankOutput& output : outputs) {
    const std::int64_t begin = first.at(output.input), rank = first.at(output.input + 1) - begin;
    const std::int64_t own = rows.at(output.part);
    if (output.b.shape != std::vector{own, rank} || output.b.dtype != change->a.dtype)
      throw std::invalid_argument("an adapter's b must be [" + std::to_string(own) + ", " + std::to_string(rank) +
                                  "], not " + describe(output.b));
    if (output.gain &&
        (output.gain->shape != std::vector<std::int64_t>{2, own} || output.gain->dtype != DType::float32))
      throw std::invalid_argument("an adapter's gain must be float32 [2, " + std::to_string(own) + "], not " +
                                  describe(*output.gain));
    std::int64_t column = 0;
    for (std::size_t part = 0; part < output.part; ++part) column += rows[part];
    change->parts.push_back({column, own, begin, rank, output.scale, blocks_of(output.b), output.gain});
  }
  changes[static_cast<std::size_t>(index)] = std::move(change);
}

std::int64_t LowRankChange::expand_tasks() const {
  std::int64_t tasks = 0;
  for (const Part& part : parts) tasks += divided_up(part.b.shape[0], kExpandBlocks);
  return tasks;
}

Tensor add_lora(Runtime& runtime, const Tensor& y, const Tensor& given,
                const std::shared_ptr<const LowRankTables>& tables, const std::shared_ptr<AdapterRows>& rows) {
  const LowRankTable& table = *tables->at(0);
  const std::int64_t count = given.shape.empty() ? 0 : given.shape[0], out = table.out(), columns = table.columns;
  const bool ids = given.dtype == DType::int32;
  const std::vector<std::int64_t> wanted = ids ? std::vector{count} : std::vector{count, columns};
  if (given.shape != wanted || y.shape != std::vector{count, out} || y.dtype != DType::float32 || !rows ||
      static_cast<std::size_t>(count) != rows->adapters.size())
    throw std::invalid_argument("add_lora: x must be [rows, " + std::to_string(columns) +
                                "] or int32 [rows], and y float32 [rows, " + std::to_string(out) + "], for " +
                                std::to_string(rows ? rows->adapters.size() : 0) + " rows, not " + describe(given) +
                                " and " + describe(y));
  if (ids)
    check_indices("id", {static_cast<const std::int32_t*>(given.data), static_cast<std::size_t>(count)}, columns);
  const Kernels& kernels = runtime.kernels();
  const DType product = runtime.product_input();
  const bool pairs = given.dtype == DType::bfloat16 && product == DType::bfloat16 && kernels.shrink_bf16 != nullptr;
  const Tensor x = pairs || ids ? given : converted(runtime, given, DType::float32);
  const std::int64_t width = table.max_rank * static_cast<std::int64_t>(table.rows.size());
  const Tensor low = runtime.make({count, width}, DType::float32);
  auto* const low_rows = static_cast<float*>(low.data);
  runtime.keep(x);
  runtime.keep(y);
  runtime.keep(std::const_pointer_cast<void>(std::static_pointer_cast<const void>(tables)));
  runtime.keep(std::static_pointer_cast<void>(rows));
  runtime.issue([&kernels, tables = tables.get(), rows = rows.get(), pairs, ids, width, low_rows, columns,
                 x_rows = static_cast<const std::byte*>(x.data), item = item_size(x.dtype)](Worker& worker) {
    const auto tasks = [](const LowRankChange& change) { return divided_up(change.a.shape[0], kShrinkRows); };
    take_tasks(worker, *rows, *tables, tasks,
               [&](const AdapterGroup& group, const LowRankChange& change, std::int64_t task) {
                 const std::int64_t row = task * kShrinkRows, ranks = std::min(kShrinkRows, change.a.shape[0] - row);
                 if (ids) {
                   for (const AdapterRun& run : rows->runs_of(group))
                     take_columns(kernels, change, reinterpret_cast<const std::int32_t*>(x_rows), run, row, ranks,
                                  low_rows, width);
                   return;
                 }
                 const Float type = float_of(change.a.dtype);
                 LinearBlock block{};
                 block.w[0] = static_cast<const std::byte*>(change.a.data) +
                              static_cast<std::size_t>(row * columns) * item_size(change.a.dtype);
                 block.w_stride = columns;
                 block.n = static_cast<int>(ranks);
                 block.k = static_cast<int>(columns);
                 block.y_stride = width;
                 for (const AdapterRun& run : rows->runs_of(group)) {
                   block.x = x_rows + static_cast<std::size_t>(run.first * columns) * item;
                   block.m = run.count;
                   block.y = low_rows + run.first * width + row;
                   pairs ? kernels.shrink_bf16(block) : kernels.shrink[static_cast<std::size_t>(type)](block);
                 }
               });
  });
  runtime.issue([&kernels, tables = tables.get(), rows = rows.get(), width, low_rows, out,
                 y_rows = static_cast<float*>(y.data)](Worker& worker) {
    const auto tasks = [](const LowRankChange& change) { return change.expand_tasks(); };
    take_tasks(worker, *rows, *tables, tasks,
               [&](const AdapterGroup& group, const LowRankChange& change, std::int64_t task) {
                 auto part = change.parts.begin();
                 for (std::int64_t own; task >= (own = divided_up(part->b.shape[0], kExpandBlocks)); ++part)
                   task -= own;
                 const std::int64_t column = task * kExpandBlocks * kLowRankColumns;
                 const Float type = float_of(part->b.dtype);
                 const float* const gain = part->gain ? static_cast<const float*>(part->gain->data) + column : nullptr;
                 LowRankExpand block{};
                 block.low_stride = width;
                 block.rank = static_cast<int>(part->rank);
                 block.scale = part->scale;
                 block.b = static_cast<const std::byte*>(part->b.data) +
                           static_cast<std::size_t>(column * part->rank) * item_size(part->b.dtype);
                 block.n = static_cast<int>(std::min(kExpandBlocks * kLowRankColumns, part->columns - column));
                 block.y_stride = out;
                 for (const AdapterRun& run : rows->runs_of(group)) {
                   block.low = low_rows + run.first * width + part->first_rank;
                   block.m = run.count;
                   block.y = y_rows + run.first * out + part->first_column + column;
                   if (gain != nullptr) rescale(block.y, out, run.count, gain, gain + part->columns, block.n);
                   kernels.expand[static_cast<std::size_t>(type)](block);
                 }
               });
  });
  return y;
}

}  // namespace vllmlite::cpu
