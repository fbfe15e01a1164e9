#include "cpu/bind_ranks.hpp"

#include <pybind11/stl.h>

#include "cpu/collectives.hpp"
#include "cpu/link.hpp"
#include "tensor/bind_tensor.hpp"

namespace py = pybind11;

namespace vllmlite::cpu {

namespace {

// Waits for a message without the interpreter's lock.
template <typename Receive>
std::optional<py::bytes> receive_message(Receive receive) {
  std::optional<std::string> message;
  {
    const py::gil_scoped_release released;
    message = receive();
  }
  if (!message) return std::nullopt;
  return py::bytes(*message);
}

template <typename Channel>
bool send_message(Channel& channel, const py::bytes& message) {
  const std::string_view view(message);
  const py::gil_scoped_release released;
  return channel.send(view);
}

}  // namespace

void bind_ranks(py::module_& module, py::class_<Runtime>& runtime) {
  py::class_<Ranks, std::shared_ptr<Ranks>>(module, "Ranks", py::module_local(),
                                            "Shared memory of the processes that compute a model together.")
      .def(py::init<int, int, int, int, int>(), py::arg("fd"), py::arg("rank"), py::arg("world"), py::arg("first") = 0,
           py::arg("local") = -1,
           "Map the memory behind descriptor `fd`, which has `memory_size(world)` zero bytes. Rank -1 is the driver; "
           "`local` ranks from `first` on are on this host and get its messages.")
      .def_static("memory_size", &Ranks::bytes, py::arg("world"))
      .def("send", &send_message<Ranks>, py::arg("message"),
           "Send a message: the driver to all ranks, a rank to the driver. False if the ranks are aborted.")
      .def(
          "receive", [](Ranks& self, double seconds) { return receive_message([&] { return self.receive(seconds); }); },
          py::arg("seconds"),
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
  py::class_<Link>(module, "Link", py::module_local(), "A connection between the ranks' memories of two hosts.")
      .def(py::init([](std::shared_ptr<Ranks> ranks, int fd, const py::bytes& send_key, const py::bytes& receive_key,
                       int first, int count, int group, bool is_hub) {
             return std::make_unique<Link>(std::move(ranks), fd, send_key, receive_key, first, count, group, is_hub);
           }),
           py::arg("ranks"), py::arg("fd"), py::arg("send_key"), py::arg("receive_key"), py::arg("first"),
           py::arg("count"), py::arg("group"), py::arg("is_hub"),
           "Take over the connected socket `fd`. The node at one end, the other being the hub, has `count` ranks from "
           "`first` on; `group` ranks make up a stage of the pipeline.")
      .def_readonly_static("MOST_MESSAGE", &Link::kMostMessage)
      .def("send", &send_message<Link>, py::arg("message"), "Send a message. False if the link has ended.")
      .def(
          "receive", [](Link& self) { return receive_message([&] { return self.receive(); }); },
          "Wait for a message. None if the link has ended.")
      .def_property_readonly("end", &Link::end, "Why the link has ended, or an empty string.")
      .def("flush", &Link::flush, py::call_guard<py::gil_scoped_release>(), "Wait until all has been sent.")
      .def(
          "close",
          [](Link& self, const py::bytes& goodbye) {
            const std::string_view view(goodbye);
            const py::gil_scoped_release released;
            self.close(view);
          },
          py::arg("goodbye"), "End the link, after a last message unless it is empty.");
  runtime.def("all_reduce", &all_reduce)
      .def("all_gather", &all_gather)
      .def("send", &send)
      .def("receive", [](Runtime& self, std::vector<std::int64_t> shape, const std::string& dtype, int from,
                         const std::shared_ptr<Ranks>& ranks) {
        return receive(self, std::move(shape), dtype_from_name(dtype), from, ranks);
      });
}

}  // namespace vllmlite::cpu
