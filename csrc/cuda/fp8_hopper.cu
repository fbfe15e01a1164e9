// Products of 8-bit floats by Hopper's warpgroups: y = x @ w.T of more than a few rows of x.
//
// The tensor cores' first operand has kRowsOfA rows in a tile, the second kB: x and w where x has many rows, else w and
// x (kSwapped), so that few rows of x fill a tile. Columns come in stages of 128.
//
// Grid: blocks that go over tiles, in an order in which neighbours share operands; or for each tile a cluster of blocks
// that divide its columns. Block: two warpgroups, each with 64 rows of the first operand, and one warp or four, of
// which one thread starts the copies. Shared memory: a ring of kStages stages of both operands, in rows of 128 bytes,
// swizzled, filled by the tensor memory accelerator; afterwards the sums of a cluster's block, by groups of 8 rows of
// the second operand. A thread holds the sums of fragments of mma.cuh, warp i of a group those of rows 16 i. Results
// are exchanged by the four lanes of a row, so that each writes 16 bytes.
//
// The tensor cores add up a stage, of at most 128 rows of the second operand at a time; such sums are added in float32,
// those of blocks times their scales. In a cluster the blocks add up the sums, each for some of the groups, in the
// order of the columns.
#include <algorithm>

#include "cuda/bytes.hpp"
#include "cuda/hopper.cuh"
#include "cuda/tensor_map.cuh"

namespace vllmlite::cuda {

constexpr int kRowsOfA = 128, kMultiplying = 256;  // threads

template <int kRowsOfB, bool kAreSwapped, bool kHaveBlocks, int kDepth>
struct Fp8Tile {
  static constexpr int kB = kRowsOfB, kStages = kDepth;
  static constexpr bool kSwapped = kAreSwapped, kBlocks = kHaveBlocks;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  static constexpr int kBlocksPerProcessor = kB <= 64 ? 2 : 1;
#else
  static constexpr int kBlocksPerProcessor = 1;
#endif
  // A thread's registers, where the warps that copy hand theirs to those that multiply, which they do by fours.
  static constexpr int kCopyingRegisters = 24, kMultiplyingRegisters = kB > 128 ? 240 : 0;
  static constexpr int kThreads = kMultiplying + (kB > 128 ? 128 : 32);
  static constexpr int kUnit = kSwapped ? 2 : 4;  // groups of results that are written together

  struct Shared {
    union {
      struct {
        uint4 a[kStages][kRowsOfA][8];
        uint4 b[kStages][kB][8];
      };
      float4 sums[kB / 8][kMultiplying];  // of a block in a cluster
    };
    std::uint64_t full[kStages], empty[kStages];
  };
};

// A launch. Rows of a and b are those of x and w, or of w and x.
struct Fp8Launch {
  CUtensorMap a_map, b_map;
  const void* bias;
  void* y;
  ByteScales scales;
  int m, n, stride, tiles_of_a, tiles_of_b, stages, splits;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A tile's place; its columns begin and end at these stages.
struct Fp8Place {
  int a, b;

  // In bands of kBand tiles of a, so that what is multiplied at a time is near each other.
  __device__ __forceinline__ Fp8Place(const Fp8Launch& given, int tile) {
    constexpr int kBand = 8;
    const int of_band = kBand * given.tiles_of_b, band = tile / of_band;
    const int height = min(kBand, given.tiles_of_a - band * kBand);
    a = band * kBand + tile % of_band % height;
    b = tile % of_band / height;
  }
};

template <typename T, typename S>
struct Fp8Block {
  static constexpr int kSums = S::kB / 2;

  const Fp8Launch& given;
  typename S::Shared& shared;
  int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int rank = static_cast<int>(blockIdx.x) % given.splits;
  int first_tile = static_cast<int>(blockIdx.x) / given.splits, step = static_cast<int>(gridDim.x) / given.splits;
  int tiles = given.tiles_of_a * given.tiles_of_b;
  int begin = rank * given.stages / given.splits, end = (rank + 1) * given.stages / given.splits;

  __device__ __forceinline__ Fp8Block(const Fp8Launch& launch, typename S::Shared& memory)
      : given(launch), shared(memory) {}

  // ---- Copies

  __device__ __forceinline__ void copy_w(const Fp8Place& at, int slot, int stage) const {
    arrive_expecting(shared.full[slot], sizeof(shared.a[0]) + sizeof(shared.b[0]));
    if constexpr (S::kSwapped)
      copy_box(&shared.a[slot], given.a_map, shared.full[slot], stage * 128, at.a * kRowsOfA);
    else
      copy_box(&shared.b[slot], given.b_map, shared.full[slot], stage * 128, at.b * S::kB);
  }

  __device__ __forceinline__ void copy_x(const Fp8Place& at, int slot, int stage) const {
    if constexpr (S::kSwapped)
      copy_box(&shared.b[slot], given.b_map, shared.full[slot], stage * 128, at.b * S::kB);
    else
      copy_box(&shared.a[slot], given.a_map, shared.full[slot], stage * 128, at.a * kRowsOfA);
  }

  __device__ __forceinline__ void copy() const {
    prefetch_map(given.a_map);
    prefetch_map(given.b_map);
    const Fp8Place first(given, first_tile);
    const int ahead = min(S::kStages, end - begin);
    for (int i = 0; i < ahead; ++i) copy_w(first, i, begin + i);
    wait_for_previous();
    for (int i = 0; i < ahead; ++i) copy_x(first, i, begin + i);
    int slot = ahead % S::kStages, parity = ahead / S::kStages;
    for (int tile = first_tile, stage = begin + ahead; tile < tiles; tile += step, stage = begin) {
      const Fp8Place at(given, tile);
      for (; stage < end; ++stage) {
        wait(shared.empty[slot], parity ^ 1);
        copy_w(at, slot, stage);
        copy_x(at, slot, stage);
        if (++slot == S::kStages) {
          slot = 0;
          parity ^= 1;
        }
      }
    }
  }

  // ---- Products

  // The thread's first row of a, which the one 8 on follows, and its first of b, which the next and every 8th follow.
  __device__ __forceinline__ int row_of_a(const Fp8Place& at) const { return at.a * kRowsOfA + warp * 16 + lane / 4; }
  __device__ __forceinline__ int row_of_b(const Fp8Place& at) const { return at.b * S::kB + lane % 4 * 2; }

  // sums += the products of a stage, times the scales of its blocks.
  __device__ __forceinline__ void add(const Fp8Place& at, int stage, int slot, int parity, float (&sums)[kSums]) const {
    constexpr int kPart = S::kB < 128 ? S::kB : 128, kParts = S::kB / kPart, kProducts = kPart / 2;
    const float* of_x = given.scales.x + static_cast<std::int64_t>(stage) * given.scales.stride;
    [[maybe_unused]] float factors[kParts][2];  // of the block of w, times those of the rows of a if these are x's
    if constexpr (S::kBlocks) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int row = S::kSwapped ? at.a * kRowsOfA : min(at.b * S::kB + part * kPart, given.n - 1);
        const float of_w = given.scales.w[row / kFp8Block * given.stages + stage];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          factors[part][half] = S::kSwapped ? of_w : of_x[row_of_a(at) + half * 8] * of_w;
      }
    }
    wait(shared.full[slot], parity);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float products[kProducts];
      begin_products();
#pragma unroll
      for (int i = 0; i < 4; ++i)
        multiply_bytes(products, operand(&shared.a[slot][warp / 4 * 64][i * 2], 1024, 0),
                       operand(&shared.b[slot][part * kPart][i * 2], 1024, 0), i == 0);
      commit_products();
      wait_for_products<0>();
      hold(products);
      if (part == kParts - 1 && lane == 0) arrive(shared.empty[slot]);
#pragma unroll
      for (int j = 0; j < kProducts / 4; ++j) {
        float2 of_b = {1, 1};
        if constexpr (S::kBlocks && S::kSwapped)
          of_b = *reinterpret_cast<const float2*>(of_x + row_of_b(at) + part * kPart + j * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = sums[part * kProducts + j * 4 + i];
          if constexpr (!S::kBlocks)
            sum += products[j * 4 + i];
          else
            sum = fmaf(products[j * 4 + i], factors[part][i / 2] * (i % 2 == 0 ? of_b.x : of_b.y), sum);
        }
      }
    }
  }

  // ---- Results

  // The factors of a result, and its bias.
  struct Scaling {
    float of_a[2], added[2];  // by row of a, where that is of w
  };

  __device__ __forceinline__ Scaling scaling(const Fp8Place& at) const {
    Scaling made{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of_a(at) + half * 8;
      if constexpr (S::kSwapped) {
        const int n = min(row, given.n - 1);
        made.of_a[half] = S::kBlocks ? 1 : __ldg(given.scales.w + n);
        made.added[half] = given.bias == nullptr ? 0 : to_float(static_cast<const T*>(given.bias)[n]);
      } else {
        made.of_a[half] = S::kBlocks ? 1 : given.scales.x[row];
      }
    }
    return made;
  }

  // Lane q of four gets what the four have as words[q].
  static __device__ __forceinline__ uint4 exchanged(const std::uint32_t (&words)[4]) {
    const int lane = static_cast<int>(threadIdx.x);
    const bool odd = lane % 2 != 0, upper = lane / 2 % 2 != 0;
    const std::uint32_t a = __shfl_xor_sync(kAll, odd ? words[0] : words[1], 1),
                        b = __shfl_xor_sync(kAll, odd ? words[2] : words[3], 1);
    const std::uint32_t pairs[2][2] = {{odd ? a : words[0], odd ? words[1] : a},
                                       {odd ? b : words[2], odd ? words[3] : b}};
    const std::uint32_t c = __shfl_xor_sync(kAll, upper ? pairs[0][0] : pairs[1][0], 2),
                        d = __shfl_xor_sync(kAll, upper ? pairs[0][1] : pairs[1][1], 2);
    return upper ? make_uint4(c, d, pairs[1][0], pairs[1][1]) : make_uint4(pairs[0][0], pairs[0][1], c, d);
  }

  // Eight results of a row.
  __device__ __forceinline__ void store(int m, int n, uint4 eight) const {
    if (m >= given.m || n >= given.n) return;
    T* to = static_cast<T*>(given.y) + static_cast<std::int64_t>(m) * given.stride + n;
    if (n + 8 <= given.n && reinterpret_cast<std::uintptr_t>(to) % 16 == 0) {
      *reinterpret_cast<uint4*>(to) = eight;
      return;
    }
    const std::uint32_t words[] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (n + i < given.n) {
        const auto bits = static_cast<std::uint16_t>(words[i / 2] >> (i % 2 * 16));
        to[i] = reinterpret_cast<const T&>(bits);
      }
  }

  // Writes a unit of the sums: kUnit groups of 8 rows of b.
  __device__ __forceinline__ void write(const Fp8Place& at, int unit, const Scaling& by,
                                        const float (&sums)[S::kUnit * 4]) const {
    std::uint32_t words[2][S::kUnit];
#pragma unroll
    for (int i = 0; i < S::kUnit; ++i) {
      float of_b[2], added[2];
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int row = row_of_b(at) + (unit * S::kUnit + i) * 8 + next;
        if constexpr (S::kSwapped) {
          of_b[next] = S::kBlocks ? 1 : given.scales.x[row];
        } else {
          const int n = min(row, given.n - 1);
          of_b[next] = S::kBlocks ? 1 : __ldg(given.scales.w + n);
          added[next] = given.bias == nullptr ? 0 : to_float(static_cast<const T*>(given.bias)[n]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = by.of_a[half];
        words[half][i] =
            pair<T>(fmaf(sums[i * 4 + half * 2], a * of_b[0], S::kSwapped ? by.added[half] : added[0]),
                    fmaf(sums[i * 4 + half * 2 + 1], a * of_b[1], S::kSwapped ? by.added[half] : added[1]));
      }
    }
    const int quad = lane % 4, group = unit * S::kUnit;
    if constexpr (S::kSwapped) {
      // Transposed, a thread has a row of x and two neighbouring rows of w.
      const std::uint32_t four[] = {transposed(words[0][0]), transposed(words[1][0]), transposed(words[0][1]),
                                    transposed(words[1][1])};
      store(at.b * S::kB + (group + quad / 2) * 8 + lane / 4, at.a * kRowsOfA + warp * 16 + quad % 2 * 8,
            exchanged(four));
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store(row_of_a(at) + half * 8, at.b * S::kB + (group + quad) * 8, exchanged(words[half]));
    }
  }

  __device__ __forceinline__ void finish(const Fp8Place& at, const float (&sums)[kSums]) const {
    constexpr int kUnits = kSums / 4 / S::kUnit;
    const Scaling by = scaling(at);
    if (given.splits == 1) {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        float own[S::kUnit * 4];
#pragma unroll
        for (int i = 0; i < S::kUnit * 4; ++i) own[i] = sums[unit * S::kUnit * 4 + i];
        write(at, unit, by, own);
      }
      return;
    }
    meet(1, kMultiplying);  // before the ring is overwritten
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j)
      shared.sums[j][thread] = make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
    meet_cluster();
    for (int unit = rank; unit < kUnits; unit += given.splits) {
      float total[S::kUnit * 4] = {};
      for (int i = 0; i < given.splits; ++i)
#pragma unroll
        for (int j = 0; j < S::kUnit; ++j) {
          const float4 four = load_of_cluster(&shared.sums[unit * S::kUnit + j][thread], i);
          total[4 * j] += four.x;
          total[4 * j + 1] += four.y;
          total[4 * j + 2] += four.z;
          total[4 * j + 3] += four.w;
        }
      write(at, unit, by, total);
    }
    meet_cluster();  // before a block ends whose sums others read
  }

  __device__ __forceinline__ void multiply() const {
    wait_for_previous();
    int slot = 0, parity = 0;
    for (int tile = first_tile; tile < tiles; tile += step) {
      const Fp8Place at(given, tile);
      float sums[kSums] = {};
      for (int stage = begin; stage < end; ++stage) {
        add(at, stage, slot, parity, sums);
        if (++slot == S::kStages) {
          slot = 0;
          parity ^= 1;
        }
      }
      finish(at, sums);
    }
  }
};

#endif

template <typename T, typename S>
static __global__ __launch_bounds__(S::kThreads, S::kBlocksPerProcessor) void fp8_hopper_kernel(
    const __grid_constant__ Fp8Launch given) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char storage[];
  auto& shared = *reinterpret_cast<typename S::Shared*>(storage);
  let_next_begin();
  init_ring(shared.full, shared.empty, kMultiplying / 32);
  const Fp8Block<T, S> block(given, shared);
  if (threadIdx.x >= kMultiplying) {
    if constexpr (S::kMultiplyingRegisters != 0) give_registers_up<S::kCopyingRegisters>();
    if (threadIdx.x == kMultiplying) block.copy();
  } else {
    if constexpr (S::kMultiplyingRegisters != 0) take_registers<S::kMultiplyingRegisters>();
    block.multiply();
  }
#endif
}

bool takes_fp8_on_hopper(const Runtime& runtime, const ByteProduct& product) {
#ifdef VLLMLITE_HOPPER
  return runtime.capability() == 90 && product.out_dtype == product.dtype && !product.integers;
#else
  (void)runtime;
  (void)product;
  return false;
#endif
}

// Returns the number of blocks that share the columns of a tile: as many as can run at a time, but no more than save
// more time than adding up their sums takes (measured on an H200).
static int splits_of(int tiles, int stages, int room, int most) {
  int splits = 1;
  while (splits < most && tiles * splits * 2 <= room && stages >= splits * 4) splits *= 2;
  return splits;
}

template <typename T, typename S>
static void run(const Runtime& runtime, const ByteProduct& product) {
  const auto map = [&](const void* data, int rows, int of_tile) {
    return tensor_map(data, DType::uint8, {{product.k, 1, 128}, {rows, product.k, of_tile}});
  };
  const auto tiles = [](int rows, int of_tile) { return (rows + of_tile - 1) / of_tile; };
  const int rows_a = S::kSwapped ? product.n : product.m, rows_b = S::kSwapped ? product.m : product.n;
  Fp8Launch given{map(S::kSwapped ? product.w : product.x, rows_a, kRowsOfA),
                  map(S::kSwapped ? product.x : product.w, rows_b, S::kB),
                  product.bias,
                  product.y,
                  product.scales,
                  product.m,
                  product.n,
                  product.stride,
                  tiles(rows_a, kRowsOfA),
                  tiles(rows_b, S::kB),
                  (product.k + 127) / 128,
                  1};
  const int count = given.tiles_of_a * given.tiles_of_b, room = runtime.multiprocessors() * (S::kB <= 64 ? 2 : 1);
  given.splits = splits_of(count, given.stages, room, S::kB <= 64 ? 4 : 2);
  const int blocks = given.splits > 1 ? count * given.splits : std::min(count, room);
  launch_clusters(runtime, fp8_hopper_kernel<T, S>, static_cast<unsigned>(given.splits), static_cast<unsigned>(blocks),
                  S::kThreads, sizeof(typename S::Shared), given);
}

template <typename T, bool kBlocks>
static void run_sized(const Runtime& runtime, const ByteProduct& product) {
  if (product.m <= 16)
    run<T, Fp8Tile<16, true, kBlocks, 5>>(runtime, product);
  else if (product.m <= 32)
    run<T, Fp8Tile<32, true, kBlocks, 5>>(runtime, product);
  else if (product.m <= 64)
    run<T, Fp8Tile<64, true, kBlocks, 4>>(runtime, product);
  else if (blocks_for(product.m, kRowsOfA) * blocks_for(product.n, 256) * 4 >=
           static_cast<unsigned>(runtime.multiprocessors()) * 3)
    run<T, Fp8Tile<256, false, kBlocks, 4>>(runtime, product);
  else
    run<T, Fp8Tile<128, false, kBlocks, 6>>(runtime, product);
}

template <typename T>
static void run_dtype(const Runtime& runtime, const ByteProduct& product) {
  product.blocks ? run_sized<T, true>(runtime, product) : run_sized<T, false>(runtime, product);
}

void multiply_fp8_on_hopper(const Runtime& runtime, const ByteProduct& product) {
  product.dtype == DType::float16 ? run_dtype<f16>(runtime, product) : run_dtype<bf16>(runtime, product);
}

}  // namespace vllmlite::cuda
