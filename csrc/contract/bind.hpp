// Conversions between the Python objects of vllmlite/backends/base.py and the extensions' own types.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "contract/activation.hpp"
#include "contract/data.hpp"

namespace vllmlite {

// Version of the interface between the Python code and the extension modules, compared by vllmlite/backends. It is the
// N of the virtual Debian package vllmlite-backend-api-N.
inline constexpr int kInterfaceVersion = 7;

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style | pybind11::array::forcecast>;

template <typename T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

SlotSpec slot_spec(const pybind11::object& given);
SlotParams slot_params(const pybind11::object& given);
CacheSpec cache_spec(const pybind11::object& given);
HostBatch host_batch(const pybind11::object& given);
BeamRows beam_rows(const Array<std::int32_t>& rows, const Array<std::int32_t>& groups, const Array<float>& scores,
                   const Array<float>& temperatures);

// The activation of this name; `gated` ones exclude relu. std::invalid_argument for any other name.
Activation activation_of(const std::string& name, bool gated);

std::optional<Rotation> rotation(const std::optional<Tensor>& cos_sin, int rotary_dim, bool interleaved);

std::vector<Tensor> listed(const Logprobs& found);
std::vector<Tensor> listed(const Sampled& found);
std::vector<Tensor> listed(const Continuations& found);

// The bytes of a contiguous array; std::invalid_argument if it is not contiguous or not as large as `tensor`.
const void* bytes_for(const Tensor& tensor, const pybind11::array& bytes);

// Host memory for blocks: rows of `bytes` bytes. std::invalid_argument for another array, or one that is read-only.
std::span<std::byte> host_rows(const pybind11::array& rows, std::size_t bytes);

// Binds the per-slot state class `Slots`; the caller adds the constructor.
template <typename Slots>
pybind11::class_<Slots, std::shared_ptr<Slots>> bind_slots(pybind11::module_& module) {
  pybind11::class_<Slots, std::shared_ptr<Slots>> slots(module, "Slots", pybind11::module_local(),
                                                        "Per-slot state that is kept between steps.");
  slots.def("set", [](Slots& self, int slot, const pybind11::object& params) { self.set(slot, slot_params(params)); })
      .def("append_blocks",
           [](Slots& self, const Array<std::int32_t>& ids, const Array<std::int32_t>& columns,
              const Array<std::int32_t>& blocks) { self.append_blocks(view(ids), view(columns), view(blocks)); });
  return slots;
}

}  // namespace vllmlite
