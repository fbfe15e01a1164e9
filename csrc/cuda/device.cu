#include "cuda/check.cuh"

namespace vllmlite::cuda {

static std::string no_device_reason(cudaError_t status, int driver_version) {
  const std::string error = std::string("cudaGetDeviceCount: ") + cudaGetErrorString(status);
  return driver_version == 0 ? "no NVIDIA driver is installed or loaded (" + error + ")" : error;
}

Probe probe() {
  Probe result;
  VLLMLITE_CUDA_CHECK(cudaRuntimeGetVersion, &result.runtime_version);
  VLLMLITE_CUDA_CHECK(cudaDriverGetVersion, &result.driver_version);
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    result.reason = no_device_reason(status, result.driver_version);
    return result;
  }
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    VLLMLITE_CUDA_CHECK(cudaGetDeviceProperties, &properties, index);
    result.devices.push_back({index, properties.name, properties.major, properties.minor, properties.totalGlobalMem,
                              properties.multiProcessorCount});
  }
  if (count == 0) result.reason = "the driver lists no CUDA device";
  return result;
}

Memory memory(int device) {
  const DeviceGuard guard(device);
  Memory result{};
  VLLMLITE_CUDA_CHECK(cudaMemGetInfo, &result.free_bytes, &result.total_bytes);
  return result;
}

Tensor empty(const std::vector<std::int64_t>& shape, DType dtype, int device) {
  const DeviceGuard guard(device);
  Tensor tensor;
  tensor.dtype = dtype;
  tensor.device = {DeviceType::cuda, device};
  tensor.shape = shape;
  const std::size_t bytes = checked_bytes(shape, dtype);
  if (bytes == 0) return tensor;
  VLLMLITE_CUDA_CHECK(cudaMalloc, &tensor.data, bytes);
  tensor.owner = std::shared_ptr<void>(tensor.data, [](void* pointer) {
    (void)cudaFree(pointer);  // fails only once the CUDA context is gone, and the memory with it
  });
  return tensor;
}

void copy(const Tensor& source, const Tensor& target) {
  if (source.dtype != target.dtype)
    throw TypeError("copy: source is " + describe(source) + ", target is " + describe(target));
  if (source.shape != target.shape)
    throw std::invalid_argument("copy: source is " + describe(source) + ", target is " + describe(target));
  if (target.readonly) throw std::invalid_argument("copy: the target is read-only");
  const Device device = source.device.type == DeviceType::cuda ? source.device : target.device;
  if (device.type != DeviceType::cuda) throw std::invalid_argument("copy: neither side is on a CUDA device");
  if (target.device.type == DeviceType::cuda && target.device != device)
    throw std::invalid_argument("copy: source is on " + name(source.device) + ", target on " + name(target.device));
  if (source.bytes() == 0) return;
  const DeviceGuard guard(device.index);
  VLLMLITE_CUDA_CHECK(cudaMemcpy, target.data, source.data, source.bytes(), cudaMemcpyDefault);
}

void synchronize(int device) {
  const DeviceGuard guard(device);
  VLLMLITE_CUDA_CHECK(cudaDeviceSynchronize);
}

}  // namespace vllmlite::cuda
