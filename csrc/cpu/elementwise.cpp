// Ops that pass over their rows once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cpu {

namespace {

constexpr std::int64_t kPiece = 2048;  // elements of a row that make one task, where a row can be split

const std::int32_t* indices(const Tensor& tensor, std::int64_t limit, const char* what) {
  check_rank(tensor, 1, what);
  check_dtype(tensor, DType::int32, what);
  const auto* values = static_cast<const std::int32_t*>(tensor.data);
  check_indices(what, {values, static_cast<std::size_t>(tensor.size())}, limit);
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

namespace {

struct NormResult {
  Tensor out, sum;
};

// Sets the fields that all norms share in `row`, then runs `kernel` on every row of x.
template <typename Row>
NormResult norm(Runtime& runtime, Row row, void (*kernel)(const Row&), const Tensor& given, const Tensor& weight,
                float eps, const std::optional<Tensor>& given_residual) {
  check_rank(given, 2, "x of a norm");
  check_shape(weight, {given.shape[1]}, "the weight of a norm");
  const Tensor x = converted(runtime, given, DType::float32);
  const std::int64_t count = x.shape[0], width = x.shape[1];
  const Tensor out = runtime.make(x.shape, runtime.product_input());
  Tensor sum = x;
  row.x = static_cast<const float*>(x.data);
  if (given_residual) {
    check_shape(*given_residual, x.shape, "the residual of a norm");
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
  runtime.issue([kernel, row, count, width, item = item_size(out.dtype)](Worker& worker) {
    for (std::int64_t index; (index = worker.take()) < count;) {
      Row one = row;
      one.x += index * width;
      if (one.residual != nullptr) {
        one.residual += index * width;
        one.sum += index * width;
      }
      one.out = static_cast<std::byte*>(one.out) + static_cast<std::size_t>(index * width) * item;
      kernel(one);
    }
  });
  return {out, sum};
}

// Splits rows of `width` elements into pieces, one task each, and calls body(row, first element, number of elements).
template <typename Body>
void each_piece(Runtime& runtime, std::int64_t count, std::int64_t width, Body body) {
  const std::int64_t pieces = (width + kPiece - 1) / kPiece;
  runtime.issue([count, width, pieces, body](Worker& worker) {
    for (std::int64_t task; (task = worker.take()) < count * pieces;) {
      const std::int64_t at = task % pieces * kPiece;
      body(task / pieces, at, std::min(kPiece, width - at));
    }
  });
}

// f of the first `width` elements of each row of x, times the remaining `width` elements if the row has them (gated).
Tensor activated(Runtime& runtime, const Tensor& given, Activation f, std::int64_t width) {
  const Tensor x = converted(runtime, given, DType::float32);
  const Tensor out = runtime.make({x.shape[0], width}, runtime.product_input());
  runtime.keep(x);
  each_piece(runtime, x.shape[0], width,
             [&kernels = runtime.kernels(), f, from = static_cast<const float*>(x.data),
              to = static_cast<std::byte*>(out.data), type = float_of(out.dtype), item = item_size(out.dtype), width,
              stride = x.shape[1]](std::int64_t row, std::int64_t at, std::int64_t size) {
               const float* some = from + row * stride + at;
               kernels.activate(f, some, stride == width ? nullptr : some + width,
                                to + static_cast<std::size_t>(row * width + at) * item, type, static_cast<int>(size));
             });
  return out;
}

// x itself as the memory of the result, or new memory if x is read-only.
Tensor in_place(Runtime& runtime, const Tensor& x) {
  if (!x.readonly) return x;
  return runtime.make(x.shape, x.dtype);
}

}  // namespace

std::pair<Tensor, Tensor> rms_norm(Runtime& runtime, const Tensor& x, const Tensor& weight, float eps,
                                   const std::optional<Tensor>& residual) {
  const auto [out, sum] = norm(runtime, NormRow{}, runtime.kernels().rms_norm, x, weight, eps, residual);
  return {out, sum};
}

std::pair<Tensor, Tensor> layer_norm(Runtime& runtime, const Tensor& x, const Tensor& weight,
                                     const std::optional<Tensor>& bias, float eps,
                                     const std::optional<Tensor>& residual) {
  LayerNormRow row{};
  if (bias) {
    check_shape(*bias, weight.shape, "the bias of layer_norm");
    if (bias->dtype != weight.dtype)
      throw TypeError("the bias of layer_norm must be " + std::string(name(weight.dtype)));
    row.bias = bias->data;
    runtime.keep(*bias);
  }
  const auto [out, sum] = norm(runtime, row, runtime.kernels().layer_norm, x, weight, eps, residual);
  return {out, sum};
}

Tensor gated_activation(Runtime& runtime, const Tensor& x, Activation f) {
  check_rank(x, 2, "x of gated_activation");
  if (x.shape[1] % 2 != 0) throw std::invalid_argument("gated_activation: the width of x is odd");
  return activated(runtime, x, f, x.shape[1] / 2);
}

Tensor activation(Runtime& runtime, const Tensor& x, Activation f) {
  check_rank(x, 2, "x of activation");
  return activated(runtime, x, f, x.shape[1]);
}

Tensor add(Runtime& runtime, const Tensor& given, const Tensor& given_other) {
  check_shape(given, given_other.shape, "x of add");
  const Tensor x = converted(runtime, given, DType::float32);
  const Tensor other = converted(runtime, given_other, DType::float32);
  const Tensor out = in_place(runtime, other);
  runtime.keep(x);
  runtime.keep(other);
  each_piece(runtime, 1, x.size(),
             [a = static_cast<const float*>(x.data), b = static_cast<const float*>(other.data),
              to = static_cast<float*>(out.data)](std::int64_t, std::int64_t at, std::int64_t size) {
               for (std::int64_t i = at; i < at + size; ++i) to[i] = a[i] + b[i];
             });
  return out;
}

Tensor scale(Runtime& runtime, const Tensor& given, float factor) {
  const Tensor x = converted(runtime, given, DType::float32), out = in_place(runtime, x);
  runtime.keep(x);
  each_piece(runtime, 1, x.size(),
             [factor, from = static_cast<const float*>(x.data), to = static_cast<float*>(out.data)](
                 std::int64_t, std::int64_t at, std::int64_t size) {
               for (std::int64_t i = at; i < at + size; ++i) to[i] = from[i] * factor;
             });
  return out;
}

Tensor soft_cap(Runtime& runtime, const Tensor& x, float cap) {
  if (x.dtype != DType::float32 || x.readonly) throw TypeError("soft_cap: x must be float32 and not read-only");
  if (!(cap > 0)) throw std::invalid_argument("a soft cap must be above 0");
  runtime.keep(x);
  each_piece(runtime, 1, x.size(),
             [&kernels = runtime.kernels(), cap, to = static_cast<float*>(x.data)](
                 std::int64_t, std::int64_t at, std::int64_t size) { kernels.soft_cap(to + at, cap, size); });
  return x;
}

Tensor sigmoid_gate(Runtime& runtime, const Tensor& given, const Tensor& given_gate) {
  check_rank(given, 2, "x of sigmoid_gate");
  check_shape(given_gate, {given.shape[0], 1}, "the gate of sigmoid_gate");
  const Tensor x = converted(runtime, given, DType::float32), out = in_place(runtime, x);
  const Tensor gate = converted(runtime, given_gate, DType::float32);
  runtime.keep(x);
  runtime.keep(gate);
  each_piece(
      runtime, x.shape[0], x.shape[1],
      [gates = static_cast<const float*>(gate.data), from = static_cast<const float*>(x.data),
       to = static_cast<float*>(out.data), width = x.shape[1]](std::int64_t row, std::int64_t at, std::int64_t size) {
        const float factor = 1.0F / (1.0F + std::exp(-gates[row]));
        for (std::int64_t i = row * width + at; i < row * width + at + size; ++i) to[i] = from[i] * factor;
      });
  return out;
}

}  // namespace vllmlite::cpu
