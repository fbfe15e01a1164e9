// The step between the q, k, v product and attention: norms of heads, rotation, writing keys and values to the cache.
#include "cuda/attention.hpp"
#include "cuda/cache.cuh"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

// Arguments of both kernels. The cache is that of one layer.
template <typename T, typename Cached>
struct Preparation {
  const T* qkv;  // [tokens, heads + 2 kv_heads, size]
  T* q;          // [tokens, heads, size]
  Cached* kv;
  float* head_scales;  // of a quantised cache; null: the layer's are key_scale and value_scale
  const float* cos_sin;
  const void *q_norm, *k_norm;
  const float* factors;  // [tokens, 2]: what norms multiply q and k by besides; null where each head has its own
  const std::int32_t *positions, *cache_slots;
  float eps, key_scale, value_scale;
  int rotary_dim, heads, kv_heads, size, width, block_size;
  bool interleaved, wide_norms;  // whether norms are float32, not T
  unsigned work;                 // heads of all tokens

  // Index of a head's first weight in the weights of its norm.
  __device__ __forceinline__ int norm_place(int head) const {
    return factors == nullptr ? 0 : (head < heads ? head : head - heads) * size;
  }

  // Index in the cache, counted in heads of tokens, of a key or value head; `head` counts those of q first.
  __device__ __forceinline__ std::int64_t place(int slot, int head) const {
    const std::int64_t plane = (head >= heads + kv_heads ? kv_heads : 0) + (head - heads) % kv_heads;
    return (static_cast<std::int64_t>(slot / block_size) * 2 * kv_heads + plane) * block_size + slot % block_size;
  }

  // The scale by which a head is divided before it is stored. `largest` is the bit pattern of its largest magnitude;
  // such patterns have the order of the numbers, with NaN last.
  __device__ __forceinline__ float scale_of(unsigned largest, bool is_v) const {
    if (head_scales == nullptr) return is_v ? value_scale : key_scale;
    const float scale = __uint_as_float(largest) / kLargest<Cached>;
    return scale < kLeastScale ? kLeastScale : scale;
  }
};

// x / scale, rounded correctly for numbers that are neither tiny nor huge (Markstein 1990).
__device__ __forceinline__ float quotient(float x, float scale, float reciprocal) {
  const float near = x * reciprocal;
  return isfinite(near) ? fmaf(fmaf(-near, scale, x), reciprocal, near) : near;
}

// The bits of a magnitude.
__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffU; }

// ---- The root mean squares of all heads together
//
// Grid: x a token, y q or k. Block: kWholeThreads threads, of which thread i owns elements i, i + kWholeThreads, ...
// Shared memory: 32 floats of the reduction.

constexpr unsigned kWholeThreads = 256;

template <typename T>
static __global__ void whole_norm_kernel(const T* qkv, float* factors, int heads, int kv_heads, int size, float eps) {
  __shared__ float reduced[32];
  let_next_begin();
  wait_for_previous();
  const bool is_k = blockIdx.y == 1;
  const int count = (is_k ? kv_heads : heads) * size;
  const T* from =
      qkv + static_cast<std::int64_t>(blockIdx.x) * (heads + 2 * kv_heads) * size + (is_k ? heads * size : 0);
  float squares = 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(kWholeThreads)) {
    const float value = to_float(from[i]);
    squares = fmaf(value, value, squares);
  }
  squares = block_sum(squares, reduced);
  if (threadIdx.x == 0) factors[2 * blockIdx.x + blockIdx.y] = rsqrtf(squares / static_cast<float>(count) + eps);
}

// ---- Heads whose halves are rotated and whose sizes are multiples of two packs
//
// Grid: x threads for all heads of all tokens. Block: kThreads threads, of which size / (2 kPack) share a head; each
// owns kPack adjacent elements of the head's first half, and as many of the second.

constexpr unsigned kThreads = 256;

template <typename T, typename Cached>
static __global__ void halves_kernel(const __grid_constant__ Preparation<T, Cached> given) {
  using P = Pack<T, kPack<T>>;
  let_next_begin();
  const int lanes = given.size / (2 * kPack<T>);  // threads of a head, a power of two
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x, index = thread / static_cast<unsigned>(lanes);
  const int lane = static_cast<int>(thread % static_cast<unsigned>(lanes));
  const bool there = index < given.work;
  const auto all = static_cast<unsigned>(given.heads + 2 * given.kv_heads);
  const std::int64_t token = there ? index / all : 0;
  const auto head = static_cast<int>(index % all);
  const bool is_q = head < given.heads, is_v = head >= given.heads + given.kv_heads;
  const bool rotates = given.cos_sin != nullptr && !is_v;
  float cosine[kPack<T>], sine[kPack<T>];
  if (rotates) {
    const float* turn = given.cos_sin + static_cast<std::int64_t>(given.positions[token]) * given.size;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      cosine[j] = turn[lane * kPack<T> + j];
      sine[j] = turn[given.size / 2 + lane * kPack<T> + j];
    }
  }
  const int slot = is_q ? 0 : given.cache_slots[token];
  wait_for_previous();
  P halves[2]{};
  const P* from = reinterpret_cast<const P*>(given.qkv + static_cast<std::int64_t>(index) * given.size);
  if (there) {
    halves[0] = from[lane];
    halves[1] = from[lanes + lane];
  }
  const void* norm = is_v ? nullptr : is_q ? given.q_norm : given.k_norm;
  if (given.q_norm != nullptr || given.k_norm != nullptr) {
    float factor;
    if (given.factors != nullptr) {
      factor = given.factors[2 * token + (is_q ? 0 : 1)];
    } else {
      float squares = 0;
#pragma unroll
      for (const P& half : halves)
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) squares = fmaf(to_float(half.at[j]), to_float(half.at[j]), squares);
      for (int offset = lanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAll, squares, offset);
      factor = rsqrtf(squares / static_cast<float>(given.size) + given.eps);
    }
    const auto multiply = [&](const auto* weights) {
      using Weights = Pack<std::decay_t<decltype(*weights)>, kPack<T>>;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Weights scale = reinterpret_cast<const Weights*>(weights + given.norm_place(head))[half * lanes + lane];
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j)
          halves[half].at[j] = from_float<T>(to_float(halves[half].at[j]) * factor * to_float(scale.at[j]));
      }
    };
    if (norm != nullptr)
      given.wide_norms ? multiply(static_cast<const float*>(norm)) : multiply(static_cast<const T*>(norm));
  }
  if (rotates)
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float first = to_float(halves[0].at[j]), second = to_float(halves[1].at[j]);
      halves[0].at[j] = from_float<T>(first * cosine[j] - second * sine[j]);
      halves[1].at[j] = from_float<T>(second * cosine[j] + first * sine[j]);
    }
  unsigned largest = 0;
  if (kQuantized<Cached> && given.head_scales != nullptr) {
#pragma unroll
    for (const P& half : halves)
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) largest = max(largest, magnitude(to_float(half.at[j])));
    for (int offset = lanes / 2; offset > 0; offset /= 2)
      largest = max(largest, __shfl_xor_sync(kAll, largest, offset));
  }
  if (!there || slot < 0) return;
  const std::int64_t place = is_q ? token * given.heads + head : given.place(slot, head);
  if (is_q || !kQuantized<Cached>) {
    P* to = reinterpret_cast<P*>(is_q ? given.q : reinterpret_cast<T*>(given.kv)) + place * 2 * lanes;
    to[lane] = halves[0];
    to[lanes + lane] = halves[1];
    return;
  }
  const float scale = given.scale_of(largest, is_v), reciprocal = __frcp_rn(scale);
  if (given.head_scales != nullptr && lane == 0) given.head_scales[place] = scale;
  auto* to = reinterpret_cast<Pack<Cached, kPack<T>>*>(given.kv) + place * 2 * lanes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Pack<Cached, kPack<T>> bytes;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j)
      bytes.at[j] = from_float<Cached>(quotient(to_float(halves[half].at[j]), scale, reciprocal));
    to[half * lanes + lane] = bytes;
  }
}

// ---- Heads of any size
//
// Grid: x groups of kWarps heads. Block: kWarps warps, each with one head of a token; lane i owns elements i, i + 32,
// ... Shared memory: the heads' elements in float32.

constexpr unsigned kWarps = 4;

template <typename T, typename Cached>
static __global__ void any_kernel(const __grid_constant__ Preparation<T, Cached> given) {
  __shared__ float heads[kWarps][kMostSize];
  let_next_begin();
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x % 32), size = given.size;
  const auto index = blockIdx.x * kWarps + threadIdx.x / 32;
  if (index >= given.work) return;
  float* values = heads[threadIdx.x / 32];
  const auto all = static_cast<unsigned>(given.heads + 2 * given.kv_heads);
  const std::int64_t token = index / all;
  const auto head = static_cast<int>(index % all);
  const bool is_q = head < given.heads, is_v = head >= given.heads + given.kv_heads;
  const T* from = given.qkv + static_cast<std::int64_t>(index) * size;
  for (int i = lane; i < size; i += 32) values[i] = to_float(from[i]);
  __syncwarp();
  const void* norm = is_v ? nullptr : is_q ? given.q_norm : given.k_norm;
  if (norm != nullptr) {
    float factor;
    if (given.factors != nullptr) {
      factor = given.factors[2 * token + (is_q ? 0 : 1)];
    } else {
      float squares = 0;
      for (int i = lane; i < size; i += 32) squares = fmaf(values[i], values[i], squares);
      factor = rsqrtf(warp_sum(squares) / static_cast<float>(size) + given.eps);
    }
    const int place = given.norm_place(head);
    for (int i = lane; i < size; i += 32) {
      const float weight = given.wide_norms ? static_cast<const float*>(norm)[place + i]
                                            : to_float(static_cast<const T*>(norm)[place + i]);
      values[i] = to_float(from_float<T>(values[i] * factor * weight));  // rounded as a norm of its own would be
    }
    __syncwarp();
  }
  const int rotary_dim = given.rotary_dim, half = rotary_dim / 2;
  const float* turn = is_v || given.cos_sin == nullptr
                          ? nullptr
                          : given.cos_sin + static_cast<std::int64_t>(given.positions[token]) * rotary_dim;
  const auto rotated = [&](int i) {
    if (turn == nullptr || i >= rotary_dim) return values[i];
    const bool second = given.interleaved ? i % 2 == 1 : i >= half;
    const int pair = given.interleaved ? i / 2 : second ? i - half : i;
    const float partner = values[given.interleaved ? i ^ 1 : second ? i - half : i + half];
    const float cosine = turn[pair], sine = turn[half + pair];
    return second ? values[i] * cosine + partner * sine : values[i] * cosine - partner * sine;
  };
  if (is_q) {
    T* to = given.q + (token * given.heads + head) * size;
    for (int i = lane; i < size; i += 32) to[i] = from_float<T>(rotated(i));
    return;
  }
  const int slot = given.cache_slots[token];
  if (slot < 0) return;
  const std::int64_t place = given.place(slot, head);
  Cached* to = given.kv + place * given.width;
  // Through the activations' dtype, as q goes.
  const auto rounded = [&](int i) { return to_float(from_float<T>(rotated(i))); };
  float scale = 1;
  if constexpr (kQuantized<Cached>) {
    unsigned largest = 0;
    for (int i = lane; i < size; i += 32) largest = max(largest, magnitude(rounded(i)));
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(kAll, largest, offset));
    scale = given.scale_of(largest, is_v);
    if (given.head_scales != nullptr && lane == 0) given.head_scales[place] = scale;
  }
  for (int i = lane; i < given.width; i += 32) to[i] = from_float<Cached>(i < size ? rounded(i) / scale : 0);
}

// ---- The op

template <typename T, typename Cached>
static void run(const Runtime& runtime, const Preparation<T, Cached>& given) {
  if constexpr (std::is_same_v<T, Cached> || kQuantized<Cached>) {
    const int lanes = given.size / (2 * kPack<T>);
    const bool rotates_halves = given.cos_sin == nullptr ||
                                (!given.interleaved && given.rotary_dim == given.size && aligned(given.cos_sin, 16));
    if (rotates_halves && given.size == given.width && given.size % (2 * kPack<T>) == 0 && lanes <= 32 &&
        (lanes & (lanes - 1)) == 0 && aligned(given.qkv, 16) && aligned(given.q_norm, 32) &&
        aligned(given.k_norm, 32)) {
      launch(runtime, halves_kernel<T, Cached>, blocks_for(static_cast<std::int64_t>(given.work) * lanes, kThreads),
             kThreads, 0, given);
      return;
    }
  }
  launch(runtime, any_kernel<T, Cached>, blocks_for(given.work, kWarps), kWarps * 32, 0, given);
}

struct NormLayout {
  bool whole, wide;  // of all heads as one row; in float32
};

static NormLayout check_norms(const AttentionNorms& norms, int num_heads, const KVCache& kv, DType dtype) {
  NormLayout layout{};
  for (const std::optional<Tensor>* norm : {&norms.q, &norms.k})
    if (*norm) {
      layout.whole |= (*norm)->shape != std::vector<std::int64_t>{kv.head_dim};
      layout.wide |= (*norm)->dtype == DType::float32;
    }
  const auto check = [&](const std::optional<Tensor>& norm, std::int64_t heads) {
    if (!norm) return;
    check_shape(*norm, {layout.whole ? heads * kv.head_dim : kv.head_dim}, "a norm of attn_prep");
    check_dtype(*norm, layout.wide ? DType::float32 : dtype, "a norm of attn_prep");
  };
  check(norms.q, num_heads);
  check(norms.k, kv.kv_heads);
  return layout;
}

Tensor attn_prep(Runtime& runtime, const Tensor& qkv, int num_heads, const std::optional<Rotation>& rope,
                 const KVCache& kv, int layer, const Batch& batch, const AttentionNorms& norms) {
  const std::int64_t tokens = batch.num_tokens, all = num_heads + std::int64_t{2} * kv.kv_heads;
  check_shape(qkv, {tokens, all * kv.head_dim}, "qkv of attn_prep");
  check_dtype(qkv, runtime.dtype(), "qkv of attn_prep");
  if (num_heads < 1 || num_heads % kv.kv_heads != 0)
    throw std::invalid_argument("attn_prep: " + std::to_string(num_heads) + " query heads do not share " +
                                std::to_string(kv.kv_heads) + " key/value heads evenly");
  const NormLayout layout = check_norms(norms, num_heads, kv, qkv.dtype);
  check_pool(kv, batch);
  if (rope) rope->check(kv.head_dim, *batch.slots);
  const DeviceGuard guard(runtime.device());
  Tensor q = runtime.make({tokens, num_heads, kv.head_dim}, qkv.dtype);
  const Tensor factors = runtime.make({layout.whole ? tokens : 0, 2}, DType::float32);
  const auto optional = [](const std::optional<Tensor>& tensor) { return tensor ? tensor->data : nullptr; };
  with_float(qkv.dtype, [&](auto* from) {
    using T = Pointee<decltype(from)>;
    if (layout.whole)
      launch(runtime, whole_norm_kernel<T>, dim3(static_cast<unsigned>(tokens), 2), kWholeThreads, 0,
             static_cast<const T*>(qkv.data), static_cast<float*>(factors.data), num_heads, kv.kv_heads, kv.head_dim,
             norms.eps);
    const auto [key_scale, value_scale] = kv.layer_scales(layer);
    with_element(kv.element, [&](auto* to) {
      using Cached = Pointee<decltype(to)>;
      run(runtime, Preparation<T, Cached>{static_cast<const T*>(qkv.data),
                                          static_cast<T*>(q.data),
                                          static_cast<Cached*>(kv.layer(layer)),
                                          kv.layer_heads(layer),
                                          rope ? static_cast<const float*>(rope->cos_sin.data) : nullptr,
                                          optional(norms.q),
                                          optional(norms.k),
                                          static_cast<const float*>(factors.data),
                                          batch.view.positions,
                                          batch.view.cache_slots,
                                          norms.eps,
                                          key_scale,
                                          value_scale,
                                          rope ? rope->rotary_dim : 0,
                                          num_heads,
                                          kv.kv_heads,
                                          kv.head_dim,
                                          kv.width,
                                          kv.block_size,
                                          rope && rope->interleaved,
                                          layout.wide,
                                          static_cast<unsigned>(tokens * all)});
    });
  });
  return q;
}

}  // namespace vllmlite::cuda
