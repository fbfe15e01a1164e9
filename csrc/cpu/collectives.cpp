#include "cpu/collectives.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "tensor/checks.hpp"

namespace vllmlite::cpu {

namespace {

constexpr std::int64_t kPiece = 4096;  // elements that make one task

// Issues `copy(begin, end)` for pieces of [0, count) elements of `item` bytes, then the exchange, then
// `read(begin, end)` for pieces of [0, reads).
template <typename Copy, typename Read>
void issue_exchange(Runtime& runtime, const std::shared_ptr<Exchange>& exchange, std::int64_t count, std::size_t item,
                    Copy copy, std::int64_t reads, Read read) {
  const auto in_pieces = [&runtime](std::int64_t size, auto body) {
    runtime.issue([size, body](Worker& worker) {
      for (std::int64_t at; (at = worker.take() * kPiece) < size;) body(at, std::min(at + kPiece, size));
    });
  };
  runtime.keep(exchange);
  in_pieces(count, copy);
  runtime.issue([&exchange = *exchange, size = static_cast<std::size_t>(count) * item](Worker& worker) {
    if (worker.take() == 0) exchange.arrive(size);
  });
  in_pieces(reads, read);
}

// Adds the parts of all ranks at [begin, end), in rank order.
void add_parts(const Exchange& exchange, float* to, std::int64_t begin, std::int64_t end) {
  const auto part = [&](int rank) { return reinterpret_cast<const float*>(exchange.part(rank)) + begin; };
  const std::int64_t count = end - begin;
  const float* first = part(0);
  if (exchange.size() == 1) {
    std::copy(first, first + count, to);
    return;
  }
  const float* second = part(1);
  for (std::int64_t i = 0; i < count; ++i) to[i] = first[i] + second[i];
  for (int rank = 2; rank < exchange.size(); ++rank) {
    const float* more = part(rank);
    for (std::int64_t i = 0; i < count; ++i) to[i] += more[i];
  }
}

}  // namespace

Tensor all_reduce(Runtime& runtime, const Tensor& x, const std::shared_ptr<Exchange>& exchange) {
  check_dtype(x, DType::float32, "x of an all-reduce");
  constexpr std::int64_t kMost = kExchangeBytes / sizeof(float);
  Tensor out = x.readonly ? runtime.make(x.shape, x.dtype) : x;
  runtime.keep(x);
  runtime.keep(out);
  for (std::int64_t at = 0; at < x.size(); at += kMost) {
    const std::int64_t count = std::min(x.size() - at, kMost);
    const float* from = static_cast<const float*>(x.data) + at;
    float* to = static_cast<float*>(out.data) + at;
    issue_exchange(
        runtime, exchange, count, sizeof(float),
        [&exchange = *exchange, from](std::int64_t begin, std::int64_t end) {
          std::memcpy(exchange.own() + static_cast<std::size_t>(begin) * sizeof(float), from + begin,
                      static_cast<std::size_t>(end - begin) * sizeof(float));
        },
        count,
        [&exchange = *exchange, to](std::int64_t begin, std::int64_t end) {
          add_parts(exchange, to + begin, begin, end);
        });
  }
  return out;
}

Tensor all_gather(Runtime& runtime, const Tensor& x, const std::vector<std::int64_t>& widths,
                  const std::shared_ptr<Exchange>& exchange) {
  check_rank(x, 2, "x of an all-gather");
  if (static_cast<int>(widths.size()) != exchange->size() ||
      widths[static_cast<std::size_t>(exchange->rank())] != x.shape[1])
    throw std::invalid_argument("the widths of an all-gather are not those of its ranks");
  const auto item = static_cast<std::int64_t>(item_size(x.dtype));
  const std::int64_t rows = x.shape[0], total = std::accumulate(widths.begin(), widths.end(), std::int64_t{0});
  const std::int64_t widest = *std::max_element(widths.begin(), widths.end());
  Tensor out = runtime.make({rows, total}, x.dtype);
  runtime.keep(x);
  // A range of a rank's elements, row by row, is exchanged at a time.
  const std::int64_t most = static_cast<std::int64_t>(kExchangeBytes) / item;
  for (std::int64_t at = 0; at < rows * widest; at += most) {
    const std::int64_t count = std::clamp(x.size() - at, std::int64_t{0}, most);
    const std::byte* from = static_cast<const std::byte*>(x.data) + at * item;
    const auto copy = [&exchange = *exchange, from, item](std::int64_t begin, std::int64_t end) {
      std::memcpy(exchange.own() + begin * item, from + begin * item, static_cast<std::size_t>((end - begin) * item));
    };
    const auto read = [&exchange = *exchange, widths, to = static_cast<std::byte*>(out.data), at, rows, total, item](
                          std::int64_t begin, std::int64_t end) {
      std::int64_t column = 0;
      for (std::size_t rank = 0; rank < widths.size(); column += widths[rank++]) {
        const std::int64_t width = widths[rank], last = std::min(at + end, rows * width);
        for (std::int64_t element = at + begin; element < last;) {
          const std::int64_t row = element / width, next = std::min((row + 1) * width, last);
          std::memcpy(to + (row * total + column + element - row * width) * item,
                      exchange.part(static_cast<int>(rank)) + (element - at) * item,
                      static_cast<std::size_t>((next - element) * item));
          element = next;
        }
      }
    };
    issue_exchange(runtime, exchange, count, static_cast<std::size_t>(item), copy, std::min(rows * widest - at, most),
                   read);
  }
  return out;
}

void send(Runtime& runtime, const Tensor& x, const std::shared_ptr<Ranks>& ranks) {
  runtime.keep(x);
  runtime.keep(ranks);
  runtime.issue([&ranks = *ranks, data = static_cast<const std::byte*>(x.data), size = x.bytes()](Worker& worker) {
    if (worker.take() == 0) ranks.pass_on(data, size);
  });
}

Tensor receive(Runtime& runtime, std::vector<std::int64_t> shape, DType dtype, int from,
               const std::shared_ptr<Ranks>& ranks) {
  Tensor out = runtime.make(std::move(shape), dtype);
  runtime.keep(ranks);
  runtime.issue([&ranks = *ranks, data = static_cast<std::byte*>(out.data), size = out.bytes(), from](Worker& worker) {
    if (worker.take() == 0) ranks.take_over(from, data, size);
  });
  return out;
}

}  // namespace vllmlite::cpu
