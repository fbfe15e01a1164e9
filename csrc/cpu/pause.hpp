// The instruction with which a thread that spins spares the other one of its core.
#pragma once

namespace vllmlite::cpu {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace vllmlite::cpu
