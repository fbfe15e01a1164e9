#include "cpu/bind_ranks.hpp"

#include <pybind11/stl.h>

#include "cpu/collectives.hpp"
#include "tensor/bind_tensor.hpp"

namespace py = pybind11;

namespace vllmlite::cpu {

namespace {

std::optional<py::bytes> receive_message(Ranks& ranks, double seconds) {
  std::optional<std::string> message;
  {
    const py::gil_scoped_release released;
    message = ranks.receive(seconds);
  }
  if (!message) return std::nullopt;
  return py::bytes(*message);
}

}  // namespace

void bind_ranks(py::module_& module, py::class_<Runtime>& runtime) {
  py::class_<Ranks, std::shared_ptr<Ranks>>(module, "Ranks", py::module_local(),
                                            "Shared memory of the processes that compute a model together.")
      .def(py::init<int, int, int>(), py::arg("fd"), py::arg("rank"), py::arg("world"),
           "Map the memory behind descriptor `fd`, which has `memory_size(world)` zero bytes. Rank -1 is the driver.")
      .def_static("memory_size", &Ranks::bytes, py::arg("world"))
      .def(
          "send",
          [](Ranks& self, const py::bytes& message) {
            const std::string_view view(message);
            const py::gil_scoped_release released;
            return self.send(view);
          },
          "Send a message: the driver to all ranks, a rank to the driver. False if the ranks are aborted.")
      .def("receive", &receive_message, py::arg("seconds"),
           "The next message; None if none comes in time (negative: for ever), a signal comes, or after abort.")
      .def("abort", &Ranks::abort, "Make every wait of every process return at once.")
      .def_property_readonly("rank", &Ranks::rank)
      .def_property_readonly("world", &Ranks::world)
      .def_property_readonly("aborted", &Ranks::aborted)
      .def("start_heartbeat", &Ranks::start_heartbeat, py::arg("watched"),
           "Show that this process runs, from a thread, and end it when the other end of socket `watched` is closed.")
      .def("silence", &Ranks::silence, py::arg("rank"), "Seconds since the rank's last sign of life; -1: none yet.")
      .def("limit", &Ranks::limit, py::arg("seconds"), "Set how long a collective operation may take.")
      .def_property_readonly("late", &Ranks::late,
                             "A rank that has not come to a collective operation in time, or -1.");
  py::class_<Exchange, std::shared_ptr<Exchange>>(module, "Exchange", py::module_local(),
                                                  "The collective operations of ranks `first` to `first + size - 1`.")
      .def(py::init<std::shared_ptr<Ranks>, int, int, int>(), py::arg("ranks"), py::arg("first"), py::arg("size"),
           py::arg("channel") = 0, "Two exchanges in which a rank takes part need a channel each: 0 and 1.");
  runtime.def("all_reduce", &all_reduce)
      .def("all_gather", &all_gather)
      .def("send", &send)
      .def("receive", [](Runtime& self, std::vector<std::int64_t> shape, const std::string& dtype, int from,
                         const std::shared_ptr<Ranks>& ranks) {
        return receive(self, std::move(shape), dtype_from_name(dtype), from, ranks);
      });
}

}  // namespace vllmlite::cpu
