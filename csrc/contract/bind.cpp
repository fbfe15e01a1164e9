#include "contract/bind.hpp"

#include <algorithm>
#include <iterator>
#include <limits>
#include <stdexcept>

#include "tensor/checks.hpp"

namespace vllmlite {

namespace py = pybind11;

namespace {

template <typename T>
std::vector<T> values(const py::handle& source, const char* name) {
  const Array<T> array(py::object(source.attr(name)));
  return {array.data(), array.data() + array.size()};
}

}  // namespace

SlotSpec slot_spec(const py::object& given) {
  const auto value = [&](const char* name) { return given.attr(name).cast<std::int64_t>(); };
  const auto small = [&](const char* name) {
    check_index(name, value(name), std::numeric_limits<int>::max());
    return static_cast<int>(value(name));
  };
  return {small("max_slots"), small("max_blocks"), small("max_context"), small("vocab_size"), value("num_blocks")};
}

SlotParams slot_params(const py::object& given) {
  SlotParams params;
  params.temperature = given.attr("temperature").cast<float>();
  params.top_k = given.attr("top_k").cast<int>();
  params.top_p = given.attr("top_p").cast<double>();
  params.min_p = given.attr("min_p").cast<double>();
  params.repetition_penalty = given.attr("repetition_penalty").cast<float>();
  params.presence_penalty = given.attr("presence_penalty").cast<float>();
  params.frequency_penalty = given.attr("frequency_penalty").cast<float>();
  params.seed = given.attr("seed").cast<std::uint64_t>();
  params.logit_bias = given.attr("logit_bias").cast<std::vector<std::pair<std::int32_t, float>>>();
  params.prompt_ids = values<std::int32_t>(given, "prompt_ids");
  params.output_ids = values<std::int32_t>(given, "output_ids");
  return params;
}

CacheSpec cache_spec(const py::object& given) {
  const auto size = [&](const char* name) { return given.attr(name).cast<int>(); };
  const auto [element, head_scales] = cache_type_from_name(given.attr("dtype").cast<std::string>());
  return {size("num_layers"),
          size("num_kv_heads"),
          size("head_dim"),
          size("block_size"),
          element,
          head_scales,
          given.attr("scales").cast<std::vector<std::pair<float, float>>>()};
}

HostBatch host_batch(const py::object& given) {
  HostBatch batch;
  batch.num_tokens = given.attr("num_tokens").cast<int>();
  batch.num_rows = given.attr("num_rows").cast<int>();
  batch.max_context = given.attr("max_context").cast<int>();
  batch.num_logprobs = given.attr("num_logprobs").cast<int>();
  batch.token_ids = values<std::int32_t>(given, "token_ids");
  batch.positions = values<std::int32_t>(given, "positions");
  batch.query_start_loc = values<std::int32_t>(given, "query_start_loc");
  batch.slot_ids = values<std::int32_t>(given, "slots");
  batch.context_lens = values<std::int32_t>(given, "context_lens");
  batch.logits_rows = values<std::int32_t>(given, "logits_rows");
  batch.sample_slots = values<std::int32_t>(given, "sample_slots");
  batch.sample_positions = values<std::int64_t>(given, "sample_positions");
  if (!given.attr("mask_rows").is_none() && !given.attr("bitmask").is_none()) {
    batch.mask_rows = values<std::int32_t>(given, "mask_rows");
    batch.bitmask = values<std::int32_t>(given, "bitmask");
  }
  if (!given.attr("adapters").is_none()) batch.adapters = values<std::int32_t>(given, "adapters");
  return batch;
}

BeamRows beam_rows(const Array<std::int32_t>& rows, const Array<std::int32_t>& groups, const Array<float>& scores,
                   const Array<float>& temperatures) {
  const auto copied = [](const auto& array) { return std::vector(view(array).begin(), view(array).end()); };
  return {copied(rows), copied(groups), copied(scores), copied(temperatures)};
}

Activation activation_of(const std::string& name, bool gated) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu" && !gated) return Activation::relu;
  if (name == "clamped_swiglu" && gated) return Activation::clamped_swiglu;
  throw std::invalid_argument("activation " + name + ": there are silu, gelu" +
                              (gated ? ", gelu_tanh and clamped_swiglu" : ", gelu_tanh and relu"));
}

std::optional<Rotation> rotation(const std::optional<Tensor>& cos_sin, int rotary_dim, bool interleaved) {
  if (!cos_sin) return std::nullopt;
  return Rotation{*cos_sin, rotary_dim, interleaved};
}

std::vector<Tensor> listed(const Logprobs& found) { return {found.chosen, found.rank, found.top_ids, found.top}; }

std::vector<Tensor> listed(const Sampled& found) {
  std::vector<Tensor> tensors{found.ids};
  if (found.logprobs) std::ranges::copy(listed(*found.logprobs), std::back_inserter(tensors));
  return tensors;
}

std::vector<Tensor> listed(const Continuations& found) { return {found.rows, found.ids, found.scores}; }

std::span<std::byte> host_rows(const py::array& rows, std::size_t bytes) {
  const bool contiguous = (rows.flags() & py::array::c_style) != 0;
  if (rows.ndim() != 2 || rows.itemsize() != 1 || static_cast<std::size_t>(rows.shape(1)) != bytes || !contiguous ||
      !rows.writeable())
    throw std::invalid_argument("blocks in host memory are writable rows of " + std::to_string(bytes) + " bytes");
  return {static_cast<std::byte*>(const_cast<void*>(rows.data())), static_cast<std::size_t>(rows.nbytes())};
}

const void* bytes_for(const Tensor& tensor, const py::array& bytes) {
  if (checked_bytes(tensor.shape, tensor.dtype) != static_cast<std::size_t>(bytes.nbytes()) ||
      (bytes.flags() & py::array::c_style) == 0)
    throw std::invalid_argument("expected " + describe(tensor) + " in contiguous memory, not " +
                                std::to_string(bytes.nbytes()) + " bytes");
  return bytes.data();
}

}  // namespace vllmlite
