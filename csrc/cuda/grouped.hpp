// Weights in groups of 4-bit or 8-bit integers, each group with a scale and a zero, on the device: an element is
// (integer - zero) * scale.
//
// Rows are cut into tiles of kTileRows, columns into stages of kStageColumns, both padded. A warp has 16 rows of a
// tile. A stage is eight steps of 16 columns, the first operands of m16n8k16 (mma.cuh), of which lane = 4 group + quad
// holds eight integers: a0 (row group, columns 2 quad and the next), a1 (row group + 8), and a2, a3, which are the same
// 8 columns on.
//   4 bits: a 32-bit word a step; a_i is in bits 4 i to 4 i + 3 (the first column) and 16 + 4 i on (the next).
//   8 bits: two words a step; a0 and a1 in the first, a2 and a3 in the second, each in two bytes, first column first.
// A lane's words of a stage follow each other, four make one of 16 bytes: [tiles][stages][warps][words][lanes].
//
// Scales and zeros: a word for each group of a row. Its low 8 bits are the zero, the others those of the scale as
// float32, in which float16 and bfloat16 are exact: [tiles][groups][warps][8][2], a warp's rows in the order 0, 8, 1,
// 9, and so on. Groups shorter than a stage divide it: their number is that of the padded columns.
#pragma once

#include <optional>
#include <vector>

#include "cuda/runtime.hpp"

namespace vllmlite::cuda {

constexpr int kGroupedWarps = 8;               // of a block
constexpr int kTileRows = 16 * kGroupedWarps;  // of a weight
constexpr int kStageColumns = 128;

// The sizes that decide the layout.
struct GroupedForm {
  int bits, rows, columns;
  int groups_of_stage = 1, stages_of_group = 1;  // one of the two is 1

  int tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  int stages() const { return (columns + kStageColumns - 1) / kStageColumns; }
  int groups() const {
    return groups_of_stage > 1 ? stages() * groups_of_stage : (stages() + stages_of_group - 1) / stages_of_group;
  }
  bool operator==(const GroupedForm&) const = default;
};

// Rows of a weight that are alike in all of this.
struct GroupedRows : GroupedForm {
  Tensor weight, scales;        // as above, uint8 and int32
  std::optional<Tensor> order;  // int32 [columns]: the column of x that each column of the weight multiplies
};

// Such rows as checkpoints store them, on the device.
struct StoredGroups {
  Tensor integers;              // uint8 [rows, bytes]: 4 bits two a byte, the first column's in the low half
  Tensor scales;                // float32 [rows, groups]
  std::optional<Tensor> zeros;  // uint8 [rows, groups]; without them all are the middle integer
  int bits, columns, group;     // columns of a group
};

// Returns whether rows with groups of `group` columns can be stored in this layout and multiplied on the runtime's
// device in its dtype.
bool takes_groups(const Runtime& runtime, int bits, int columns, int group);
GroupedRows lay_out(Runtime& runtime, const StoredGroups& stored, std::optional<Tensor> order);

// The weight as a matrix of the runtime's dtype, columns in their own order.
Tensor dequantise(Runtime& runtime, const std::vector<GroupedRows>& parts);

// Whether products of m rows are multiplied from the integers; otherwise the weight is dequantised for each of them.
bool takes_grouped_product(const Runtime& runtime, int m);
// y = x @ w.T + bias of x [m, columns], in its dtype.
void multiply_grouped(Runtime& runtime, const Tensor& x, const std::vector<GroupedRows>& parts, const Tensor* bias,
                      const Tensor& y);

}  // namespace vllmlite::cuda
