// Mixture of experts: tokens are routed and sorted by expert, each expert multiplies its tokens, and the results of a
// token are added in the order of its experts. All of this runs on the device, without waiting for the host.
#include <algorithm>

#include "cuda/moe.hpp"
#include "cuda/select.cuh"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

constexpr unsigned kThreads = 256, kSortThreads = 1024;
constexpr int kMostExperts = 4096;  // limited by the shared memory in which a block counts them
constexpr int kFewTokens = 64;      // up to this many tokens are routed and sorted by one block

struct Routing {
  int tokens, experts, top_k;
  bool renormalise;
  std::int32_t* chosen;  // [tokens, top_k], ascending
  float* weights;        // [tokens, top_k]
};

struct Sorting {
  int pairs, experts, rows_of_group, num_groups;
  const std::int32_t* chosen;
  std::int32_t* sorted;
  Group* groups;
};

// Chooses a token's top_k experts of the largest logits (the first among equals), and their softmax over all experts.
// Called by one whole warp.
template <typename T>
__device__ __forceinline__ void route(const T* all_logits, const Routing& routing, int token) {
  const int lane = static_cast<int>(threadIdx.x % 32), count = routing.experts;
  const T* logits = all_logits + static_cast<std::int64_t>(token) * count;
  std::uint64_t least = 0;
  float most = 0, total = 0;
  for (int choice = 0; choice < routing.top_k; ++choice) {
    std::uint64_t next = 0;
    for (int expert = lane; expert < count; expert += 32) {
      const std::uint64_t rank = ranked(to_float(logits[expert]), expert);
      if ((choice == 0 || rank < least) && rank > next) next = rank;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      const std::uint64_t other = __shfl_xor_sync(kAll, next, offset);
      if (other > next) next = other;
    }
    least = next;
    if (choice == 0) most = to_float(logits[0xffffffffU - static_cast<std::uint32_t>(least)]);
  }
  for (int expert = lane; expert < count; expert += 32) {
    const float logit = to_float(logits[expert]);
    if (!routing.renormalise || ranked(logit, expert) >= least) total += expf(logit - most);
  }
  total = warp_sum(total);
  std::int64_t at = static_cast<std::int64_t>(token) * routing.top_k;
  for (int base = 0; base < count; base += 32) {
    const int expert = base + lane;
    const float logit = expert < count ? to_float(logits[expert]) : 0;
    const bool taken = expert < count && ranked(logit, expert) >= least;
    const unsigned mask = __ballot_sync(kAll, taken);
    if (taken) {
      const std::int64_t place = at + __popc(mask & ((1U << lane) - 1));
      routing.chosen[place] = expert;
      routing.weights[place] = expf(logit - most) / total;
    }
    at += __popc(mask);
  }
}

// Sorts pairs by expert and cuts them into groups. Called by one block; `places` is shared memory for an int per
// expert.
__device__ __forceinline__ void sort(const Sorting& sorting, std::int32_t* places) {
  __shared__ int num_groups;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % 32;
  for (int expert = thread; expert < sorting.experts; expert += threads) places[expert] = 0;
  __syncthreads();
  for (int pair = thread; pair < sorting.pairs; pair += threads) atomicAdd(places + sorting.chosen[pair], 1);
  __syncthreads();
  if (thread < 32) {
    int first = 0, first_group = 0;
    for (int base = 0; base < sorting.experts; base += 32) {
      const int expert = base + lane, count = expert < sorting.experts ? places[expert] : 0;
      const int groups = (count + sorting.rows_of_group - 1) / sorting.rows_of_group;
      int places_up_to = count, groups_up_to = groups;
      for (int offset = 1; offset < 32; offset *= 2) {
        const int before = __shfl_up_sync(kAll, places_up_to, offset);
        const int groups_before = __shfl_up_sync(kAll, groups_up_to, offset);
        if (lane >= offset) {
          places_up_to += before;
          groups_up_to += groups_before;
        }
      }
      const int own = first + places_up_to - count;
      Group* to = sorting.groups + first_group + groups_up_to - groups;
      for (int i = 0; i < groups; ++i) {
        const int done = i * sorting.rows_of_group;
        to[i] = {expert, own + done, min(sorting.rows_of_group, count - done), 0};
      }
      if (expert < sorting.experts) places[expert] = own;
      first += __shfl_sync(kAll, places_up_to, 31);
      first_group += __shfl_sync(kAll, groups_up_to, 31);
    }
    if (lane == 0) num_groups = first_group;
  }
  __syncthreads();
  for (int i = num_groups + thread; i < sorting.num_groups; i += threads) sorting.groups[i] = {-1, 0, 0, 0};
  // The order within an expert is undefined: a row's result does not depend on the other rows of its group.
  for (int pair = thread; pair < sorting.pairs; pair += threads)
    sorting.sorted[atomicAdd(places + sorting.chosen[pair], 1)] = pair;
}

template <typename T>
static __global__ void route_kernel(const T* logits, const __grid_constant__ Routing routing) {
  let_next_begin();
  wait_for_previous();
  const int token = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / 32);
  if (token < routing.tokens) route(logits, routing, token);
}

static __global__ __launch_bounds__(kSortThreads) void sort_kernel(const __grid_constant__ Sorting sorting) {
  extern __shared__ std::int32_t places[];
  let_next_begin();
  wait_for_previous();
  sort(sorting, places);
}

template <typename T>
static __global__ __launch_bounds__(kSortThreads) void route_and_sort_kernel(const T* logits,
                                                                             const __grid_constant__ Routing routing,
                                                                             const __grid_constant__ Sorting sorting) {
  extern __shared__ std::int32_t places[];
  let_next_begin();
  wait_for_previous();
  for (int token = static_cast<int>(threadIdx.x / 32); token < routing.tokens;
       token += static_cast<int>(blockDim.x / 32))
    route(logits, routing, token);
  __syncthreads();
  sort(sorting, places);
}

// ---- The weighted sum of a token's results. Grid: (tokens, blocks of kThreads packs), one pack per thread

template <typename T, int kSize>
static __global__ void combine_kernel(const T* results, const float* weights, T* out, int top_k, int packs) {
  using P = Pack<T, kSize>;
  let_next_begin();
  wait_for_previous();
  const std::int64_t token = blockIdx.x;
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= packs) return;
  float sums[kSize] = {};
  for (std::int64_t pair = token * top_k; pair < (token + 1) * top_k; ++pair) {
    const P result = reinterpret_cast<const P*>(results)[pair * packs + column];
    const float weight = weights[pair];
#pragma unroll
    for (int j = 0; j < kSize; ++j) sums[j] = fmaf(weight, to_float(result.at[j]), sums[j]);
  }
  P sum;
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum.at[j] = from_float<T>(sums[j]);
  reinterpret_cast<P*>(out)[token * packs + column] = sum;
}

template <typename T>
static void combine(const Runtime& runtime, const Tensor& results, const Tensor& weights, const Tensor& out) {
  const std::int64_t tokens = out.shape[0], hidden = out.shape[1];
  const auto go = [&](auto* kernel, std::int64_t packs) {
    const dim3 grid(static_cast<unsigned>(tokens), blocks_for(packs, kThreads));
    launch(runtime, kernel, grid, kThreads, 0, static_cast<const T*>(results.data),
           static_cast<const float*>(weights.data), static_cast<T*>(out.data),
           static_cast<int>(results.shape[0] / tokens), static_cast<int>(packs));
  };
  if (hidden % kPack<T> == 0)
    go(combine_kernel<T, kPack<T>>, hidden / kPack<T>);
  else
    go(combine_kernel<T, 1>, hidden);
}

// ---- The op

// Whether weights are packed in one form, which kernels multiply; experts' are if both of each are.
static bool alike(const std::vector<LinearWeight>& weights) {
  const auto parts_alike = [&](const auto& first, auto same) {
    using Parts = std::remove_cvref_t<decltype(first)>;
    return first.size() == 1 && std::ranges::all_of(weights, [&](const LinearWeight& weight) {
             const auto* parts = std::get_if<Parts>(&weight.weight);
             return parts != nullptr && parts->size() == 1 && same(first[0], parts->at(0));
           });
  };
  if (const auto* grouped = std::get_if<std::vector<GroupedRows>>(&weights[0].weight))
    return parts_alike(*grouped, [](const GroupedRows& one, const GroupedRows& other) {
      return static_cast<const GroupedForm&>(one) == other && one.rows % 2 == 0;
    });
  if (const auto* bytes = std::get_if<std::vector<ByteRows>>(&weights[0].weight))
    return parts_alike(*bytes, [](const ByteRows& one, const ByteRows& other) {
      const ByteInputs a = one.inputs, b = other.inputs;
      return one.rows == other.rows && a.integers == b.integers && a.blocks == b.blocks && a.symmetric == b.symmetric &&
             a.with_sums == b.with_sums && (a.constant != 0) == (b.constant != 0);
    });
  return false;
}

static ExpertWeights collect(Runtime& runtime, const std::vector<LinearWeight>& weights,
                             const std::vector<std::int64_t>& shape, bool packed) {
  ExpertWeights made;
  std::vector<const void*> elements, scales, zeros, orders;
  std::vector<ByteConstant> constants;
  const auto add = [&](const auto& rows) {
    if (elements.empty()) made.first = rows;
    made.owned.insert(made.owned.end(), {rows.weight, rows.scales});
    elements.push_back(rows.weight.data);
    scales.push_back(rows.scales.data);
  };
  for (const LinearWeight& weight : weights) {
    if (weight.out() != shape[0] || weight.in() != shape[1])
      throw std::invalid_argument("an expert's weight must be [" + std::to_string(shape[0]) + ", " +
                                  std::to_string(shape[1]) + "], not [" + std::to_string(weight.out()) + ", " +
                                  std::to_string(weight.in()) + "]");
    if (weight.bias) throw std::invalid_argument("an expert's weight has a bias");
    if (!packed) {
      const Tensor floats = weight.matrix(runtime);
      check_dtype(floats, runtime.dtype(), "an expert's weight");
      if (elements.empty()) made.first = floats;
      made.owned.push_back(floats);
      elements.push_back(floats.data);
    } else if (const auto* grouped = std::get_if<std::vector<GroupedRows>>(&weight.weight)) {
      const GroupedRows& rows = grouped->at(0);
      add(rows);
      orders.push_back(rows.order ? rows.order->data : nullptr);
      if (rows.order) made.owned.push_back(*rows.order);
    } else {
      const ByteRows& rows = std::get<std::vector<ByteRows>>(weight.weight).at(0);
      add(rows);
      if (rows.zeros) {
        zeros.push_back(rows.zeros->data);
        made.owned.push_back(*rows.zeros);
      }
      if (rows.inputs.constant != 0) constants.push_back({rows.inputs.constant, rows.inputs.zero});
    }
  }
  const auto table = [&](const auto& values) {
    static_assert(sizeof values[0] == 8);
    if (values.empty()) return Tensor{};
    Tensor tensor = runtime.make({static_cast<std::int64_t>(values.size())}, DType::int64);
    runtime.upload(tensor.data, values.data(), tensor.bytes());
    return tensor;
  };
  made.weights = table(elements);
  made.scales = table(scales);
  made.zeros = table(zeros);
  made.orders = table(orders);
  if (!constants.empty()) made.constants = table(constants);
  return made;
}

std::shared_ptr<Experts> make_experts(Runtime& runtime, const std::vector<LinearWeight>& gate_up,
                                      const std::vector<LinearWeight>& down) {
  if (gate_up.empty() || gate_up.size() != down.size() || gate_up.size() > kMostExperts)
    throw std::invalid_argument("a mixture of " + std::to_string(gate_up.size()) + " and " +
                                std::to_string(down.size()) + " weights: there are 1 to " +
                                std::to_string(kMostExperts) + " experts with two each");
  auto experts = std::make_shared<Experts>();
  const std::int64_t hidden = gate_up[0].in(), inner = down[0].in();
  const bool packed = gate_up[0].weight.index() == down[0].weight.index() && alike(gate_up) && alike(down);
  experts->gate_up = collect(runtime, gate_up, {2 * inner, hidden}, packed);
  experts->down = collect(runtime, down, {hidden, inner}, packed);
  experts->count = static_cast<int>(gate_up.size());
  experts->hidden = static_cast<int>(hidden);
  experts->inner = static_cast<int>(inner);
  experts->dtype = runtime.dtype();
  return experts;
}

static const void* const* addresses(const Tensor& tensor) { return static_cast<const void* const*>(tensor.data); }

// The product of packed weights with x, which has a row for each token if `first`, else for each sorted pair; the
// results are for sorted pairs if `first`, else for pairs by their number.
static Tensor multiply_packed(Runtime& runtime, const Mixture& mixture, const ExpertWeights& weights,
                              const Activations& activations, bool first, std::int64_t pairs) {
  ExpertProduct product{mixture, first, !first, nullptr, nullptr, addresses(weights.weights), 0, 0};
  product.w_scales = addresses(weights.scales);
  const auto results = [&](const auto& form) {
    product.n = form.rows;
    product.k = form.columns;
    Tensor made = runtime.make({pairs, form.rows}, runtime.dtype());
    product.y = made.data;
    return made;
  };
  if (const auto* form = std::get_if<GroupedRows>(&weights.first)) {
    Tensor y = results(*form);
    product.w_orders = addresses(weights.orders);
    product.x = std::get<Tensor>(activations).data;
    multiply_grouped_experts(runtime, product, *form);
    return y;
  }
  const auto& form = std::get<ByteRows>(weights.first);
  const auto quantised = [&]() -> ByteActivations {
    if (const auto* made = std::get_if<ByteActivations>(&activations)) return *made;
    const Tensor& x = std::get<Tensor>(activations);
    if (!weights.constants) return quantise_bytes(runtime, x, form.inputs);
    product.x_of_tokens = false;
    return quantise_bytes(runtime, x, form.inputs,
                          {mixture.pairs, mixture.experts, static_cast<const ByteConstant*>(weights.constants->data),
                           static_cast<int>(pairs), mixture.top_k, first});
  };
  const ByteActivations x = quantised();
  Tensor y = results(form);
  product.x = x.values.data;
  product.k = static_cast<int>(form.weight.shape[1]);
  product.x_scales = {static_cast<const float*>(x.scales.data), nullptr, static_cast<int>(x.scales.shape[1]),
                      static_cast<const ByteZero*>(x.zeros.data), nullptr};
  product.w_zeros = addresses(weights.zeros);
  multiply_byte_experts(runtime, product, form.inputs);
  return y;
}

// The results of all pairs, by the number of the pair.
static Tensor multiply(Runtime& runtime, const Mixture& mixture, const Experts& experts, Activation activation,
                       const Tensor& x, std::int64_t pairs) {
  if (experts.packed()) {
    const Tensor both = multiply_packed(runtime, mixture, experts.gate_up, x, true, pairs);
    LinearWeight feeds;
    const auto* bytes = std::get_if<ByteRows>(&experts.down.first);
    if (bytes != nullptr && !experts.down.constants) feeds.weight = std::vector{*bytes};
    const Activations inner = gated_activation(runtime, both, activation, &feeds);
    return multiply_packed(runtime, mixture, experts.down, inner, false, pairs);
  }
  const Tensor inner = runtime.make({pairs, experts.inner}, x.dtype);
  Tensor results = runtime.make({pairs, experts.hidden}, x.dtype);
  multiply_gated(runtime,
                 {mixture, true, false, x.data, inner.data, addresses(experts.gate_up.weights), experts.inner,
                  experts.hidden, activation},
                 x.dtype);
  multiply_experts(
      runtime,
      {mixture, false, true, inner.data, results.data, addresses(experts.down.weights), experts.hidden, experts.inner},
      x.dtype);
  return results;
}

Tensor moe(Runtime& runtime, const Tensor& x, const Tensor& router_logits, const Experts& experts, int top_k,
           bool renormalise, Activation activation) {
  check_rank(x, 2, "x of moe");
  const std::int64_t tokens = x.shape[0], pairs = tokens * top_k;
  check_shape(x, {tokens, experts.hidden}, "x of moe");
  check_dtype(x, experts.dtype, "x of moe");
  check_shape(router_logits, {tokens, experts.count}, "router logits of moe");
  check_dtype(router_logits, x.dtype, "router logits of moe");
  if (top_k < 1 || top_k > experts.count)
    throw std::invalid_argument("moe: top_k " + std::to_string(top_k) + " is not within 1 and the " +
                                std::to_string(experts.count) + " experts");
  const DeviceGuard guard(runtime.device());
  Tensor out = runtime.make(x.shape, x.dtype);
  if (out.bytes() == 0) return out;
  const int rows = rows_of_group(runtime, experts, pairs);
  // The largest possible number of groups: one partial group for each expert that was chosen.
  const std::int64_t num_groups = pairs / rows + std::min<std::int64_t>(pairs, experts.count);
  const Tensor chosen = runtime.make({pairs}, DType::int32), sorted = runtime.make({pairs}, DType::int32);
  const Tensor weights = runtime.make({pairs}, DType::float32);
  const Tensor groups = runtime.make({num_groups, static_cast<std::int64_t>(sizeof(Group))}, DType::uint8);
  const Routing routing{
      static_cast<int>(tokens),         experts.count, top_k, renormalise, static_cast<std::int32_t*>(chosen.data),
      static_cast<float*>(weights.data)};
  const Sorting sorting{static_cast<int>(pairs),         experts.count,  rows,
                        static_cast<int>(num_groups),    routing.chosen, static_cast<std::int32_t*>(sorted.data),
                        static_cast<Group*>(groups.data)};
  const std::size_t shared_bytes = static_cast<std::size_t>(experts.count) * sizeof(std::int32_t);
  with_float(x.dtype, [&](auto* pointer) {
    using T = Pointee<decltype(pointer)>;
    const auto* logits = static_cast<const T*>(router_logits.data);
    if (tokens <= kFewTokens) {
      launch(runtime, route_and_sort_kernel<T>, 1, kSortThreads, shared_bytes, logits, routing, sorting);
    } else {
      launch(runtime, route_kernel<T>, blocks_for(tokens * 32, kThreads), kThreads, 0, logits, routing);
      launch(runtime, sort_kernel, 1, kSortThreads, shared_bytes, sorting);
    }
  });
  const Mixture mixture{sorting.sorted, routing.chosen, sorting.groups, sorting.num_groups, rows, top_k};
  const Tensor results = multiply(runtime, mixture, experts, activation, x, pairs);
  with_float(x.dtype, [&](auto* pointer) { combine<Pointee<decltype(pointer)>>(runtime, results, weights, out); });
  return out;
}

}  // namespace vllmlite::cuda
