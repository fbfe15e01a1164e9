// Instructions of sm_90a: wgmma products, which a warpgroup (four warps) issues on operands in shared memory; mbarriers
// that count bytes; TMA copies, which one thread starts; and setmaxnreg, by which warps exchange registers. The file is
// empty for other chips.
//
// Operands in shared memory have rows of 128 bytes, whose 16-byte words are swizzled over eight rows: the layout in
// which TMA writes boxes of 64 columns of 16 bits. The fragments of A and of the sums are those of mma.cuh; warp w of
// the warpgroup has rows 16 w to 16 w + 15. `sums` has kColumns / 2 floats per thread, four for each 8 columns.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/mma.cuh"

namespace vllmlite::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// ---- Barriers

__device__ __forceinline__ void barrier_init(std::uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to TMA copies. The block must synchronise afterwards.
__device__ __forceinline__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Initialises the barriers of a ring of slots, which copies fill and `readers` threads empty, and synchronises the
// block.
template <int kSlots>
__device__ __forceinline__ void init_ring(std::uint64_t (&full)[kSlots], std::uint64_t (&empty)[kSlots], int readers) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(full[i], 1);
      barrier_init(empty[i], readers);
    }
    barriers_made();
  }
  __syncthreads();
}

__device__ __forceinline__ void arrive(std::uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(std::uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Waits until the barrier's phase of this parity has completed. Parity 1 does not wait before the first phase.
__device__ __forceinline__ void wait(std::uint64_t& barrier, int parity) {
  std::uint32_t done = 0;
  while (done == 0)
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
}

// Named barriers for `threads` threads, in whole warps: meet() arrives and waits for the others; announce() only
// arrives.
__device__ __forceinline__ void meet(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ __forceinline__ void announce(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// Makes this thread's stores to shared memory visible to products that are issued after the next barrier.
__device__ __forceinline__ void stores_made() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Copies

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts a copy of a box of a tensor map to shared memory. The coordinates are those of its first element, the
// innermost first; the copied bytes count towards the barrier's phase.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& map, std::uint64_t& barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& map, std::uint64_t& barrier, int x, int y,
                                         int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Starts a copy of contiguous bytes, a multiple of 16, to shared memory.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes, std::uint64_t& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

// ---- Clusters

// Waits for all blocks of the cluster. What their threads stored before is visible to all of them afterwards.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Out of the shared memory of the cluster's block `rank`, at the address that `own` has in this one's.
__device__ __forceinline__ float4 load_of_cluster(const float4* own, int rank) {
  float4 four;
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
      : "r"(shared_address(own)), "r"(rank)
      : "memory");
  return four;
}

// ---- Registers

template <int kCount>
__device__ __forceinline__ void give_registers_up() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- Products

constexpr std::uint64_t kSwizzled = std::uint64_t{1} << 62;

// Returns the descriptor of a swizzled operand in shared memory. `group_bytes` is the distance between groups of eight
// rows. `part_bytes` is the distance between parts of 64 columns; only transposed operands, whose rows run along k, use
// it.
__device__ __forceinline__ std::uint64_t operand(const void* at, int group_bytes, int part_bytes) {
  return kSwizzled | static_cast<std::uint64_t>(group_bytes / 16) << 32 |
         static_cast<std::uint64_t>(part_bytes / 16) << 16 | (shared_address(at) & 0x3ffffU) >> 4;
}

// Must be called before the first product, after registers with its sums or fragments were written.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads or writes of these values past this point.
template <int kCount>
__device__ __forceinline__ void hold(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

#define VLLMLITE_4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define VLLMLITE_8(c, i) VLLMLITE_4(c, i), VLLMLITE_4(c, i + 4)
#define VLLMLITE_16(c, i) VLLMLITE_8(c, i), VLLMLITE_8(c, i + 8)
#define VLLMLITE_32(c) VLLMLITE_16(c, 0), VLLMLITE_16(c, 16)
#define VLLMLITE_64(c) VLLMLITE_32(c), VLLMLITE_16(c, 32), VLLMLITE_16(c, 48)
#define VLLMLITE_NAMES_4 "%0,%1,%2,%3"
#define VLLMLITE_NAMES_8 VLLMLITE_NAMES_4 ",%4,%5,%6,%7"
#define VLLMLITE_NAMES_16 VLLMLITE_NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define VLLMLITE_NAMES_32 VLLMLITE_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define VLLMLITE_NAMES_64                                                                                          \
  VLLMLITE_NAMES_32                                                                                                \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%" \
  "59,%60,%61,%62,%63"

// sums[64][128] += a[64][16] * transpose(b[128][16]), or = if `first`. a and b are descriptors of operands in shared
// memory, both with k along their rows.
template <typename T>
__device__ __forceinline__ void multiply_rows(float (&sums)[64], std::uint64_t a, std::uint64_t b, bool first) {
#define VLLMLITE_MULTIPLY(type)                                                                                    \
  asm volatile("{\n.reg .pred adds;\nsetp.eq.u32 adds, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type \
               " {" VLLMLITE_NAMES_64 "}, %64, %65, adds, 1, 1, 0, 0;\n}"                                          \
               : VLLMLITE_64(sums)                                                                                 \
               : "l"(a), "l"(b), "r"(static_cast<std::uint32_t>(first)))
  if constexpr (std::is_same_v<T, f16>)
    VLLMLITE_MULTIPLY("f16.f16");
  else
    VLLMLITE_MULTIPLY("bf16.bf16");
#undef VLLMLITE_MULTIPLY
}

// sums[64][2 * kCount] += a[64][16] * b[16][2 * kCount]. a is a fragment in registers; b is the descriptor of a
// transposed operand in shared memory.
template <typename T, int kCount>
__device__ __forceinline__ void multiply_columns(float (&sums)[kCount], const std::uint32_t (&a)[4], std::uint64_t b) {
  static_assert(kCount == 32 || kCount == 64);
#define VLLMLITE_MULTIPLY(type, columns, names, all, a0, a1, a2, a3, at_b)                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type " {" names "}, {" a0 "," a1 "," a2 "," a3 \
               "}, " at_b ", 1, 1, 1, 1;"                                                                            \
               : all(sums)                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define VLLMLITE_MULTIPLY_64(type) \
  VLLMLITE_MULTIPLY(type, "64", VLLMLITE_NAMES_32, VLLMLITE_32, "%32", "%33", "%34", "%35", "%36")
#define VLLMLITE_MULTIPLY_128(type) \
  VLLMLITE_MULTIPLY(type, "128", VLLMLITE_NAMES_64, VLLMLITE_64, "%64", "%65", "%66", "%67", "%68")
  if constexpr (kCount == 32 && std::is_same_v<T, f16>)
    VLLMLITE_MULTIPLY_64("f16.f16");
  else if constexpr (kCount == 32)
    VLLMLITE_MULTIPLY_64("bf16.bf16");
  else if constexpr (std::is_same_v<T, f16>)
    VLLMLITE_MULTIPLY_128("f16.f16");
  else
    VLLMLITE_MULTIPLY_128("bf16.bf16");
#undef VLLMLITE_MULTIPLY_128
#undef VLLMLITE_MULTIPLY_64
#undef VLLMLITE_MULTIPLY
}

// sums (64 x kCount * 2) = a b, or += unless `first`, of 8-bit floats (e4m3): a is 64 x 32, b kCount * 2 x 32, both
// with the sum's terms along their rows.
template <int kCount>
__device__ __forceinline__ void multiply_bytes(float (&sums)[kCount], std::uint64_t a, std::uint64_t b, bool first) {
  static_assert(kCount == 4 || kCount == 8 || kCount == 16 || kCount == 32 || kCount == 64);
#define VLLMLITE_MULTIPLY(columns, names, all, at_a, at_b, adds)                                                \
  asm volatile("{\n.reg .pred adds;\nsetp.eq.u32 adds, " adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
               "k32.f32.e4m3.e4m3 {" names "}, " at_a ", " at_b ", adds, 1, 1;\n}"                              \
               : all                                                                                            \
               : "l"(a), "l"(b), "r"(static_cast<std::uint32_t>(first)))
  if constexpr (kCount == 4)
    VLLMLITE_MULTIPLY("8", VLLMLITE_NAMES_4, VLLMLITE_4(sums, 0), "%4", "%5", "%6");
  else if constexpr (kCount == 8)
    VLLMLITE_MULTIPLY("16", VLLMLITE_NAMES_8, VLLMLITE_8(sums, 0), "%8", "%9", "%10");
  else if constexpr (kCount == 16)
    VLLMLITE_MULTIPLY("32", VLLMLITE_NAMES_16, VLLMLITE_16(sums, 0), "%16", "%17", "%18");
  else if constexpr (kCount == 32)
    VLLMLITE_MULTIPLY("64", VLLMLITE_NAMES_32, VLLMLITE_32(sums), "%32", "%33", "%34");
  else
    VLLMLITE_MULTIPLY("128", VLLMLITE_NAMES_64, VLLMLITE_64(sums), "%64", "%65", "%66");
#undef VLLMLITE_MULTIPLY
}

// sums (64 x kCount * 2) = a b, or += unless `first`. a is a fragment of 64 x 16 in registers; b is the descriptor of
// kCount * 2 rows of 16 columns.
template <typename T, int kCount>
__device__ __forceinline__ void multiply_fragment(float (&sums)[kCount], const std::uint32_t (&a)[4], std::uint64_t b,
                                                  bool first) {
  static_assert(kCount == 4 || kCount == 8 || kCount == 16 || kCount == 32 || kCount == 64);
#define VLLMLITE_MULTIPLY(type, columns, names, all, a0, a1, a2, a3, at_b, adds)                                \
  asm volatile("{\n.reg .pred adds;\nsetp.eq.u32 adds, " adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
               "k16.f32." type " {" names "}, {" a0 "," a1 "," a2 "," a3 "}, " at_b ", adds, 1, 1, 0;\n}"       \
               : all                                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<std::uint32_t>(first)))
#define VLLMLITE_MULTIPLY_BY(type)                                                                                    \
  if constexpr (kCount == 4)                                                                                          \
    VLLMLITE_MULTIPLY(type, "8", VLLMLITE_NAMES_4, VLLMLITE_4(sums, 0), "%4", "%5", "%6", "%7", "%8", "%9");          \
  else if constexpr (kCount == 8)                                                                                     \
    VLLMLITE_MULTIPLY(type, "16", VLLMLITE_NAMES_8, VLLMLITE_8(sums, 0), "%8", "%9", "%10", "%11", "%12", "%13");     \
  else if constexpr (kCount == 16)                                                                                    \
    VLLMLITE_MULTIPLY(type, "32", VLLMLITE_NAMES_16, VLLMLITE_16(sums, 0), "%16", "%17", "%18", "%19", "%20", "%21"); \
  else if constexpr (kCount == 32)                                                                                    \
    VLLMLITE_MULTIPLY(type, "64", VLLMLITE_NAMES_32, VLLMLITE_32(sums), "%32", "%33", "%34", "%35", "%36", "%37");    \
  else                                                                                                                \
    VLLMLITE_MULTIPLY(type, "128", VLLMLITE_NAMES_64, VLLMLITE_64(sums), "%64", "%65", "%66", "%67", "%68", "%69")
  if constexpr (std::is_same_v<T, f16>) {
    VLLMLITE_MULTIPLY_BY("f16.f16");
  } else {
    VLLMLITE_MULTIPLY_BY("bf16.bf16");
  }
#undef VLLMLITE_MULTIPLY_BY
#undef VLLMLITE_MULTIPLY
}

#undef VLLMLITE_NAMES_64
#undef VLLMLITE_NAMES_32
#undef VLLMLITE_NAMES_16
#undef VLLMLITE_NAMES_8
#undef VLLMLITE_NAMES_4
#undef VLLMLITE_64
#undef VLLMLITE_32
#undef VLLMLITE_16
#undef VLLMLITE_8
#undef VLLMLITE_4

#endif

}  // namespace vllmlite::cuda
