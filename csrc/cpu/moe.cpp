// Mixture of experts: tokens are sorted by expert, each expert multiplies all of its tokens at once, and the results of
// a token are added in the order of its experts.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

// The routing of a step's tokens.
struct Plan {
  std::vector<std::int32_t> experts;  // [tokens, top_k], ascending
  std::vector<float> weights;         // [tokens, top_k]
  std::vector<std::int32_t> places;   // [tokens, top_k]: rows after sorting by expert
  std::shared_ptr<Groups> groups;
  std::shared_ptr<AdapterRows> adapters;  // of the rows after sorting; null: no token has an adapter
};

// The top_k experts of the largest logits (the first among equals), ascending, and their softmax over all experts.
void choose(const float* logits, int count, const Routing& routing, std::int32_t* experts, float* weights) {
  const int top_k = routing.top_k;
  for (int i = 0; i < top_k; ++i) {
    int best = -1;
    for (int e = 0; e < count; ++e)
      if (std::find(experts, experts + i, e) == experts + i && (best < 0 || logits[e] > logits[best])) best = e;
    experts[i] = best;
  }
  const float most = logits[experts[0]];
  float total = 0;
  for (int e = 0; e < count; ++e) total += std::exp(logits[e] - most);
  std::sort(experts, experts + top_k);
  for (int i = 0; i < top_k; ++i) weights[i] = std::exp(logits[experts[i]] - most) / total;
  if (!routing.renormalise) return;
  const float sum = std::accumulate(weights, weights + top_k, 0.0F);
  for (int i = 0; i < top_k; ++i) weights[i] /= sum;
}

// Sorts the rows by expert, stably, and lists the experts that have any.
void sort(Plan& plan) {
  std::vector<std::int32_t>& first = plan.groups->first;
  std::ranges::fill(first, 0);
  for (const std::int32_t expert : plan.experts) ++first[static_cast<std::size_t>(expert) + 1];
  plan.groups->active.clear();
  for (std::size_t expert = 0; expert + 1 < first.size(); ++expert) {
    if (first[expert + 1] != 0) plan.groups->active.push_back(static_cast<std::int32_t>(expert));
    first[expert + 1] += first[expert];
  }
  std::vector<std::int32_t> next = first;
  for (std::size_t i = 0; i < plan.experts.size(); ++i)
    plan.places[i] = next[static_cast<std::size_t>(plan.experts[i])]++;
}

// Groups the sorted rows by expert and adapter; `tokens` has the adapters of the tokens.
void group_by_adapter(Plan& plan, const AdapterRows& tokens, std::size_t top_k) {
  AdapterRows& rows = *plan.adapters;
  rows.runs.clear();
  rows.groups.clear();
  for (std::size_t i = 0; i < plan.places.size(); ++i)
    rows.adapters[static_cast<std::size_t>(plan.places[i])] = tokens.adapters[i / top_k];
  for (const std::int32_t active : plan.groups->active) {
    const auto expert = static_cast<std::size_t>(active);
    rows.group(plan.groups->first[expert], plan.groups->first[expert + 1], expert);
  }
}

std::int64_t width(const LinearWeight& weight) { return weight.in(); }
std::int64_t width(const QuantizedWeight& weight) { return weight.in; }

// Whether weights are multiplied by the same kernel.
bool alike(const LinearWeight& a, const LinearWeight& b) {
  return a.parts.front().data.dtype == b.parts.front().data.dtype;
}
bool alike(const QuantizedWeight& /*a*/, const QuantizedWeight& /*b*/) { return true; }

struct Shape {
  std::size_t count;
  std::int64_t out, in;
};

// The shape that all the weights share; std::invalid_argument if they differ.
Shape shape_of(const Experts::Weights& weights) {
  return std::visit(
      [](const auto& all) {
        if (all.empty()) throw std::invalid_argument("a mixture needs at least one expert");
        const auto parts = [](const auto& weight) {
          std::vector<std::int64_t> rows;
          for (const auto& part : weight.parts) rows.push_back(part.rows);
          return rows;
        };
        for (const auto& weight : all)
          if (parts(weight) != parts(all.front()) || width(weight) != width(all.front()) || !alike(weight, all.front()))
            throw std::invalid_argument("experts must have weights of one kind and shape");
        return Shape{all.size(), all.front().out(), width(all.front())};
      },
      weights);
}

Tensor product(Runtime& runtime, const Tensor& x, const Experts::Weights& weights,
               const std::shared_ptr<Groups>& groups) {
  return std::visit([&](const auto& all) { return grouped_linear(runtime, x, all, groups); }, weights);
}

}  // namespace

std::int64_t Experts::count() const {
  return std::visit([](const auto& all) { return static_cast<std::int64_t>(all.size()); }, gate_up);
}

std::shared_ptr<Experts> make_experts(Experts::Weights gate_up, Experts::Weights down) {
  const Shape first = shape_of(gate_up), second = shape_of(down);
  if (first.count != second.count || first.out != 2 * second.in || first.in != second.out)
    throw std::invalid_argument("an expert's weights must be [2 * inner, hidden] and [hidden, inner]");
  return std::make_shared<Experts>(Experts{std::move(gate_up), std::move(down)});
}

Tensor moe(Runtime& runtime, const Tensor& given, const Tensor& given_logits, const std::shared_ptr<Experts>& experts,
           const Routing& routing, const std::shared_ptr<ExpertTables>& tables,
           const std::shared_ptr<AdapterRows>& adapters) {
  const Shape shape = shape_of(experts->gate_up);
  const auto count = static_cast<std::int64_t>(shape.count);
  if (given.shape.size() != 2 || given.shape[1] != shape.in)
    throw std::invalid_argument("moe: x must be [tokens, " + std::to_string(shape.in) + "], not " + describe(given));
  const std::int64_t tokens = given.shape[0], hidden = shape.in, top_k = routing.top_k;
  if (given_logits.shape != std::vector<std::int64_t>{tokens, count})
    throw std::invalid_argument("moe: router logits must be [tokens, " + std::to_string(count) + "], not " +
                                describe(given_logits));
  if (top_k < 1 || top_k > count) throw std::invalid_argument("moe: top_k must be within 1 and the number of experts");
  const Tensor logits = converted(runtime, given_logits, DType::float32);
  const Tensor sorted = runtime.make({tokens * top_k, hidden}, given.dtype);
  const auto plan = std::make_shared<Plan>();
  plan->experts.resize(static_cast<std::size_t>(tokens * top_k));
  plan->weights.resize(plan->experts.size());
  plan->places.resize(plan->experts.size());
  plan->groups = std::make_shared<Groups>();
  plan->groups->first.resize(shape.count + 1);
  plan->groups->active.reserve(shape.count);
  if (adapters) {
    if (!tables || adapters->adapters.size() != static_cast<std::size_t>(tokens) ||
        tables->gate_up->size() != shape.count || tables->down->size() != shape.count)
      throw std::invalid_argument("moe: adapters of other tokens or experts");
    plan->adapters = std::make_shared<AdapterRows>();
    plan->adapters->adapters.resize(plan->places.size());
    runtime.keep(std::static_pointer_cast<void>(adapters));
  }
  runtime.keep(given);
  runtime.keep(logits);
  runtime.keep(std::static_pointer_cast<void>(experts));
  runtime.issue([plan, routing, count, tokens, from = static_cast<const float*>(logits.data)](Worker& worker) {
    for (std::int64_t token; (token = worker.take()) < tokens;)
      choose(from + token * count, static_cast<int>(count), routing, plan->experts.data() + token * routing.top_k,
             plan->weights.data() + token * routing.top_k);
  });
  runtime.issue([plan, top_k, adapters = adapters.get()](Worker& worker) {
    if (worker.take() != 0) return;
    sort(*plan);
    if (adapters != nullptr) group_by_adapter(*plan, *adapters, static_cast<std::size_t>(top_k));
  });
  const std::size_t bytes = static_cast<std::size_t>(hidden) * item_size(given.dtype);
  runtime.issue([plan, tokens, top_k, bytes, from = static_cast<const std::byte*>(given.data),
                 to = static_cast<std::byte*>(sorted.data)](Worker& worker) {
    for (std::int64_t token; (token = worker.take()) < tokens;)
      for (std::int64_t i = token * top_k; i < (token + 1) * top_k; ++i)
        std::memcpy(to + static_cast<std::size_t>(plan->places[static_cast<std::size_t>(i)]) * bytes,
                    from + static_cast<std::size_t>(token) * bytes, bytes);
  });
  Tensor up = product(runtime, sorted, experts->gate_up, plan->groups);
  if (adapters) up = add_lora(runtime, up, sorted, tables->gate_up, plan->adapters);
  const Tensor inner = gated_activation(runtime, up, routing.activation);
  Tensor down = product(runtime, inner, experts->down, plan->groups);
  if (adapters) down = add_lora(runtime, down, inner, tables->down, plan->adapters);
  const Tensor out = runtime.make({tokens, hidden}, DType::float32);
  runtime.issue([&kernels = runtime.kernels(), plan, tokens, top_k, hidden, from = static_cast<const float*>(down.data),
                 to = static_cast<float*>(out.data)](Worker& worker) {
    for (std::int64_t token; (token = worker.take()) < tokens;) {
      std::fill_n(to + token * hidden, hidden, 0.0F);
      for (std::int64_t i = token * top_k; i < (token + 1) * top_k; ++i) {
        const auto index = static_cast<std::size_t>(i);
        kernels.add_scaled(from + plan->places[index] * hidden, plan->weights[index], to + token * hidden, hidden);
      }
    }
  });
  return out;
}

}  // namespace vllmlite::cpu
