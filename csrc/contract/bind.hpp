// How the extensions read what vllmlite/backends/base.py hands them, and hand back what it expects.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "contract/activation.hpp"
#include "contract/data.hpp"

namespace vllmlite {

// Version of what the Python side and the modules agree on; vllmlite/backends compares it. Debian's
// vllmlite-backend-api-N is it.
inline constexpr int kInterfaceVersion = 3;

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style | pybind11::array::forcecast>;

template <typename T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

SlotSpec slot_spec(const pybind11::object& given);
SlotParams slot_params(const pybind11::object& given);
HostBatch host_batch(const pybind11::object& given);

// std::invalid_argument for other names than the contract's; a gate's are fewer.
Activation activation_of(const std::string& name, bool gated);

std::optional<Rotation> rotation(const std::optional<Tensor>& cos_sin, int rotary_dim, bool interleaved);

std::vector<Tensor> listed(const Logprobs& found);
std::vector<Tensor> listed(const Sampled& found);

// The bytes of an array, contiguous and as many as `tensor` has; std::invalid_argument if they are not.
const void* bytes_for(const Tensor& tensor, const pybind11::array& bytes);

// The class of what lives a slot; its constructor is the module's own.
template <typename Slots>
pybind11::class_<Slots, std::shared_ptr<Slots>> bind_slots(pybind11::module_& module) {
  pybind11::class_<Slots, std::shared_ptr<Slots>> slots(module, "Slots", pybind11::module_local(),
                                                        "What lives a slot.");
  slots.def("set", [](Slots& self, int slot, const pybind11::object& params) { self.set(slot, slot_params(params)); })
      .def("append_blocks",
           [](Slots& self, const Array<std::int32_t>& ids, const Array<std::int32_t>& columns,
              const Array<std::int32_t>& blocks) { self.append_blocks(view(ids), view(columns), view(blocks)); });
  return slots;
}

}  // namespace vllmlite
