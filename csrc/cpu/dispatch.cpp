#include "cpu/dispatch.hpp"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace vllmlite::cpu {

// The kernels of each instruction set; the address is null if this build has none for it.
#define VLLMLITE_TABLE(isa)                           \
  namespace isa {                                     \
  extern const Kernels kernels __attribute__((weak)); \
  }
VLLMLITE_TABLE(baseline)
VLLMLITE_TABLE(avx2)
VLLMLITE_TABLE(avx512)
VLLMLITE_TABLE(avx512_bf16)
VLLMLITE_TABLE(amx)
VLLMLITE_TABLE(neon)
#undef VLLMLITE_TABLE

#if defined(__x86_64__)
namespace {

// Whether the CPU has AMX tiles with bfloat16 and Linux grants them; a process must request the tile registers first.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr unsigned kTile = 1U << 24, kBf16 = 1U << 22;  // of leaf 7's EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTile) != 0 && (d & kBf16) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

std::vector<const Kernels*> available_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  std::vector<const Kernels*> found{&baseline::kernels};
  const auto add = [&found](const Kernels* kernels) {
    if (kernels != nullptr) found.push_back(kernels);
  };
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return found;
  add(&avx2::kernels);
  for (const bool has : {__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                         __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl")})
    if (!has) return found;
  add(&avx512::kernels);
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return found;
  add(&avx512_bf16::kernels);
  if (may_use_tiles()) add(&amx::kernels);
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

bool reads_ahead() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace vllmlite::cpu
