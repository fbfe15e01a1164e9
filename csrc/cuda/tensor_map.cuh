// Descriptions of tensors for the copies of boxes that hopper.cuh starts.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>

#include "cuda/driver.cuh"

namespace vllmlite::cuda {

struct TensorMapDimension {
  std::int64_t size;
  std::int64_t stride;  // in elements; of the first, 1
  int box;
};

// Boxes of a matrix of 16-bit floats or bytes, or of a stack of matrices, swizzled as hopper.cuh says, zeros where a
// box lies outside.
template <std::size_t kRank>
CUtensorMap tensor_map(const void* data, DType dtype, const TensorMapDimension (&dimensions)[kRank]) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  CUtensorMap map;
  cuuint64_t sizes[kRank], strides[kRank];
  cuuint32_t box[kRank], steps[kRank];
  for (std::size_t i = 0; i < kRank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(dimensions[i].size);
    strides[i] = static_cast<cuuint64_t>(dimensions[i].stride) * item_size(dtype);
    box[i] = static_cast<cuuint32_t>(dimensions[i].box);
    steps[i] = 1;
  }
  const auto type = dtype == DType::uint8     ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                    : dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(&map, type, kRank, const_cast<void*>(data), sizes, strides + 1, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw Error("cuTensorMapEncodeTiled: error " + std::to_string(result));
  return map;
}

}  // namespace vllmlite::cuda
