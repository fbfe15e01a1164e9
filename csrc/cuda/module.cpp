// vllmlite._cuda: the CUDA backend's extension module. Importing it asks nothing of the driver.
#include "contract/bind.hpp"
#include "cuda/bind_backend.hpp"
#include "cuda/device.hpp"
#include "propose/bind_propose.hpp"
#include "tensor/bind_tensor.hpp"

namespace py = pybind11;
namespace cuda = vllmlite::cuda;
using vllmlite::DType;
using vllmlite::Tensor;

namespace {

std::pair<int, int> version(int packed) { return {packed / 1000, packed % 1000 / 10}; }

py::dict device_dict(const cuda::DeviceInfo& device) {
  py::dict result;
  result["index"] = device.index;
  result["name"] = device.name;
  result["compute_capability"] = std::pair(device.major, device.minor);
  result["total_bytes"] = device.total_bytes;
  result["multiprocessors"] = device.multiprocessors;
  return result;
}

py::dict probe() {
  const cuda::Probe found = cuda::probe();
  py::list devices;
  for (const cuda::DeviceInfo& device : found.devices) devices.append(device_dict(device));
  py::dict result;
  result["runtime_version"] = version(found.runtime_version);
  result["driver_version"] =
      found.driver_version == 0 ? py::object(py::none()) : py::cast(version(found.driver_version));
  result["devices"] = devices;
  result["reason"] = found.reason.empty() ? py::object(py::none()) : py::cast(found.reason);
  return result;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA backend of vllmlite.";
  module.attr("API") = vllmlite::kInterfaceVersion;

  static py::exception<cuda::Error> cuda_error(module, "CudaError", PyExc_RuntimeError);
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const cuda::OutOfMemory& out_of_memory) {
      py::set_error(PyExc_MemoryError, out_of_memory.what());
    } catch (const cuda::Error& other) {
      py::set_error(cuda_error, other.what());
    }
  });

  vllmlite::bind_propose(module);
  vllmlite::bind_tensor(module, [](vllmlite::Device device) {
    if (device.type == vllmlite::DeviceType::cuda) cuda::synchronize(device.index);
  });

  module.def("probe", &probe,
             "The devices, and the versions of the driver and of the runtime; without a device, `reason` says why.");
  module.def(
      "memory",
      [](int device) {
        const cuda::Memory memory = cuda::memory(device);
        return std::pair(memory.free_bytes, memory.total_bytes);
      },
      py::arg("device") = 0, "(free, total) bytes of a device; creates its context.");
  module.def(
      "empty",
      [](const std::vector<std::int64_t>& shape, const std::string& dtype, int device) {
        return cuda::empty(shape, vllmlite::dtype_from_name(dtype), device);
      },
      py::arg("shape"), py::arg("dtype"), py::arg("device") = 0, "Uninitialised memory on a device.");
  module.def(
      "copy",
      [](const py::object& source, const py::object& target) {
        const vllmlite::Tensor from = vllmlite::tensor_from_python(source);
        const vllmlite::Tensor to = vllmlite::tensor_from_python(target);
        const py::gil_scoped_release released;
        cuda::copy(from, to);
      },
      py::arg("source"), py::arg("target"), "Copy host to device, device to host, or within a device.");
  cuda::bind_backend(module);
  module.def("synchronize", &cuda::synchronize, py::call_guard<py::gil_scoped_release>(), py::arg("device") = 0);
}
