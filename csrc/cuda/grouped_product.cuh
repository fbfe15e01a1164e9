// The kernels that multiply weights in groups of integers (grouped.hpp), and the description of a product they share.
#pragma once

#include <vector_types.h>

#include <type_traits>

#include "cuda/grouped.hpp"

namespace vllmlite::cuda {

// A product of x and rows of a weight that are alike.
struct GroupedProduct {
  const void* x;                // [m, k]
  const uint4* weight;          // [tiles][stages][warps][words of a lane][lanes]
  const std::uint32_t* scales;  // [tiles][groups][kTileRows]
  const void* bias;             // [n], or null
  void* y;                      // [m, stride], of which this product writes n columns
  int m, n, k, stride;
  int tiles, stages, groups;
  int bits, groups_of_stage;
  int stages_of_group;  // where groups are longer than a stage
};

// Any number of rows of x, on any chip with tensor cores. Under batch invariance, sums do not depend on the number.
void multiply_in_tiles(Runtime& runtime, const GroupedProduct& product);

// At most 8 rows, from sm_80 on.
void multiply_grouped_skinny(const Runtime& runtime, const GroupedProduct& product);

// Many rows, on sm_90a: by tiles of 128.
void multiply_grouped_on_hopper(const Runtime& runtime, const GroupedProduct& product);

// Whether the device is an sm_90 and this module has code for sm_90a.
bool on_hopper(const Runtime& runtime);

// Calls `function` with std::integral_constants of the bits and of the groups of a stage of a GroupedProduct or
// GroupedForm.
template <typename Product, typename Function>
void with_groups(const Product& product, Function&& function) {
  using std::integral_constant;
  if (product.bits == 8)
    product.groups_of_stage == 1 ? function(integral_constant<int, 8>(), integral_constant<int, 1>())
                                 : function(integral_constant<int, 8>(), integral_constant<int, 4>());
  else if (product.groups_of_stage == 1)
    function(integral_constant<int, 4>(), integral_constant<int, 1>());
  else
    product.groups_of_stage == 2 ? function(integral_constant<int, 4>(), integral_constant<int, 2>())
                                 : function(integral_constant<int, 4>(), integral_constant<int, 4>());
}

}  // namespace vllmlite::cuda
