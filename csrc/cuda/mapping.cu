#include <cstdint>

#include "cuda/driver.cuh"
#include "cuda/mapping.hpp"

namespace vllmlite::cuda {

// The driver's functions of virtual memory.
struct VirtualMemory {
  decltype(&cuMemGetAllocationGranularity) granularity =
      driver_function<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity");
  decltype(&cuMemAddressReserve) reserve = driver_function<decltype(&cuMemAddressReserve)>("cuMemAddressReserve");
  decltype(&cuMemAddressFree) free = driver_function<decltype(&cuMemAddressFree)>("cuMemAddressFree");
  decltype(&cuMemCreate) create = driver_function<decltype(&cuMemCreate)>("cuMemCreate");
  decltype(&cuMemRelease) release = driver_function<decltype(&cuMemRelease)>("cuMemRelease");
  decltype(&cuMemMap) map = driver_function<decltype(&cuMemMap)>("cuMemMap");
  decltype(&cuMemUnmap) unmap = driver_function<decltype(&cuMemUnmap)>("cuMemUnmap");
  decltype(&cuMemSetAccess) set_access = driver_function<decltype(&cuMemSetAccess)>("cuMemSetAccess");
};

static const VirtualMemory& driver() {
  static const VirtualMemory found;
  return found;
}

static void check_driver(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return;
  const std::string message = std::string(call) + ": error " + std::to_string(result);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) throw OutOfMemory(message);
  throw Error(message);
}

static CUdeviceptr address(void* data) { return reinterpret_cast<CUdeviceptr>(data); }

static CUmemAllocationProp device_memory(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  return properties;
}

Mapping::Mapping(int device, std::size_t bytes) : device_(device) {
  const DeviceGuard guard(device);
  const CUmemAllocationProp properties = device_memory(device);
  std::size_t unit = 0;
  check_driver(driver().granularity(&unit, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
               "cuMemGetAllocationGranularity");
  size_ = (bytes + unit - 1) / unit * unit;
  CUdeviceptr reserved = 0;
  check_driver(driver().reserve(&reserved, size_, 0, 0, 0), "cuMemAddressReserve");
  data_ = reinterpret_cast<void*>(reserved);
  try {
    map();
  } catch (...) {
    (void)driver().free(reserved, size_);
    throw;
  }
}

Mapping::~Mapping() {
  // These calls fail only once the CUDA context is gone, and the memory with it.
  if (mapped_) {
    int previous = 0;
    (void)cudaGetDevice(&previous);
    (void)cudaSetDevice(device_);
    (void)cudaDeviceSynchronize();
    (void)cudaSetDevice(previous);
    (void)driver().unmap(address(data_), size_);
  }
  (void)driver().free(address(data_), size_);
  if (kept_ != nullptr) (void)cudaFreeHost(kept_);
}

void Mapping::map() {
  const CUmemAllocationProp properties = device_memory(device_);
  CUmemGenericAllocationHandle memory = 0;
  check_driver(driver().create(&memory, size_, &properties, 0), "cuMemCreate");
  const CUresult result = driver().map(address(data_), size_, 0, memory, 0);
  (void)driver().release(memory);  // the mapping keeps the memory
  check_driver(result, "cuMemMap");
  CUmemAccessDesc access{};
  access.location = properties.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  const CUresult allowed = driver().set_access(address(data_), size_, &access, 1);
  if (allowed != CUDA_SUCCESS) (void)driver().unmap(address(data_), size_);
  check_driver(allowed, "cuMemSetAccess");
  mapped_ = true;
}

void Mapping::release(bool keep) {
  if (!mapped_) return;
  const DeviceGuard guard(device_);
  if (keep) {
    void* copy = nullptr;
    VLLMLITE_CUDA_CHECK(cudaHostAlloc, &copy, size_, cudaHostAllocDefault);
    const cudaError_t status = cudaMemcpy(copy, data_, size_, cudaMemcpyDeviceToHost);
    if (status != cudaSuccess) (void)cudaFreeHost(copy);
    check(status, "cudaMemcpy");
    kept_ = copy;
  }
  check_driver(driver().unmap(address(data_), size_), "cuMemUnmap");
  mapped_ = false;
}

void Mapping::restore() {
  const DeviceGuard guard(device_);
  if (!mapped_) map();
  if (kept_ == nullptr) return;
  VLLMLITE_CUDA_CHECK(cudaMemcpy, data_, kept_, size_, cudaMemcpyHostToDevice);
  VLLMLITE_CUDA_CHECK(cudaFreeHost, kept_);
  kept_ = nullptr;
}

}  // namespace vllmlite::cuda
