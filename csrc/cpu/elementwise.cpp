// Ops that go over rows once.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

constexpr std::int64_t kPiece = 2048;  // elements of a row that are one task where rows need not be whole

void check_rank(const Tensor& tensor, std::size_t rank, const char* what) {
  if (tensor.shape.size() != rank)
    throw std::invalid_argument(std::string(what) + " must have " + std::to_string(rank) + " dimensions, not shape " +
                                describe(tensor.shape));
}

void check_shape(const Tensor& tensor, const std::vector<std::int64_t>& shape, const char* what) {
  if (tensor.shape != shape)
    throw std::invalid_argument(std::string(what) + " must be " + describe(shape) + ", not " + describe(tensor.shape));
}

const std::int32_t* indices(const Tensor& tensor, std::int64_t limit, const char* what) {
  check_rank(tensor, 1, what);
  if (tensor.dtype != DType::int32) throw TypeError(std::string(what) + " must be int32, not " + describe(tensor));
  const auto* values = static_cast<const std::int32_t*>(tensor.data);
  for (std::int64_t i = 0; i < tensor.shape[0]; ++i)
    if (values[i] < 0 || values[i] >= limit)
      throw std::out_of_range(std::string(what) + " " + std::to_string(values[i]) + " is not within 0 and " +
                              std::to_string(limit - 1));
  return values;
}

}  // namespace

Tensor converted(Runtime& runtime, const Tensor& x, DType dtype) {
  if (x.dtype == dtype) return x;
  Tensor out = runtime.make(x.shape, dtype);
  runtime.keep(x);
  runtime.issue([&kernels = runtime.kernels(), from = static_cast<const std::byte*>(x.data),
                 from_type = float_of(x.dtype), from_size = item_size(x.dtype), to = static_cast<std::byte*>(out.data),
                 to_type = float_of(dtype), to_size = item_size(dtype), size = x.size()](Worker& worker) {
    for (std::int64_t at; (at = worker.take() * kPiece) < size;)
      kernels.convert(from + static_cast<std::size_t>(at) * from_size, from_type,
                      to + static_cast<std::size_t>(at) * to_size, to_type, std::min(kPiece, size - at));
  });
  return out;
}

Tensor embedding(Runtime& runtime, const Tensor& ids, const Tensor& table) {
  check_rank(table, 2, "the embedding table");
  const std::int32_t* rows = indices(ids, table.shape[0], "token id");
  const std::int64_t width = table.shape[1], count = ids.shape[0];
  Tensor out = runtime.make({count, width}, DType::float32);
  runtime.keep(table);
  runtime.keep(ids);
  runtime.issue([&kernels = runtime.kernels(), rows, from = static_cast<const std::byte*>(table.data),
                 type = float_of(table.dtype), item = item_size(table.dtype), to = static_cast<float*>(out.data), width,
                 count](Worker& worker) {
    for (std::int64_t row; (row = worker.take()) < count;)
      kernels.convert(from + static_cast<std::size_t>(rows[row] * width) * item, type, to + row * width, Float::f32,
                      width);
  });
  return out;
}

Tensor gather_rows(Runtime& runtime, const Tensor& x, const Tensor& index) {
  if (x.shape.empty()) throw std::invalid_argument("rows of a scalar");
  const std::int32_t* rows = indices(index, x.shape[0], "row");
  std::vector<std::int64_t> shape = x.shape;
  shape[0] = index.shape[0];
  Tensor out = runtime.make(shape, x.dtype);
  const std::size_t bytes = x.shape[0] == 0 ? 0 : x.bytes() / static_cast<std::size_t>(x.shape[0]);
  runtime.keep(x);
  runtime.keep(index);
  runtime.issue([rows, from = static_cast<const std::byte*>(x.data), to = static_cast<std::byte*>(out.data), bytes,
                 count = index.shape[0]](Worker& worker) {
    for (std::int64_t row; (row = worker.take()) < count;)
      std::memcpy(to + static_cast<std::size_t>(row) * bytes, from + static_cast<std::size_t>(rows[row]) * bytes,
                  bytes);
  });
  return out;
}

std::pair<Tensor, Tensor> rms_norm(Runtime& runtime, const Tensor& given, const Tensor& weight, float eps,
                                   const std::optional<Tensor>& given_residual) {
  check_rank(given, 2, "x of rms_norm");
  check_shape(weight, {given.shape[1]}, "the weight of rms_norm");
  const Tensor x = converted(runtime, given, DType::float32);
  const std::int64_t count = x.shape[0], width = x.shape[1];
  const Tensor out = runtime.make(x.shape, runtime.product_input());
  Tensor sum = x;
  NormRow row{};
  row.x = static_cast<const float*>(x.data);
  if (given_residual) {
    check_shape(*given_residual, x.shape, "the residual of rms_norm");
    const Tensor residual = converted(runtime, *given_residual, DType::float32);
    row.residual = static_cast<const float*>(residual.data);
    sum = residual.readonly ? runtime.make(x.shape, DType::float32) : residual;
    row.sum = static_cast<float*>(sum.data);
    runtime.keep(residual);
  }
  row.weight = weight.data;
  row.weight_type = float_of(weight.dtype);
  row.out = out.data;
  row.out_type = float_of(out.dtype);
  row.size = static_cast<int>(width);
  row.eps = eps;
  runtime.keep(x);
  runtime.keep(weight);
  runtime.issue([&kernels = runtime.kernels(), row, count, width, item = item_size(out.dtype)](Worker& worker) {
    for (std::int64_t index; (index = worker.take()) < count;) {
      NormRow one = row;
      one.x += index * width;
      if (one.residual != nullptr) {
        one.residual += index * width;
        one.sum += index * width;
      }
      one.out = static_cast<std::byte*>(one.out) + static_cast<std::size_t>(index * width) * item;
      kernels.rms_norm(one);
    }
  });
  return {out, sum};
}

Tensor gated_activation(Runtime& runtime, const Tensor& given, Gate gate) {
  check_rank(given, 2, "x of gated_activation");
  if (given.shape[1] % 2 != 0) throw std::invalid_argument("gated_activation: the width of x is odd");
  const Tensor x = converted(runtime, given, DType::float32);
  const std::int64_t count = x.shape[0], width = x.shape[1] / 2, pieces = (width + kPiece - 1) / kPiece;
  const Tensor out = runtime.make({count, width}, runtime.product_input());
  runtime.keep(x);
  runtime.issue([&kernels = runtime.kernels(), gate, from = static_cast<const float*>(x.data),
                 to = static_cast<std::byte*>(out.data), type = float_of(out.dtype), item = item_size(out.dtype), count,
                 width, pieces](Worker& worker) {
    for (std::int64_t task; (task = worker.take()) < count * pieces;) {
      const std::int64_t row = task / pieces, at = task % pieces * kPiece;
      const float* gates = from + row * 2 * width + at;
      kernels.gated(gate, gates, gates + width, to + static_cast<std::size_t>(row * width + at) * item, type,
                    static_cast<int>(std::min(kPiece, width - at)));
    }
  });
  return out;
}

}  // namespace vllmlite::cpu
