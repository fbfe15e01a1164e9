#include "propose/bind_propose.hpp"

#include <pybind11/stl.h>

#include "propose/sequences.hpp"

namespace py = pybind11;

namespace vllmlite {

namespace {

// Appends the ids that a step sampled in `slots`, and returns the drafts of those that want any.
py::list propose(Sequences& self, const py::list& slots, std::int64_t admissions, const py::list& token_ids,
                 const py::list& wanted) {
  if (slots.size() != token_ids.size() || slots.size() != wanted.size())
    throw std::invalid_argument("slots, token_ids and wanted are not of one length");
  py::list drafts(slots.size());
  std::vector<std::int32_t> ids;
  for (std::size_t row = 0; row < slots.size(); ++row) {
    const int slot = slots[row].cast<int>();
    ids.clear();
    for (const py::handle id : py::list(token_ids[row])) ids.push_back(id.cast<std::int32_t>());
    const bool appended = self.append(slot, admissions, ids);
    const int count = wanted[row].cast<int>();
    drafts[row] = appended && count > 0 ? py::cast(self.draft(slot, count)) : py::list();
  }
  return drafts;
}

}  // namespace

void bind_propose(py::module_& module) {
  py::class_<Sequences>(module, "Sequences", py::module_local(), "The texts of all slots, for the look-up of drafts.")
      .def_property_readonly("num_admissions", &Sequences::num_admissions)
      .def("admit", &Sequences::admit)
      .def("propose", &propose);
  py::class_<NgramSequences, Sequences>(module, "NgramSequences", py::module_local())
      .def(py::init<int, int, int>(), py::arg("max_slots"), py::arg("shortest"), py::arg("longest"));
  py::class_<SuffixSequences, Sequences>(module, "SuffixSequences", py::module_local())
      .def(py::init<int, int, double, double, int>(), py::arg("max_slots"), py::arg("depth"), py::arg("factor"),
           py::arg("least_probability"), py::arg("earlier"));
}

}  // namespace vllmlite
