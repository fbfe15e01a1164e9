// Weights in groups of integers: laid out when they are loaded, dequantised for products of many rows, and multiplied
// by one of the kernels of grouped_product.cuh for few.
#include <algorithm>

#include "cuda/grouped_integers.cuh"

namespace vllmlite::cuda {

constexpr unsigned kThreads = 256;
// Rows of x up to which the integers are multiplied. Above, dequantising the weight costs less than what cuBLASLt and
// its larger tiles save: measured on an H200, and half of it guessed for other chips.
constexpr int kMostRowsOnHopper = 256, kMostRows = 64;
// The skinny kernel is used for up to kSkinnyRows rows of x, and on Hopper its own for more than kRowsOfTiles.
constexpr int kSkinnyRows = 8, kRowsOfTiles = 64;

// ---- Layout

// One thread for each 32-bit word of integers.
static __global__ void lay_out_integers_kernel(const std::uint8_t* from, std::uint32_t* to, int bits, int rows,
                                               int columns, int row_bytes, int stages, std::int64_t count) {
  wait_for_previous();
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const int words = bits * 2;  // of a lane's in a stage
  const int lane = static_cast<int>(at / 4 % 32), word = static_cast<int>(at / 128 % (words / 4) * 4 + at % 4);
  const std::int64_t warps = at / (words * 32);
  const int warp = static_cast<int>(warps % kGroupedWarps), stage = static_cast<int>(warps / kGroupedWarps % stages),
            tile = static_cast<int>(warps / kGroupedWarps / stages);
  const int row = tile * kTileRows + warp * 16 + lane / 4, column = stage * kStageColumns + lane % 4 * 2;
  std::uint32_t result = 0;
  for (int i = 0; i < 32 / bits; ++i) {  // by place, from the low bits on
    // Which of a0 to a3 it is, and which of that one's two columns.
    const int a = bits == 4 ? i % 4 : word % 2 * 2 + i / 2, next = bits == 4 ? i / 4 : i % 2;
    const int step = bits == 4 ? word : word / 2;
    const int r = row + a % 2 * 8, c = column + step * 16 + a / 2 * 8 + next;
    if (r >= rows || c >= columns) continue;
    const std::uint8_t* bytes = from + static_cast<std::int64_t>(r) * row_bytes;
    const std::uint32_t integer = bits == 4 ? bytes[c / 2] >> (c % 2 * 4) & 15 : bytes[c];
    result |= integer << (i * bits);
  }
  to[at] = result;
}

// One thread for each group of a row, `width` columns of the layout or more.
static __global__ void lay_out_scales_kernel(const float* scales, const std::uint8_t* zeros, std::uint32_t* to,
                                             int middle, int rows, int stored_groups, int group, int width, int groups,
                                             std::int64_t count) {
  wait_for_previous();
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const int place = static_cast<int>(at % kTileRows), of_tile = static_cast<int>(at / kTileRows % groups);
  const std::int64_t row = at / kTileRows / groups * kTileRows + place / 16 * 16 + place % 2 * 8 + place % 16 / 2;
  const std::int64_t stored = static_cast<std::int64_t>(of_tile) * width / group;
  std::uint32_t result = 0;
  if (row < rows && stored < stored_groups) {
    const std::int64_t from = row * stored_groups + stored;
    const auto zero = static_cast<std::uint32_t>(zeros == nullptr ? middle : zeros[from]);
    result = ((__float_as_uint(scales[from]) + 0x80U) & 0xffffff00U) | zero;
  }
  to[at] = result;
}

bool takes_groups(const Runtime& runtime, int bits, int columns, int group) {
  const int least = runtime.dtype() == DType::bfloat16 ? 80 : 75;  // tensor cores that multiply the dtype
  const bool divides = group >= columns || group % 32 == 0;
  return runtime.dtype() != DType::float32 && runtime.capability() >= least && (bits == 4 || bits == 8) && divides &&
         columns % 8 == 0;
}

GroupedRows lay_out(Runtime& runtime, const StoredGroups& stored, std::optional<Tensor> order) {
  const int rows = static_cast<int>(stored.integers.shape[0]), columns = stored.columns;
  if (!takes_groups(runtime, stored.bits, columns, stored.group))
    throw std::invalid_argument("a weight of " + std::to_string(stored.bits) + " bits in groups of " +
                                std::to_string(stored.group) + " of " + std::to_string(columns) +
                                " columns: groups are multiples of 32, columns of 8");
  GroupedRows made{{stored.bits, rows, columns}, {}, {}, std::move(order)};
  const int stages = made.stages();
  if (stored.group >= columns)
    made.stages_of_group = stages;
  else if (stored.group % kStageColumns == 0)
    made.stages_of_group = stored.group / kStageColumns;
  else
    made.groups_of_stage = stored.group % 64 == 0 && stored.bits == 4 ? 2 : 4;
  const DeviceGuard guard(runtime.device());
  runtime.counters(1);  // which a recorded step could not make
  const std::int64_t padded = static_cast<std::int64_t>(made.tiles()) * kTileRows;
  made.weight =
      runtime.make({padded, static_cast<std::int64_t>(stages) * kStageColumns * stored.bits / 8}, DType::uint8);
  made.scales = runtime.make({made.tiles(), made.groups(), kTileRows}, DType::int32);
  const auto words = static_cast<std::int64_t>(made.weight.bytes() / 4);
  launch(runtime, lay_out_integers_kernel, blocks_for(words, kThreads), kThreads, 0,
         static_cast<const std::uint8_t*>(stored.integers.data), static_cast<std::uint32_t*>(made.weight.data),
         stored.bits, rows, columns, static_cast<int>(stored.integers.shape[1]), stages, words);
  const int width =
      made.groups_of_stage > 1 ? kStageColumns / made.groups_of_stage : kStageColumns * made.stages_of_group;
  launch(runtime, lay_out_scales_kernel, blocks_for(made.scales.size(), kThreads), kThreads, 0,
         static_cast<const float*>(stored.scales.data),
         static_cast<const std::uint8_t*>(stored.zeros ? stored.zeros->data : nullptr),
         static_cast<std::uint32_t*>(made.scales.data), 1 << (stored.bits - 1), rows,
         static_cast<int>(stored.scales.shape[1]), std::min(stored.group, stages * kStageColumns), width, made.groups(),
         made.scales.size());
  return made;
}

// ---- Dequantising
// Grid: (stages, tiles); block: 8 warps. A warp has its 16 rows in a stage, each lane the integers that it has as a
// first operand; their numbers go through shared memory, 16 rows of 128 a warp, from which they are written row by row.

template <typename T>
static __global__ __launch_bounds__(kGroupedWarps *
                                    32) void dequantise_kernel(const std::uint32_t* weight, const std::uint32_t* scales,
                                                               const std::int32_t* order, T* to, int bits, int rows,
                                                               int columns, int groups, int groups_of_stage,
                                                               int stages_of_group) {
  __shared__ T numbers[kGroupedWarps][16][kStageColumns + 16 / sizeof(T)];
  let_next_begin();
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int stage = static_cast<int>(blockIdx.x), stages = static_cast<int>(gridDim.x);
  const std::int64_t tile = blockIdx.y;
  const int words = bits * 2, first_row = static_cast<int>(tile) * kTileRows + warp * 16;
  const std::uint32_t* own = weight + ((tile * stages + stage) * kGroupedWarps + warp) * words * 32;
  for (int word = 0; word < words; ++word) {
    const std::uint32_t packed = own[(word / 4 * 32 + lane) * 4 + word % 4];
    const int step = bits == 4 ? word : word / 2;
    const int group =
        groups_of_stage > 1 ? stage * groups_of_stage + step * groups_of_stage / 8 : stage / stages_of_group;
    const auto [low, high] =
        *reinterpret_cast<const uint2*>(scales + (tile * groups + group) * kTileRows + warp * 16 + lane / 4 * 2);
    for (int i = 0; i < 32 / bits; ++i) {
      const int a = bits == 4 ? i % 4 : word % 2 * 2 + i / 2, next = bits == 4 ? i / 4 : i % 2;
      const std::uint32_t scale = a % 2 == 0 ? low : high;
      const int integer = static_cast<int>(packed >> (i * bits) & ((1U << bits) - 1)) - static_cast<int>(scale & 0xffU);
      numbers[warp][lane / 4 + a % 2 * 8][step * 16 + a / 2 * 8 + lane % 4 * 2 + next] =
          from_float<T>(static_cast<float>(integer) * float_of_bits(scale & 0xffffff00U));
    }
  }
  __syncwarp();
  const int first_column = stage * kStageColumns;
  for (int row = 0; row < 16 && first_row + row < rows; ++row) {
    T* out = to + static_cast<std::int64_t>(first_row + row) * columns;
    constexpr int kSize = 4;  // columns of a thread
    const int of_stage = lane * kSize, column = first_column + of_stage;
    if (order == nullptr && column + kSize <= columns && columns % kSize == 0) {
      *reinterpret_cast<Pack<T, kSize>*>(out + column) =
          *reinterpret_cast<const Pack<T, kSize>*>(&numbers[warp][row][of_stage]);
      continue;
    }
    for (int i = 0; i < kSize && column + i < columns; ++i)
      out[order == nullptr ? column + i : order[column + i]] = numbers[warp][row][of_stage + i];
  }
}

Tensor dequantise(Runtime& runtime, const std::vector<GroupedRows>& parts) {
  std::int64_t rows = 0;
  for (const GroupedRows& part : parts) rows += part.rows;
  Tensor made = runtime.make({rows, parts.at(0).columns}, runtime.dtype());
  const auto fill = [&](auto* to) {
    using T = Pointee<decltype(to)>;
    for (const GroupedRows& part : parts) {
      launch(runtime, dequantise_kernel<T>,
             dim3(static_cast<unsigned>(part.stages()), static_cast<unsigned>(part.tiles())), kGroupedWarps * 32, 0,
             static_cast<const std::uint32_t*>(part.weight.data), static_cast<const std::uint32_t*>(part.scales.data),
             static_cast<const std::int32_t*>(part.order ? part.order->data : nullptr), to, part.bits, part.rows,
             part.columns, part.groups(), part.groups_of_stage, part.stages_of_group);
      to += static_cast<std::int64_t>(part.rows) * part.columns;
    }
  };
  runtime.dtype() == DType::float16 ? fill(static_cast<f16*>(made.data)) : fill(static_cast<bf16*>(made.data));
  return made;
}

// ---- Products

template <typename Word>
static __global__ void gather_columns_kernel(const Word* from, const std::int32_t* order, Word* to, int columns) {
  let_next_begin();
  wait_for_previous();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * columns;
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (column < columns) to[row + column] = from[row + order[column]];
}

static Tensor in_order_of(Runtime& runtime, const Tensor& x, const Tensor& order) {
  Tensor made = runtime.make(x.shape, x.dtype);
  const int columns = static_cast<int>(x.shape[1]);
  launch(runtime, gather_columns_kernel<std::uint16_t>,
         dim3(static_cast<unsigned>(x.shape[0]), blocks_for(columns, kThreads)), kThreads, 0,
         static_cast<const std::uint16_t*>(x.data), static_cast<const std::int32_t*>(order.data),
         static_cast<std::uint16_t*>(made.data), columns);
  return made;
}

bool on_hopper(const Runtime& runtime) {
#ifdef VLLMLITE_HOPPER
  return runtime.capability() == 90;
#else
  (void)runtime;
  return false;
#endif
}

bool takes_grouped_product(const Runtime& runtime, int m) {
  return runtime.batch_invariant() || m <= (on_hopper(runtime) ? kMostRowsOnHopper : kMostRows);
}

void multiply_grouped(Runtime& runtime, const Tensor& x, const std::vector<GroupedRows>& parts, const Tensor* bias,
                      const Tensor& y) {
  std::int64_t first = 0;
  for (const GroupedRows& part : parts) {
    const Tensor own = part.order ? in_order_of(runtime, x, *part.order) : x;
    const auto at = static_cast<std::size_t>(first) * item_size(x.dtype);
    const GroupedProduct product{own.data,
                                 static_cast<const uint4*>(part.weight.data),
                                 static_cast<const std::uint32_t*>(part.scales.data),
                                 bias == nullptr ? nullptr : static_cast<const char*>(bias->data) + at,
                                 static_cast<char*>(y.data) + at,
                                 static_cast<int>(x.shape[0]),
                                 part.rows,
                                 part.columns,
                                 static_cast<int>(y.shape[1]),
                                 part.tiles(),
                                 part.stages(),
                                 part.groups(),
                                 part.bits,
                                 part.groups_of_stage,
                                 part.stages_of_group};
    if (!runtime.batch_invariant() && product.m <= kSkinnyRows && runtime.capability() >= 80)
      multiply_grouped_skinny(runtime, product);
    else if (!runtime.batch_invariant() && product.m > kRowsOfTiles && on_hopper(runtime))
      multiply_grouped_on_hopper(runtime, product);
    else
      multiply_in_tiles(runtime, product);
    first += part.rows;
  }
}

}  // namespace vllmlite::cuda
