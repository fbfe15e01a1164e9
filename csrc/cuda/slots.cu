// Per-slot state that is kept between steps: block tables, sampling parameters, counts of ids.
#include <cmath>
#include <limits>
#include <string>

#include "cuda/batch.hpp"
#include "cuda/kernel.cuh"

namespace vllmlite::cuda {

constexpr std::size_t kCountersOfSlot = 256;  // thread blocks of the decoding kernel that a row may have

Slots::Slots(Runtime& the_runtime, const SlotSpec& spec) : SlotSpec(spec), runtime(the_runtime) {
  if (std::int64_t{max_slots} * max_blocks > std::numeric_limits<std::int32_t>::max())
    throw std::invalid_argument("block tables of " + std::to_string(max_slots) + " slots for " +
                                std::to_string(max_blocks) + " blocks each are more than 32 bits count");
  block_table = runtime.make({max_slots, max_blocks}, DType::int32);
  last_id = runtime.make({max_slots}, DType::int32);
  states = runtime.make({max_slots, static_cast<std::int64_t>(sizeof(SlotState))}, DType::uint8);
  needs.resize(static_cast<std::size_t>(max_slots));
  owned_.resize(static_cast<std::size_t>(max_slots));
  const DeviceGuard guard(runtime.device());
  (void)runtime.counters(static_cast<std::size_t>(max_slots) *
                         kCountersOfSlot);  // allocated before any graph needs them
  for (const Tensor* tensor : {&block_table, &last_id, &states})
    if (tensor->data != nullptr)
      VLLMLITE_CUDA_CHECK(cudaMemsetAsync, tensor->data, 0, tensor->bytes(), runtime.stream());
}

static __global__ void count_ids_kernel(const std::int32_t* ids, int size, std::int32_t* counts) {
  wait_for_previous();
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < size;
       i += static_cast<int>(gridDim.x * blockDim.x))
    atomicAdd(counts + ids[i], 1);
}

static __global__ void mark_ids_kernel(const std::int32_t* ids, int size, std::uint8_t* marks) {
  wait_for_previous();
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < size;
       i += static_cast<int>(gridDim.x * blockDim.x))
    marks[ids[i]] = 1;
}

template <typename Element>
static Tensor uploaded(Runtime& runtime, const std::vector<Element>& values, DType dtype) {
  Tensor tensor = runtime.make({static_cast<std::int64_t>(values.size())}, dtype);
  runtime.upload(tensor.data, values.data(), tensor.bytes());
  return tensor;
}

void Slots::set(int slot, const SlotParams& params) {
  check_params(slot, params);
  const DeviceGuard guard(runtime.device());
  std::vector<Tensor> owned;
  SlotState state{};
  state.top_p = params.top_p;
  state.seed = params.seed;
  state.temperature = params.temperature;
  state.log_min_p = static_cast<float>(std::log(params.min_p));
  state.repetition_penalty = params.repetition_penalty;
  state.presence_penalty = params.presence_penalty;
  state.frequency_penalty = params.frequency_penalty;
  state.top_k = params.top_k;
  if (params.penalised()) {
    owned.push_back(runtime.make({vocab_size}, DType::int32));
    owned.push_back(runtime.make({vocab_size}, DType::uint8));
    for (const Tensor& tensor : owned)
      VLLMLITE_CUDA_CHECK(cudaMemsetAsync, tensor.data, 0, tensor.bytes(), runtime.stream());
    state.counts = static_cast<std::int32_t*>(owned[0].data);
    state.in_prompt = static_cast<std::uint8_t*>(owned[1].data);
    if (!params.output_ids.empty()) {
      const Tensor ids = uploaded(runtime, params.output_ids, DType::int32);
      launch(runtime, count_ids_kernel, blocks_for(ids.size(), 256), 256, 0, static_cast<const std::int32_t*>(ids.data),
             static_cast<int>(ids.size()), state.counts);
    }
    if (!params.prompt_ids.empty()) {
      const Tensor ids = uploaded(runtime, params.prompt_ids, DType::int32);
      launch(runtime, mark_ids_kernel, blocks_for(ids.size(), 256), 256, 0, static_cast<const std::int32_t*>(ids.data),
             static_cast<int>(ids.size()), state.in_prompt);
    }
  }
  if (!params.logit_bias.empty()) {
    std::vector<std::int32_t> ids;
    std::vector<float> biases;
    for (const auto& [id, bias] : params.logit_bias) {
      ids.push_back(id);
      biases.push_back(bias);
    }
    owned.push_back(uploaded(runtime, ids, DType::int32));
    state.bias_ids = static_cast<const std::int32_t*>(owned.back().data);
    owned.push_back(uploaded(runtime, biases, DType::float32));
    state.biases = static_cast<const float*>(owned.back().data);
    state.bias_count = static_cast<std::int32_t>(ids.size());
  }
  needs[static_cast<std::size_t>(slot)] =
      (params.temperature > 0 ? kDrawing : 0U) | (params.penalised() || !params.logit_bias.empty() ? kEditing : 0U);
  runtime.upload(static_cast<SlotState*>(states.data) + slot, &state, sizeof state);
  owned_[static_cast<std::size_t>(slot)] = std::move(owned);
}

void Slots::append_blocks(std::span<const std::int32_t> slot_ids, std::span<const std::int32_t> columns,
                          std::span<const std::int32_t> blocks) {
  check_blocks(slot_ids, columns, blocks);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    appended.push_back(slot_ids[i] * max_blocks + columns[i]);
    appended.push_back(blocks[i]);
  }
}

}  // namespace vllmlite::cuda
