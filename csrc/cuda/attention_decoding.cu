// Which caches tensor cores take, and the choice of the kernel for rows of few tokens by the cache's elements. The
// kernels for each are instantiated in a file of their own, so that these compile side by side.
#include "cuda/attention.hpp"
#include "cuda/cache.cuh"

namespace vllmlite::cuda {

bool takes_tensor_cores(const Runtime& runtime, const Attention& attention) {
  const CacheElement own = attention.dtype == DType::float16 ? CacheElement::float16 : CacheElement::bfloat16;
  return runtime.capability() >= 80 && attention.dtype != DType::float32 &&
         (attention.element == own || attention.quantized()) && attention.size % 8 == 0 &&
         (attention.width <= 128 || runtime.shared_memory() >= kMostSharedMemory);
}

void attend_decoding(Runtime& runtime, const Attention& attention) {
  with_element(attention.element, [&](auto* element) {
    using E = Pointee<decltype(element)>;
    if constexpr (!std::is_same_v<E, float>) attend_decoding_over<E>(runtime, attention);
  });
}

}  // namespace vllmlite::cuda
