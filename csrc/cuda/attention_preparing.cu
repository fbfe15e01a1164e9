// What becomes of a product before attention: norms of heads, rotation, and keys and values into the cache.
#include "cuda/attention.hpp"
#include "cuda/checks.hpp"
#include "cuda/kernel.cuh"
#include "cuda/ops.hpp"

namespace vllmlite::cuda {

// What both kernels are given. The cache is that of one layer.
template <typename T, typename Cached>
struct Preparation {
  const T* qkv;  // [tokens, heads + 2 kv_heads, size]
  T* q;          // [tokens, heads, size]
  Cached* kv;
  const float* cos_sin;
  const T *q_norm, *k_norm;
  const std::int32_t *positions, *cache_slots;
  float eps;
  int rotary_dim, heads, kv_heads, size, width, block_size;
  bool interleaved;
  unsigned work;  // heads of all tokens

  // Where a head's key or value goes: a token's head after those of q.
  __device__ __forceinline__ Cached* place(int slot, int head) const {
    const std::int64_t plane = (head >= heads + kv_heads ? kv_heads : 0) + (head - heads) % kv_heads;
    return kv +
           ((static_cast<std::int64_t>(slot / block_size) * 2 * kv_heads + plane) * block_size + slot % block_size) *
               width;
  }
};

// ---- Heads whose halves are rotated, and whose sizes fit: a thread has a pack of either half

constexpr unsigned kThreads = 256;

template <typename T>
static __global__ void halves_kernel(const __grid_constant__ Preparation<T, T> given) {
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
  const T* norm = is_v ? nullptr : is_q ? given.q_norm : given.k_norm;
  if (given.q_norm != nullptr || given.k_norm != nullptr) {
    float squares = 0;
#pragma unroll
    for (const P& half : halves)
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) squares = fmaf(wide(half.at[j]), wide(half.at[j]), squares);
    for (int offset = lanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAll, squares, offset);
    const float factor = rsqrtf(squares / static_cast<float>(given.size) + given.eps);
    if (norm != nullptr)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const P scale = reinterpret_cast<const P*>(norm)[half * lanes + lane];
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j)
          halves[half].at[j] = narrow<T>(wide(halves[half].at[j]) * factor * wide(scale.at[j]));
      }
  }
  if (!there || slot < 0) return;
  if (rotates)
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float first = wide(halves[0].at[j]), second = wide(halves[1].at[j]);
      halves[0].at[j] = narrow<T>(first * cosine[j] - second * sine[j]);
      halves[1].at[j] = narrow<T>(second * cosine[j] + first * sine[j]);
    }
  P* to = reinterpret_cast<P*>(is_q ? given.q + (token * given.heads + head) * given.size : given.place(slot, head));
  to[lane] = halves[0];
  to[lanes + lane] = halves[1];
}

// ---- Any heads: a warp a head of a token

constexpr unsigned kWarps = 4;

template <typename T, typename Cached>
static __global__ void any_kernel(const __grid_constant__ Preparation<T, Cached> given) {
  __shared__ float room[kWarps][kMostSize];
  let_next_begin();
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x % 32), size = given.size;
  const auto index = blockIdx.x * kWarps + threadIdx.x / 32;
  if (index >= given.work) return;
  float* values = room[threadIdx.x / 32];
  const auto all = static_cast<unsigned>(given.heads + 2 * given.kv_heads);
  const std::int64_t token = index / all;
  const auto head = static_cast<int>(index % all);
  const bool is_q = head < given.heads, is_v = head >= given.heads + given.kv_heads;
  const T* from = given.qkv + static_cast<std::int64_t>(index) * size;
  for (int i = lane; i < size; i += 32) values[i] = wide(from[i]);
  __syncwarp();
  const T* norm = is_v ? nullptr : is_q ? given.q_norm : given.k_norm;
  if (norm != nullptr) {
    float squares = 0;
    for (int i = lane; i < size; i += 32) squares = fmaf(values[i], values[i], squares);
    const float factor = rsqrtf(warp_sum(squares) / static_cast<float>(size) + given.eps);
    // Rounded as a norm of its own would be.
    for (int i = lane; i < size; i += 32) values[i] = wide(narrow<T>(values[i] * factor * wide(norm[i])));
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
    for (int i = lane; i < size; i += 32) to[i] = narrow<T>(rotated(i));
    return;
  }
  const int slot = given.cache_slots[token];
  if (slot < 0) return;
  Cached* to = given.place(slot, head);
  // Through the activations' dtype, as q goes.
  for (int i = lane; i < given.width; i += 32)
    to[i] = i < size ? narrow<Cached>(wide(narrow<T>(rotated(i)))) : narrow<Cached>(0);
}

// ---- The op

template <typename T, typename Cached>
static void run(const Runtime& runtime, const Preparation<T, Cached>& given) {
  if constexpr (std::is_same_v<T, Cached>) {
    const int lanes = given.size / (2 * kPack<T>);
    const bool rotates_halves = given.cos_sin == nullptr ||
                                (!given.interleaved && given.rotary_dim == given.size && aligned(given.cos_sin, 16));
    if (rotates_halves && given.size == given.width && given.size % (2 * kPack<T>) == 0 && lanes <= 32 &&
        (lanes & (lanes - 1)) == 0 && aligned(given.qkv, 16) && aligned(given.q_norm, 16) &&
        aligned(given.k_norm, 16)) {
      launch(runtime, halves_kernel<T>, blocks_for(static_cast<std::int64_t>(given.work) * lanes, kThreads), kThreads,
             0, given);
      return;
    }
  }
  launch(runtime, any_kernel<T, Cached>, blocks_for(given.work, kWarps), kWarps * 32, 0, given);
}

Tensor attn_prep(Runtime& runtime, const Tensor& qkv, int num_heads, const std::optional<Rotation>& rope,
                 const KVCache& kv, int layer, const Batch& batch, const AttentionNorms& norms) {
  const std::int64_t tokens = batch.num_tokens, all = num_heads + std::int64_t{2} * kv.kv_heads;
  check_shape(qkv, {tokens, all * kv.head_dim}, "qkv of attn_prep");
  check_dtype(qkv, runtime.dtype(), "qkv of attn_prep");
  if (num_heads < 1 || num_heads % kv.kv_heads != 0)
    throw std::invalid_argument("attn_prep: " + std::to_string(num_heads) + " query heads do not share " +
                                std::to_string(kv.kv_heads) + " key/value heads evenly");
  for (const std::optional<Tensor>* norm : {&norms.q, &norms.k})
    if (*norm) {
      check_shape(**norm, {kv.head_dim}, "a norm of attn_prep");
      check_dtype(**norm, qkv.dtype, "a norm of attn_prep");
    }
  if (rope) {
    check_dtype(rope->cos_sin, DType::float32, "the rotation of attn_prep");
    check_rank(rope->cos_sin, 2, "the rotation of attn_prep");
    if (rope->cos_sin.shape[1] != rope->rotary_dim || rope->rotary_dim % 2 != 0 || rope->rotary_dim > kv.head_dim ||
        rope->cos_sin.shape[0] < batch.max_context)
      throw std::invalid_argument("attn_prep: a rotation " + describe(rope->cos_sin.shape) + " does not fit");
  }
  const DeviceGuard guard(runtime.device());
  Tensor q = runtime.make({tokens, num_heads, kv.head_dim}, qkv.dtype);
  const Tensor pool = kv.layer(layer);
  with_float(qkv.dtype, [&](auto* from) {
    with_float(kv.dtype, [&](auto* to) {
      using T = Pointee<decltype(from)>;
      using Cached = Pointee<decltype(to)>;
      const auto norm = [](const std::optional<Tensor>& weight) {
        return weight ? static_cast<const T*>(weight->data) : nullptr;
      };
      run(runtime, Preparation<T, Cached>{
                       static_cast<const T*>(qkv.data), static_cast<T*>(q.data), static_cast<Cached*>(pool.data),
                       rope ? static_cast<const float*>(rope->cos_sin.data) : nullptr, norm(norms.q), norm(norms.k),
                       batch.view.positions, batch.view.cache_slots, norms.eps, rope ? rope->rotary_dim : 0, num_heads,
                       kv.kv_heads, kv.head_dim, kv.width, kv.block_size, rope && rope->interleaved,
                       static_cast<unsigned>(tokens * all)});
    });
  });
  return q;
}

}  // namespace vllmlite::cuda
