// Choosing token ids from logits; each row is one task.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/ops.hpp"

namespace vllmlite::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::uint64_t mix(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return z ^ (z >> 31);
}

// The same bits as uniform() in vllmlite/backends/sampling.py.
double uniform(std::uint64_t seed, std::int64_t position) {
  constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15U;
  return static_cast<double>(mix(mix(seed + kGolden) + (static_cast<std::uint64_t>(position) + 1) * kGolden) >> 40) *
         0x1p-24;
}

double total(std::span<const float> weights) {
  double sum = 0;
  for (const float weight : weights) sum += weight;
  return sum;
}

// ---- Bias, mask and penalties, in this order

// The bitmask of the ids allowed at a sampled position, or null if all are.
const std::int32_t* mask_of(const Batch& batch, std::size_t sampled, std::size_t vocab_size) {
  if (batch.mask_places.empty() || batch.mask_places[sampled] < 0) return nullptr;
  return batch.bitmask.data() + static_cast<std::size_t>(batch.mask_places[sampled]) * ((vocab_size + 31) / 32);
}

}  // namespace

void edit(std::span<float> logits, const Batch& batch, std::size_t sampled) {
  const auto slot = static_cast<std::size_t>(batch.sample_slots[sampled]);
  const SlotParams& params = batch.slots->params[slot];
  for (const auto& [id, bias] : params.logit_bias) logits[static_cast<std::size_t>(id)] += bias;
  if (const std::int32_t* bits = mask_of(batch, sampled, logits.size()))
    for (std::size_t id = 0; id < logits.size(); ++id)
      if ((static_cast<std::uint32_t>(bits[id / 32]) >> id % 32 & 1) == 0) logits[id] = -kInfinity;
  if (!params.penalised()) return;
  const std::vector<std::int32_t>& counts = batch.slots->counts[slot];
  const std::vector<std::uint8_t>& in_prompt = batch.slots->in_prompt[slot];
  const std::span<const std::int32_t> drafts = batch.drafts(sampled);
  for (std::size_t id = 0; id < logits.size(); ++id) {
    float& logit = logits[id];
    const auto count = counts[id] + std::ranges::count(drafts, static_cast<std::int32_t>(id));
    if (in_prompt[id] != 0 || count > 0)
      logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    if (count > 0) logit = logit - params.frequency_penalty * static_cast<float>(count) - params.presence_penalty;
  }
}

namespace {

// ---- Drawing: every filter becomes a minimum logit, so that equal logits are kept or dropped together

// The smallest logit of the nucleus: the smallest set of the largest weights whose sum reaches `aim`. Instead of
// sorting everything, it bins the logits and sorts only the bin that holds the cut.
float nucleus(std::span<const float> logits, std::span<const float> weights, float least, float largest, float factor,
              double aim, float* scratch) {
  constexpr int kBins = 1024;
  constexpr float kBinsPerUnit = 32;  // of the exponent
  double sums[kBins] = {};
  const auto bin_of = [&](float logit) {
    return static_cast<int>(std::min((largest - logit) * factor * kBinsPerUnit, static_cast<float>(kBins - 1)));
  };
  for (std::size_t id = 0; id < logits.size(); ++id)
    if (weights[id] > 0) sums[bin_of(logits[id])] += weights[id];
  double before = 0;
  int bin = 0;
  for (; bin < kBins - 1 && before + sums[bin] < aim; ++bin) before += sums[bin];
  std::size_t count = 0;
  for (std::size_t id = 0; id < logits.size(); ++id)
    if (weights[id] > 0 && bin_of(logits[id]) == bin) scratch[count++] = logits[id];
  std::sort(scratch, scratch + count, std::greater<>());
  float cut = least;
  for (std::size_t i = 0; i < count && before < aim; ++i) {
    cut = scratch[i];
    before += std::exp(static_cast<double>(scratch[i] - largest) * static_cast<double>(factor));
  }
  return std::max(cut, least);
}

struct Weighed {
  std::int64_t best;  // the id of the largest logit
  double sum;         // of the weights; 0: `best` has all the probability, and there are no weights
};

// Sets `weights` to the probabilities, times a constant, of the ids that the filters of `params` keep.
Weighed weigh(const Kernels& kernels, std::span<const float> logits, const SlotParams& params, std::span<float> weights,
              float* scratch) {
  const auto size = static_cast<std::int64_t>(logits.size());
  const std::int64_t best = kernels.argmax(logits.data(), size);
  const float largest = logits[static_cast<std::size_t>(best)];
  if (params.temperature <= 0 || !std::isfinite(largest)) return {best, 0};
  const float factor = std::min(1 / params.temperature, 1e30F);
  float least = -kInfinity;
  if (params.min_p > 0) least = largest + static_cast<float>(std::log(params.min_p)) / factor;
  if (params.top_k > 0 && params.top_k < size) {
    float* end = std::copy_if(logits.begin(), logits.end(), scratch, [&](float logit) { return logit >= least; });
    float* kth = scratch + params.top_k - 1;
    if (kth < end) {
      std::nth_element(scratch, kth, end, std::greater<>());
      least = *kth;
    }
  }
  kernels.weights(logits.data(), largest, factor, least, weights.data(), size);
  double sum = total(weights);
  if (params.top_p < 1) {
    least = nucleus(logits, weights, least, largest, factor, sum * params.top_p, scratch);
    kernels.weights(logits.data(), largest, factor, least, weights.data(), size);
    sum = total(weights);
  }
  return {best, sum};
}

std::int64_t draw(const Weighed& weighed, std::span<const float> weights, double number) {
  const double aim = number * weighed.sum;
  double cumulative = 0;
  for (std::size_t id = 0; weighed.sum > 0 && id < weights.size(); ++id) {
    cumulative += weights[id];
    if (cumulative > aim) return static_cast<std::int64_t>(id);
  }
  return weighed.best;
}

// ---- Log-probabilities

struct LogprobRow {
  float* chosen;
  std::int32_t* rank;
  std::int32_t* top_ids;
  float* top;
  int k;
};

struct LogprobRows {
  explicit LogprobRows(const Logprobs& tensors)
      : first{static_cast<float*>(tensors.chosen.data), static_cast<std::int32_t*>(tensors.rank.data),
              static_cast<std::int32_t*>(tensors.top_ids.data), static_cast<float*>(tensors.top.data),
              static_cast<int>(tensors.top.shape[1])} {}

  LogprobRow operator[](std::int64_t row) const {
    return {first.chosen + row, first.rank + row, first.top_ids + row * first.k, first.top + row * first.k, first.k};
  }

  LogprobRow first;
};

void find_logprobs(const Kernels& kernels, std::span<const float> logits, std::int32_t id, const LogprobRow& out,
                   std::span<float> scratch) {
  const auto size = static_cast<std::int64_t>(logits.size());
  const auto logit_of = [&](std::int32_t at) {
    const float logit = logits[static_cast<std::size_t>(at)];
    return std::isnan(logit) ? -kInfinity : logit;
  };
  const float largest = logit_of(static_cast<std::int32_t>(kernels.argmax(logits.data(), size)));
  double log_sum = static_cast<double>(largest);
  if (std::isfinite(largest)) {
    kernels.weights(logits.data(), largest, 1, -kInfinity, scratch.data(), size);
    log_sum += std::log(total(scratch));
  }
  const auto logprob = [&](float logit) {
    if (std::isinf(logit)) return logit > 0 ? 0 : logit;
    return static_cast<float>(static_cast<double>(logit) - log_sum);
  };
  const float own = logit_of(id);
  std::int32_t above = 0;
  for (std::int32_t other = 0; other < static_cast<std::int32_t>(size); ++other) {
    const float logit = logit_of(other);
    above += static_cast<std::int32_t>(logit > own) + static_cast<std::int32_t>(logit == own && other < id);
  }
  *out.chosen = logprob(own);
  *out.rank = above + 1;
  if (out.k == 0) return;

  // Finds the k-th largest value, then takes all above it and as many equal to it as are needed, by ascending id.
  for (std::int32_t at = 0; at < static_cast<std::int32_t>(size); ++at)
    scratch[static_cast<std::size_t>(at)] = logit_of(at);
  float* const kth = scratch.data() + out.k - 1;
  std::nth_element(scratch.data(), kth, scratch.data() + size, std::greater<>());
  const float cut = *kth;
  auto equals = out.k - std::count_if(scratch.data(), kth, [&](float logit) { return logit > cut; });
  int count = 0;
  for (std::int32_t other = 0; count < out.k; ++other) {
    const float logit = logit_of(other);
    if (logit > cut || (logit == cut && equals-- > 0)) out.top_ids[count++] = other;
  }
  std::stable_sort(out.top_ids, out.top_ids + out.k,
                   [&](std::int32_t a, std::int32_t b) { return logit_of(a) > logit_of(b); });
  for (int i = 0; i < out.k; ++i) out.top[i] = logprob(logit_of(out.top_ids[i]));
}

Logprobs make_logprobs(Runtime& runtime, std::int64_t rows, int k) {
  return {runtime.make({rows}, DType::float32), runtime.make({rows}, DType::int32),
          runtime.make({rows, k}, DType::int32), runtime.make({rows, k}, DType::float32)};
}

void check_logits(const Tensor& logits) {
  if (logits.dtype != DType::float32 || logits.shape.size() != 2 || logits.shape[1] == 0)
    throw std::invalid_argument("logits must be float32 [rows, vocabulary], not " + describe(logits));
}

}  // namespace

Logprobs logprobs(Runtime& runtime, const Tensor& logits, const Tensor& ids, int k) {
  check_logits(logits);
  const std::int64_t rows = logits.shape[0], size = logits.shape[1];
  if (ids.dtype != DType::int32 || ids.shape != std::vector<std::int64_t>{rows})
    throw std::invalid_argument("ids must be int32, one for each row of logits, not " + describe(ids));
  k = static_cast<int>(std::min<std::int64_t>(k, size));
  const Logprobs out = make_logprobs(runtime, rows, k);
  runtime.keep(logits);
  runtime.keep(ids);
  runtime.reserve_scratch(static_cast<std::size_t>(size) * sizeof(float));
  runtime.issue([&kernels = runtime.kernels(), from = static_cast<const float*>(logits.data), rows, size,
                 chosen = static_cast<const std::int32_t*>(ids.data), to = LogprobRows(out)](Worker& worker) {
    const auto width = static_cast<std::size_t>(size);
    const std::span scratch(reinterpret_cast<float*>(worker.scratch()), width);
    for (std::int64_t row; (row = worker.take()) < rows;)
      find_logprobs(kernels, {from + row * size, width}, chosen[row], to[row], scratch);
  });
  return out;
}

void check_logits(const Tensor& logits, const Batch& batch) {
  check_logits(logits);
  if (logits.shape[0] != static_cast<std::int64_t>(batch.sample_slots.size()) ||
      logits.shape[1] != batch.slots->vocab_size)
    throw std::invalid_argument("logits " + describe(logits.shape) + " do not fit the batch's " +
                                std::to_string(batch.sample_slots.size()) + " rows and " +
                                std::to_string(batch.slots->vocab_size) + " ids");
}

namespace {

// Returns the logits of a sampled position with bias, mask and penalties; where there are any, in `scratch`.
std::span<const float> edited(std::span<const float> logits, const Batch& batch, std::size_t sampled,
                              std::span<float> scratch) {
  const SlotParams& params = batch.slots->params[static_cast<std::size_t>(batch.sample_slots[sampled])];
  if (params.logit_bias.empty() && !params.penalised() && mask_of(batch, sampled, logits.size()) == nullptr)
    return logits;
  std::ranges::copy(logits, scratch.begin());
  edit(scratch, batch, sampled);
  return scratch;
}

}  // namespace

Sampled sample(Runtime& runtime, const Tensor& logits, const std::shared_ptr<Batch>& batch) {
  check_logits(logits, *batch);
  const std::int64_t rows = logits.shape[0], size = logits.shape[1];
  Sampled out{runtime.make({rows}, DType::int32), std::nullopt};
  const bool wanted = batch->num_logprobs >= 0;
  std::optional<LogprobRows> tops;
  if (wanted) {
    out.logprobs = make_logprobs(runtime, rows, static_cast<int>(std::min<std::int64_t>(batch->num_logprobs, size)));
    tops.emplace(*out.logprobs);
  }
  runtime.keep(logits);
  // Edited logits, their weights, and scratch memory for selection.
  runtime.reserve_scratch(3 * static_cast<std::size_t>(size) * sizeof(float));
  runtime.issue([&kernels = runtime.kernels(), from = static_cast<const float*>(logits.data), rows, size, tops, batch,
                 ids = static_cast<std::int32_t*>(out.ids.data)](Worker& worker) {
    const auto width = static_cast<std::size_t>(size);
    auto* const memory = reinterpret_cast<float*>(worker.scratch());
    const std::span weights(memory + width, width);
    for (std::int64_t row; (row = worker.take()) < rows;) {
      const auto index = static_cast<std::size_t>(row);
      const SlotParams& params = batch->slots->params[static_cast<std::size_t>(batch->sample_slots[index])];
      const std::span original(from + row * size, width);
      const std::span used = edited(original, *batch, index, {memory, width});
      const Weighed weighed = weigh(kernels, used, params, weights, memory + 2 * width);
      const double number = params.temperature > 0 ? uniform(params.seed, batch->sample_positions[index]) : 0;
      ids[row] = static_cast<std::int32_t>(draw(weighed, weights, number));
      if (tops) find_logprobs(kernels, original, ids[row], (*tops)[row], weights);
    }
  });
  return out;
}

Tensor probabilities(Runtime& runtime, const Tensor& logits, const std::shared_ptr<Batch>& batch) {
  check_logits(logits, *batch);
  const std::int64_t rows = logits.shape[0], size = logits.shape[1];
  const Tensor out = runtime.make({rows, size}, DType::float32);
  runtime.keep(logits);
  runtime.reserve_scratch(2 * static_cast<std::size_t>(size) * sizeof(float));
  runtime.issue([&kernels = runtime.kernels(), from = static_cast<const float*>(logits.data),
                 to = static_cast<float*>(out.data), rows, size, batch](Worker& worker) {
    const auto width = static_cast<std::size_t>(size);
    auto* const memory = reinterpret_cast<float*>(worker.scratch());
    for (std::int64_t row; (row = worker.take()) < rows;) {
      const auto index = static_cast<std::size_t>(row);
      const SlotParams& params = batch->slots->params[static_cast<std::size_t>(batch->sample_slots[index])];
      const std::span used = edited({from + row * size, width}, *batch, index, {memory, width});
      const std::span found(to + row * size, width);
      const auto [best, sum] = weigh(kernels, used, params, found, memory + width);
      if (sum > 0) {
        for (float& weight : found) weight = static_cast<float>(weight / sum);
      } else {
        std::ranges::fill(found, 0.0F);
        found[static_cast<std::size_t>(best)] = 1;
      }
    }
  });
  return out;
}

Tensor accept(Runtime& runtime, const Tensor& ids, const std::shared_ptr<Batch>& batch) {
  const auto count = static_cast<std::int64_t>(batch->sample_slots.size());
  if (ids.dtype != DType::int32 || ids.shape != std::vector<std::int64_t>{count})
    throw std::invalid_argument("ids must be int32 [" + std::to_string(count) + "], not " + describe(ids));
  const Tensor out = runtime.make({count}, DType::int32);
  runtime.keep(ids);
  runtime.issue([from = static_cast<const std::int32_t*>(ids.data), to = static_cast<std::int32_t*>(out.data), batch,
                 count](Worker& worker) {
    if (worker.take() != 0) return;
    Slots& slots = *batch->slots;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto index = static_cast<std::size_t>(i);
      const std::int32_t token = batch->logits_rows[index];
      to[i] = token == batch->first_sampled[index] ||
              (to[i - 1] != 0 && from[i - 1] == batch->token_ids[static_cast<std::size_t>(token)]);
      if (to[i] == 0) continue;
      const auto slot = static_cast<std::size_t>(batch->sample_slots[index]);
      slots.last_id[slot] = from[i];
      if (slots.params[slot].penalised()) ++slots.counts[slot][static_cast<std::size_t>(from[i])];
    }
  });
  return out;
}

}  // namespace vllmlite::cpu
