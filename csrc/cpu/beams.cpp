// Beam search: the best continuations of groups of sequences.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
  float score = -kInfinity;
  std::int32_t row = -1, id = -1;  // the row within its group
};

bool is_better(const Candidate& a, const Candidate& b) {
  if (a.score != b.score) return a.score > b.score;
  return a.row != b.row ? a.row < b.row : a.id < b.id;
}

// Replaces logits by the logarithms of their softmax after a division by `temperature`. A NaN counts as -inf.
void log_softmax(const Kernels& kernels, std::span<float> logits, float temperature, float* scratch) {
  const auto size = static_cast<std::int64_t>(logits.size());
  for (float& logit : logits) logit = std::isnan(logit) ? -kInfinity : logit / temperature;
  const float largest = logits[static_cast<std::size_t>(kernels.argmax(logits.data(), size))];
  if (!std::isfinite(largest)) {
    for (float& logit : logits) logit = logit == kInfinity ? 0 : -kInfinity;
    return;
  }
  kernels.weights(logits.data(), largest, 1, -kInfinity, scratch, size);
  double sum = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) sum += scratch[i];
  const double log_sum = static_cast<double>(largest) + std::log(sum);
  for (float& logit : logits) logit = static_cast<float>(static_cast<double>(logit) - log_sum);
}

// Writes the best continuations of a row to `best`, in any order; what `best` holds more of them stays as it was.
void keep_best(std::span<const float> logprobs, float score, std::int32_t row, std::span<Candidate> best) {
  std::size_t count = 0;
  float least = -kInfinity;
  for (std::size_t id = 0; id < logprobs.size(); ++id) {
    const float sum = score + logprobs[id];
    if (!(sum > least)) continue;  // an equal one comes later, so it is worse
    if (count == best.size()) std::ranges::pop_heap(best, is_better);
    count = std::min(count + 1, best.size());
    best[count - 1] = {sum, row, static_cast<std::int32_t>(id)};
    std::ranges::push_heap(best.first(count), is_better);
    if (count == best.size()) least = best.front().score;
  }
}

}  // namespace

Continuations choose_beams(Runtime& runtime, const Tensor& logits, const std::shared_ptr<Batch>& batch, BeamRows beams,
                           int k) {
  check_logits(logits, *batch);
  const std::int64_t size = logits.shape[1], groups = beams.num_groups();
  beams.check(logits.shape[0], size, k);
  Continuations out{runtime.make({groups, k}, DType::int32), runtime.make({groups, k}, DType::int32),
                    runtime.make({groups, k}, DType::float32)};
  struct State {
    BeamRows beams;
    std::vector<Candidate> found;  // [rows, k]
  };
  const auto width = static_cast<std::size_t>(size), most = static_cast<std::size_t>(k);
  std::vector<Candidate> none(beams.rows.size() * most);
  const auto state = std::make_shared<State>(State{std::move(beams), std::move(none)});
  runtime.keep(logits);
  runtime.reserve_scratch(2 * width * sizeof(float));
  runtime.issue([&kernels = runtime.kernels(), from = static_cast<const float*>(logits.data), width, most, batch,
                 state](Worker& worker) {
    const BeamRows& given = state->beams;
    auto* const memory = reinterpret_cast<float*>(worker.scratch());
    const std::span logprobs(memory, width);
    for (std::int64_t task; (task = worker.take()) < given.count();) {
      const auto index = static_cast<std::size_t>(task);
      const auto sampled = static_cast<std::size_t>(given.rows[index]);
      std::copy_n(from + sampled * width, width, memory);
      log_softmax(kernels, logprobs, given.temperatures[index], memory + width);
      edit(logprobs, *batch, sampled);
      const auto group = std::ranges::upper_bound(given.groups, static_cast<std::int32_t>(task)) - 1;
      keep_best(logprobs, given.scores[index], static_cast<std::int32_t>(task) - *group,
                std::span(state->found).subspan(index * most, most));
    }
  });
  runtime.issue([most, groups, state, rows = static_cast<std::int32_t*>(out.rows.data),
                 ids = static_cast<std::int32_t*>(out.ids.data),
                 scores = static_cast<float*>(out.scores.data)](Worker& worker) {
    for (std::int64_t task; (task = worker.take()) < groups;) {
      const auto group = static_cast<std::size_t>(task);
      const auto first = static_cast<std::size_t>(state->beams.groups[group]) * most,
                 last = static_cast<std::size_t>(state->beams.groups[group + 1]) * most;
      const auto own = std::span(state->found).subspan(first, last - first);
      std::ranges::sort(own, is_better);
      for (std::size_t i = 0; i < most; ++i) {
        const Candidate best = i < own.size() ? own[i] : Candidate{};
        rows[group * most + i] = best.row;
        ids[group * most + i] = best.id;
        scores[group * most + i] = best.score;
      }
    }
  });
  return out;
}

}  // namespace vllmlite::cpu
