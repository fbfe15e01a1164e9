#include "tensor/bind_tensor.hpp"

#include <pybind11/stl.h>

#include <optional>
#include <utility>

#include "tensor/dlpack_abi.hpp"

namespace py = pybind11;

namespace vllmlite {

namespace {

constexpr const char* kCapsule = "dltensor";
constexpr const char* kCapsuleVersioned = "dltensor_versioned";

// ---- DLPack → Tensor

DType dtype_from(dlpack::DataType type) {
  if (type.lanes == 1) {
    switch (type.code << 8 | type.bits) {
      case dlpack::kFloat << 8 | 64:
        return DType::float64;
      case dlpack::kFloat << 8 | 32:
        return DType::float32;
      case dlpack::kFloat << 8 | 16:
        return DType::float16;
      case dlpack::kBfloat << 8 | 16:
        return DType::bfloat16;
      case dlpack::kInt << 8 | 64:
        return DType::int64;
      case dlpack::kInt << 8 | 32:
        return DType::int32;
      case dlpack::kInt << 8 | 16:
        return DType::int16;
      case dlpack::kInt << 8 | 8:
        return DType::int8;
      case dlpack::kUInt << 8 | 8:
        return DType::uint8;
      case dlpack::kBool << 8 | 8:
        return DType::boolean;
      default:
        break;
    }
  }
  throw TypeError("DLPack type (code " + std::to_string(type.code) + ", " + std::to_string(type.bits) + " bits, " +
                  std::to_string(type.lanes) + " lanes) has no Tensor dtype");
}

Device device_from(dlpack::Device device) {
  switch (device.type) {
    case dlpack::kCpu:
      return {DeviceType::cpu, 0};
    case dlpack::kCuda:
      return {DeviceType::cuda, device.id};
    default:
      throw TypeError("DLPack device type " + std::to_string(device.type) + " is neither the CPU nor CUDA");
  }
}

Tensor view(const dlpack::DLTensor& source) {
  Tensor tensor;
  tensor.dtype = dtype_from(source.dtype);
  tensor.device = device_from(source.device);
  tensor.shape.assign(source.shape, source.shape + source.ndim);
  checked_bytes(tensor.shape, tensor.dtype);
  std::int64_t expected = 1;
  for (int axis = source.ndim - 1; axis >= 0; --axis) {
    const std::int64_t extent = tensor.shape[axis];
    // The stride of an axis of size 1 is never used, and producers may leave any value there.
    if (source.strides != nullptr && extent > 1 && source.strides[axis] != expected && tensor.size() > 0)
      throw std::invalid_argument("only contiguous memory can be shared: axis " + std::to_string(axis) + " of shape " +
                                  describe(tensor.shape) + " has stride " + std::to_string(source.strides[axis]) +
                                  ", not " + std::to_string(expected));
    expected *= extent;
  }
  tensor.data = static_cast<char*>(source.data) + source.byte_offset;
  return tensor;
}

template <typename Managed>
Tensor adopt(PyObject* capsule, const char* capsule_name, const char* used_name) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, capsule_name));
  if (managed == nullptr) throw py::error_already_set();
  bool readonly = false;
  if constexpr (requires { managed->flags; }) {
    if (managed->major != dlpack::kMajor)
      throw TypeError("DLPack major version " + std::to_string(managed->major) + " is not " +
                      std::to_string(dlpack::kMajor));
    readonly = (managed->flags & dlpack::kReadOnly) != 0;
  }
  Tensor tensor = view(managed->tensor);
  tensor.readonly = readonly;
  // On a failure up to here the capsule keeps its name, and its own destructor frees the memory.
  if (PyCapsule_SetName(capsule, used_name) != 0) throw py::error_already_set();
  tensor.owner = std::shared_ptr<void>(managed, [](void* pointer) {
    auto* held = static_cast<Managed*>(pointer);
    if (held->deleter == nullptr) return;
    const py::gil_scoped_acquire gil;  // the producer may release a Python object
    held->deleter(held);
  });
  return tensor;
}

py::object request_capsule(py::handle object) {
  const py::object dlpack_method = object.attr("__dlpack__");
  py::dict arguments;
  const auto device = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  if (device.first == dlpack::kCuda) arguments["stream"] = 1;  // the legacy default stream, which is ours
  py::dict versioned(arguments);
  versioned["max_version"] = py::make_tuple(dlpack::kMajor, dlpack::kMinor);
  try {
    return dlpack_method(**versioned);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // a producer from before DLPack 1.0 does not know max_version
  }
  return dlpack_method(**arguments);
}

// ---- Tensor → DLPack

dlpack::DataType type_of(DType dtype) {
  const auto bits = static_cast<std::uint8_t>(item_size(dtype) * 8);
  switch (dtype) {
    case DType::float64:
    case DType::float32:
    case DType::float16:
      return {dlpack::kFloat, bits, 1};
    case DType::bfloat16:
      return {dlpack::kBfloat, bits, 1};
    case DType::uint8:
      return {dlpack::kUInt, bits, 1};
    case DType::boolean:
      return {dlpack::kBool, bits, 1};
    default:
      return {dlpack::kInt, bits, 1};
  }
}

dlpack::Device device_of(Device device) {
  return {device.type == DeviceType::cpu ? dlpack::kCpu : dlpack::kCuda, device.index};
}

template <typename Managed>
struct Export {
  Managed managed{};
  Tensor tensor;
  std::vector<std::int64_t> strides;
};

template <typename Managed>
py::capsule make_capsule(const Tensor& tensor, const char* capsule_name) {
  auto held = std::make_unique<Export<Managed>>();
  held->tensor = tensor;
  held->strides.assign(tensor.shape.size(), 1);
  for (std::size_t axis = tensor.shape.size(); axis-- > 1;)
    held->strides[axis - 1] = held->strides[axis] * tensor.shape[axis];
  held->managed.tensor = {tensor.data,
                          device_of(tensor.device),
                          static_cast<std::int32_t>(tensor.shape.size()),
                          type_of(tensor.dtype),
                          held->tensor.shape.data(),
                          held->strides.data(),
                          0};
  if constexpr (requires { held->managed.flags; }) {
    held->managed.major = dlpack::kMajor;
    held->managed.minor = dlpack::kMinor;
    held->managed.flags = tensor.readonly ? dlpack::kReadOnly : 0;
  }
  held->managed.context = held.get();
  held->managed.deleter = [](Managed* managed) { delete static_cast<Export<Managed>*>(managed->context); };
  // A consumer renames the capsule when it takes ownership; if it still has its first name, nobody has.
  PyObject* capsule = PyCapsule_New(&held->managed, capsule_name, [](PyObject* self) {
    const char* current = PyCapsule_GetName(self);
    if (current == nullptr || !PyCapsule_IsValid(self, current)) return;
    if (std::string_view(current).substr(0, 5) == "used_") return;
    auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(self, current));
    managed->deleter(managed);
  });
  if (capsule == nullptr) throw py::error_already_set();
  (void)held.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

py::capsule to_capsule(const Tensor& tensor, const std::optional<std::pair<int, int>>& max_version,
                       const std::optional<std::pair<int, int>>& dl_device, std::optional<bool> copy) {
  const dlpack::Device device = device_of(tensor.device);
  if (dl_device && *dl_device != std::pair<int, int>(device.type, device.id))
    throw py::buffer_error("a tensor on " + name(tensor.device) + " is exported to its own device only");
  if (copy.value_or(false)) throw py::buffer_error("a tensor is exported without a copy only");
  if (max_version && max_version->first >= static_cast<int>(dlpack::kMajor))
    return make_capsule<dlpack::ManagedVersioned>(tensor, kCapsuleVersioned);
  if (tensor.readonly) throw py::buffer_error("a read-only tensor needs a consumer that speaks DLPack 1.0");
  return make_capsule<dlpack::Managed>(tensor, kCapsule);
}

}  // namespace

Tensor tensor_from_python(py::handle object) {
  if (py::isinstance<Tensor>(object)) return object.cast<Tensor>();
  if (!py::hasattr(object, "__dlpack__") || !py::hasattr(object, "__dlpack_device__"))
    throw TypeError("expected a tensor that speaks DLPack, not " +
                    py::type::of(object).attr("__name__").cast<std::string>());
  const py::object capsule = request_capsule(object);
  if (PyCapsule_IsValid(capsule.ptr(), kCapsuleVersioned) != 0)
    return adopt<dlpack::ManagedVersioned>(capsule.ptr(), kCapsuleVersioned, "used_dltensor_versioned");
  return adopt<dlpack::Managed>(capsule.ptr(), kCapsule, "used_dltensor");
}

void bind_tensor(py::module_& module, std::function<void(Device)> before_export) {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const TypeError& type_error) {
      py::set_error(PyExc_TypeError, type_error.what());
    }
  });

  py::class_<Tensor>(module, "Tensor", py::module_local(), "Typed, contiguous memory on one device.")
      .def_static("from_dlpack", &tensor_from_python, py::arg("tensor"), "A zero-copy view of a DLPack tensor.")
      .def_property_readonly("shape", [](const Tensor& self) { return py::tuple(py::cast(self.shape)); })
      .def_property_readonly("dtype", [](const Tensor& self) { return name(self.dtype); })
      .def_property_readonly("device", [](const Tensor& self) { return name(self.device); })
      .def_property_readonly("nbytes", &Tensor::bytes)
      .def_readonly("readonly", &Tensor::readonly)
      .def("__repr__", [](const Tensor& self) { return "<Tensor " + describe(self) + ">"; })
      .def("__dlpack_device__",
           [](const Tensor& self) {
             const dlpack::Device device = device_of(self.device);
             return std::pair<int, int>(device.type, device.id);
           })
      .def(
          "__dlpack__",
          [before_export = std::move(before_export)](
              const Tensor& self, const py::object& /*stream*/, std::optional<std::pair<int, int>> max_version,
              std::optional<std::pair<int, int>> dl_device, std::optional<bool> copy) {
            if (before_export) before_export(self.device);
            return to_capsule(self, max_version, dl_device, copy);
          },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none());
}

}  // namespace vllmlite
