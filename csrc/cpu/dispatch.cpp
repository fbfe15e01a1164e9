#include "cpu/dispatch.hpp"

#include <stdexcept>

namespace vllmlite::cpu {

#if defined(__x86_64__)
namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#else
namespace baseline {
extern const Kernels kernels;
}
#endif

std::vector<const Kernels*> available_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  std::vector<const Kernels*> found{&baseline::kernels};
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return found;
  found.push_back(&avx2::kernels);
  for (const bool has : {__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                         __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl")})
    if (!has) return found;
  found.push_back(&avx512::kernels);
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return found;
  found.push_back(&avx512_bf16::kernels);
  return found;
#elif defined(__aarch64__)
  return {&neon::kernels};
#else
  return {&baseline::kernels};
#endif
}

const Kernels& choose_kernels(const std::string& isa) {
  const std::vector<const Kernels*> found = available_kernels();
  if (isa == "auto") return *found.back();
  std::string names;
  for (const Kernels* kernels : found) {
    if (isa == kernels->isa) return *kernels;
    names += names.empty() ? "" : ", ";
    names += kernels->isa;
  }
  throw std::invalid_argument("instruction set " + isa + ": this CPU and this build have " + names);
}

}  // namespace vllmlite::cpu
