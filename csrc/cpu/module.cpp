// vllmlite._cpu: the CPU backend's extension module.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "contract/bind.hpp"
#include "cpu/bind_ranks.hpp"
#include "cpu/blocks.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/ops.hpp"
#include "cpu/repack.hpp"
#include "propose/bind_propose.hpp"
#include "tensor/bind_tensor.hpp"

namespace py = pybind11;
namespace cpu = vllmlite::cpu;
using vllmlite::DType;
using vllmlite::Tensor;

namespace {

// Returns a tensor that shares the bytes of a numpy array and keeps the array alive.
Tensor over(const py::array& bytes, const std::string& dtype, const std::vector<std::int64_t>& shape) {
  Tensor tensor;
  tensor.dtype = vllmlite::dtype_from_name(dtype);
  tensor.shape = shape;
  tensor.data = const_cast<void*>(vllmlite::bytes_for(tensor, bytes));
  tensor.readonly = !bytes.writeable();
  tensor.owner = std::shared_ptr<void>(new py::array(bytes), [](void* held) {
    const py::gil_scoped_acquire gil;
    delete static_cast<py::array*>(held);
  });
  return tensor;
}

Tensor part_of(const std::shared_ptr<cpu::Batch>& batch, std::vector<std::int32_t>& data) {
  Tensor tensor;
  tensor.dtype = DType::int32;
  tensor.shape = {static_cast<std::int64_t>(data.size())};
  tensor.data = data.data();
  tensor.owner = batch;
  return tensor;
}

// Converts a ForwardBatch of numpy arrays.
std::shared_ptr<cpu::Batch> upload(cpu::Runtime& runtime, const py::object& host,
                                   const std::shared_ptr<cpu::Slots>& slots, int block_size) {
  {
    const py::gil_scoped_release released;
    runtime.flush();  // a pending step may sample the ids that this one starts with
  }
  return std::make_shared<cpu::Batch>(vllmlite::host_batch(host), slots, block_size);
}

constexpr const char* kSchemes[] = {"int8", "int4", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k", "w8a8"};

cpu::Packing packing_of(const std::string& name) {
  constexpr const char* kNames[] = {"rows", "words", "awq"};
  const auto found = std::find(std::begin(kNames), std::end(kNames), name);
  if (found == std::end(kNames)) throw std::invalid_argument("codes are not packed as " + name);
  return static_cast<cpu::Packing>(found - std::begin(kNames));
}

cpu::TileScheme scheme_of(const std::string& name) {
  const auto found = std::find(std::begin(kSchemes), std::end(kSchemes), name);
  if (found == std::end(kSchemes)) throw std::invalid_argument("there is no quantisation scheme " + name);
  return static_cast<cpu::TileScheme>(found - std::begin(kSchemes));
}

cpu::InputMode mode_of(const std::string& name) {
  for (const auto& [known, mode] : {std::pair{"symmetric", cpu::InputMode::symmetric},
                                    {"asymmetric", cpu::InputMode::asymmetric},
                                    {"constants", cpu::InputMode::constants}})
    if (name == known) return mode;
  throw std::invalid_argument("rows cannot be quantised as " + name);
}

py::array to_host(cpu::Runtime& runtime, const Tensor& tensor) {
  const Tensor result = tensor.dtype == DType::bfloat16 ? converted(runtime, tensor, DType::float32) : tensor;
  {
    const py::gil_scoped_release released;
    runtime.flush();
  }
  const std::string format(name(result.dtype));
  py::array array(py::dtype::from_args(py::str(format)), result.shape);
  std::memcpy(array.mutable_data(), result.data, result.bytes());
  return array;
}

// A recorded step: its phases, the batch that they read, and the tensors that they write. All recordings share the
// memory of these tensors.
struct Graph {
  std::shared_ptr<cpu::Recording> recording;
  std::shared_ptr<cpu::Batch> batch;
  std::vector<Tensor> outputs;
};

Graph capture(cpu::Runtime& runtime, const std::shared_ptr<cpu::Batch>& batch, const py::function& step) {
  {
    const py::gil_scoped_release released;
    runtime.begin_recording();
  }
  Graph graph;
  graph.batch = batch;
  try {
    graph.outputs = step().cast<std::vector<Tensor>>();
  } catch (...) {
    runtime.abandon_recording();
    throw;
  }
  {
    const py::gil_scoped_release released;
    graph.recording = runtime.end_recording();
  }
  for (Tensor& output : graph.outputs) output.owner = graph.recording->arena;
  return graph;
}

void replay(cpu::Runtime& runtime, const Graph& graph, const cpu::Batch& batch) {
  const py::gil_scoped_release released;
  runtime.flush();  // pending phases may still read the last replay's batch and outputs
  graph.batch->replace(batch);
  runtime.replay(*graph.recording);
}

void bind_data(py::module_& module) {
  py::class_<cpu::LinearPart>(module, "LinearPart", py::module_local(),
                              "Rows of a weight of grouped integers, in tiles.");
  py::class_<cpu::LinearWeight>(module, "LinearWeight", py::module_local(), "Parts of one weight, and a bias.")
      .def(py::init([](std::vector<Tensor> floats, std::optional<Tensor> bias) {
             std::vector<cpu::LinearPart> parts;
             for (Tensor& rows : floats) parts.push_back(cpu::float_part(std::move(rows)));
             return cpu::make_weight(std::move(parts), std::move(bias));
           }),
           py::arg("parts"), py::arg("bias") = py::none(), "Parts of floats [rows, in].")
      .def(py::init(&cpu::make_weight), py::arg("parts"), py::arg("bias") = py::none());
  py::class_<cpu::QuantizedPart>(module, "QuantizedPart", py::module_local(), "Rows of a quantised weight, in tiles.")
      .def(py::init([](const std::string& scheme, Tensor qweight, Tensor scales, std::optional<Tensor> sub_scales,
                       std::int64_t rows) {
             return cpu::QuantizedPart{scheme_of(scheme), std::move(qweight), std::move(scales), std::move(sub_scales),
                                       rows};
           }),
           py::arg("scheme"), py::arg("qweight"), py::arg("scales"), py::arg("sub_scales"), py::arg("rows"))
      .def_readonly("qweight", &cpu::QuantizedPart::qweight)
      .def_readonly("scales", &cpu::QuantizedPart::scales)
      .def_readonly("sub_scales", &cpu::QuantizedPart::sub_scales)
      .def_readonly("rows", &cpu::QuantizedPart::rows);
  py::class_<cpu::QuantizedWeight>(module, "QuantizedWeight", py::module_local(),
                                   "Parts of one weight of `in` columns, and a bias.")
      .def(py::init(&cpu::make_quantized), py::arg("parts"), py::arg("in"), py::arg("bias") = py::none());
  py::class_<cpu::Experts, std::shared_ptr<cpu::Experts>>(module, "Experts", py::module_local(),
                                                          "The weights of a mixture of experts, one per expert.")
      .def(py::init(&cpu::make_experts), py::arg("gate_up"), py::arg("down"));
  py::class_<cpu::LowRankTable, std::shared_ptr<cpu::LowRankTable>>(module, "LowRankTable", py::module_local(),
                                                                    "Changes of a weight by resident adapters.");
  py::class_<cpu::ExpertTables, std::shared_ptr<cpu::ExpertTables>>(
      module, "ExpertTables", py::module_local(), "Changes of the weights of a mixture of experts by adapters.")
      .def(py::init([](cpu::LowRankTables gate_up, cpu::LowRankTables down) {
             return cpu::ExpertTables{std::make_shared<cpu::LowRankTables>(std::move(gate_up)),
                                      std::make_shared<cpu::LowRankTables>(std::move(down))};
           }),
           py::arg("gate_up"), py::arg("down"));
  py::class_<cpu::AdapterRows, std::shared_ptr<cpu::AdapterRows>>(module, "AdapterRows", py::module_local(),
                                                                  "Which adapter each row of a tensor has.")
      .def(py::init<std::vector<std::int32_t>>(), py::arg("adapters"));
  py::class_<cpu::KVCache, std::shared_ptr<cpu::KVCache>>(module, "KVCache", py::module_local(), "A pool of blocks.")
      .def(py::init([](const py::object& spec, std::int64_t num_blocks) {
             return std::make_shared<cpu::KVCache>(vllmlite::cache_spec(spec), num_blocks);
           }),
           py::arg("spec"), py::arg("num_blocks"))
      .def(
          "copy",
          [](const cpu::KVCache& self, const vllmlite::Array<std::int32_t>& blocks,
             const vllmlite::Array<std::int32_t>& places, const py::array& host, bool to_host) {
            const auto rows = vllmlite::host_rows(host, self.stride());
            const auto from = vllmlite::view(blocks), to = vllmlite::view(places);
            const py::gil_scoped_release released;
            self.copy(from, to, rows, to_host);
          },
          py::arg("blocks"), py::arg("places"), py::arg("host"), py::arg("to_host"),
          "Copy whole blocks to or from rows of host memory.");
  vllmlite::bind_slots<cpu::Slots>(module).def(
      py::init([](const py::object& spec) { return std::make_shared<cpu::Slots>(vllmlite::slot_spec(spec)); }),
      py::arg("spec"));
  py::class_<cpu::Batch, std::shared_ptr<cpu::Batch>>(module, "Batch", py::module_local(), "A step's input.")
      .def(
          "tensors",
          [](const std::shared_ptr<cpu::Batch>& self) {
            return py::make_tuple(part_of(self, self->token_ids), part_of(self, self->positions),
                                  part_of(self, self->logits_rows));
          },
          "Tensors of the token ids, positions and sampled tokens, which some ops take directly.")
      .def_readonly("token_adapters", &cpu::Batch::token_adapters, "Adapters of the tokens; None: no row has one.")
      .def_readonly("sample_adapters", &cpu::Batch::sample_adapters, "Adapters of the sampled positions.");
  py::class_<Graph>(module, "Graph", py::module_local(), "A recorded step.")
      .def_readonly("outputs", &Graph::outputs,
                    "The results of the last replay, valid until another recorded step runs.");
}

std::shared_ptr<const cpu::LowRankTables> one_table(const std::shared_ptr<cpu::LowRankTable>& table) {
  return std::make_shared<cpu::LowRankTables>(cpu::LowRankTables{table});
}

// linear, changed for each row by its adapter.
template <typename Weight>
Tensor lora_linear(cpu::Runtime& runtime, const Tensor& x, const Weight& weight,
                   const std::shared_ptr<cpu::LowRankTable>& table, const std::shared_ptr<cpu::Batch>& batch) {
  return cpu::add_lora(runtime, cpu::linear(runtime, x, weight), x, one_table(table), batch->token_adapters);
}

void bind_ops(py::class_<cpu::Runtime>& runtime) {
  runtime.def("embedding", &cpu::embedding)
      .def("rows", &cpu::gather_rows)
      .def("rms_norm",
           [](cpu::Runtime& self, const Tensor& x, const Tensor& weight, float eps,
              const std::optional<Tensor>& residual) { return cpu::rms_norm(self, x, weight, eps, residual); })
      .def("add_lora",
           [](cpu::Runtime& self, const Tensor& y, const Tensor& x, const std::shared_ptr<cpu::LowRankTable>& table,
              const std::shared_ptr<cpu::AdapterRows>& rows) {
             return cpu::add_lora(self, y, x, one_table(table), rows);
           })
      .def("lora_linear", &lora_linear<cpu::LinearWeight>)
      .def("lora_linear", &lora_linear<cpu::QuantizedWeight>)
      .def(
          "low_rank_table",
          [](cpu::Runtime&, std::vector<std::int64_t> rows, std::int64_t columns, int adapters, int max_rank) {
            return std::make_shared<cpu::LowRankTable>(std::move(rows), columns, adapters, max_rank);
          },
          "Room for the changes of a weight by adapters.")
      .def(
          "set_low_rank",
          [](cpu::Runtime& self, cpu::LowRankTable& table, int index, const std::vector<Tensor>& inputs,
             const std::vector<std::tuple<std::size_t, std::size_t, Tensor, float>>& outputs,
             const std::vector<std::optional<Tensor>>& gains) {
            self.flush();  // pending phases may read the table
            std::vector<cpu::LowRankOutput> each;
            for (const auto& [part, input, b, scale] : outputs)
              each.push_back({part, input, b, scale, gains.empty() ? std::nullopt : gains.at(each.size())});
            table.set(index, inputs, each);
          },
          py::arg("table"), py::arg("index"), py::arg("inputs"), py::arg("outputs"),
          py::arg("gains") = std::vector<std::optional<Tensor>>(), py::call_guard<py::gil_scoped_release>(),
          "Replace the change of a weight by adapter `index`.")
      .def("linear", py::overload_cast<cpu::Runtime&, const Tensor&, const cpu::LinearWeight&>(&cpu::linear))
      .def("linear", py::overload_cast<cpu::Runtime&, const Tensor&, const cpu::QuantizedWeight&>(&cpu::linear))
      .def(
          "quantize",
          [](cpu::Runtime& self, const Tensor& weight, const std::string& scheme) {
            return cpu::quantize(self, weight, scheme_of(scheme));
          },
          py::call_guard<py::gil_scoped_release>(), "Quantise float rows [out, in] to a part of a QuantizedWeight.")
      .def(
          "grouped_tiles",
          [](cpu::Runtime& self, int bits, std::int64_t columns, std::int64_t group_size, const Tensor& qweight,
             const Tensor& scales, const std::optional<Tensor>& zeros, const std::optional<Tensor>& order) {
            return cpu::grouped_tiles(self, {bits, columns, group_size, qweight, scales, zeros, order});
          },
          py::call_guard<py::gil_scoped_release>(), "A part of a QuantizedWeight from integer weights in groups.")
      .def(
          "w8a8_part",
          [](cpu::Runtime& self, const Tensor& values, const Tensor& scales, const std::optional<Tensor>& zeros,
             const std::string& mode, float scale,
             std::int32_t zero) { return cpu::w8a8_part(self, values, scales, zeros, {mode_of(mode), scale, zero}); },
          py::call_guard<py::gil_scoped_release>(), "A part of a QuantizedWeight with one scale per row.")
      .def(
          "grouped_part",
          [](cpu::Runtime& self, int bits, std::int64_t columns, std::int64_t group_size, const Tensor& qweight,
             const Tensor& scales, const std::optional<Tensor>& zeros, const std::optional<Tensor>& order,
             bool floats) {
            return cpu::grouped_part(self, {bits, columns, group_size, qweight, scales, zeros, order, floats});
          },
          py::call_guard<py::gil_scoped_release>(), "Repack rows of grouped integers into tiles.")
      .def(
          "repack",
          [](cpu::Runtime& self, const std::string& packing, int bits, std::int64_t rows, std::int64_t columns,
             const Tensor& data, const std::optional<Tensor>& order, int added, int to_bits) {
            return cpu::repack(self, {packing_of(packing), bits, rows, columns, data, order, added, to_bits});
          },
          py::call_guard<py::gil_scoped_release>(), "Stored integer codes as uint8 [rows, n].")
      .def(
          "tiles_of_blocks",
          [](cpu::Runtime& self, const std::string& type, const Tensor& blocks, std::int64_t rows, std::int64_t in) {
            return cpu::tiles_of_blocks(self, cpu::block_type(type), blocks, rows, in);
          },
          py::call_guard<py::gil_scoped_release>(), "Repack ggml's blocks into a part of a QuantizedWeight.")
      .def(
          "dequantize_blocks",
          [](cpu::Runtime& self, const std::string& type, const Tensor& blocks, const Tensor& to) {
            cpu::dequantize_blocks(self, cpu::block_type(type), blocks, to);
          },
          py::call_guard<py::gil_scoped_release>(), "Dequantise ggml's blocks into a float tensor.")
      .def("attn_prep",
           [](cpu::Runtime& self, const Tensor& qkv, int num_heads, const std::optional<Tensor>& cos_sin,
              int rotary_dim, bool interleaved, const std::shared_ptr<cpu::KVCache>& kv, int layer,
              const std::shared_ptr<cpu::Batch>& batch, const std::optional<Tensor>& q_norm,
              const std::optional<Tensor>& k_norm, float eps) {
             return cpu::attn_prep(self, qkv, num_heads, vllmlite::rotation(cos_sin, rotary_dim, interleaved), kv,
                                   layer, batch, {q_norm, k_norm, eps});
           })
      .def("paged_attention",
           [](cpu::Runtime& self, const Tensor& q, const std::shared_ptr<cpu::KVCache>& kv, int layer,
              const std::shared_ptr<cpu::Batch>& batch, float scale, int window, float soft_cap,
              const std::optional<Tensor>& alibi, const std::optional<Tensor>& sinks) {
             return cpu::paged_attention(self, q, kv, layer, batch, {scale, window, soft_cap, alibi, sinks});
           })
      .def("copy_blocks",
           [](cpu::Runtime& self, const std::shared_ptr<cpu::KVCache>& source, std::vector<std::int32_t> sources,
              const std::shared_ptr<cpu::KVCache>& target, std::vector<std::int32_t> targets) {
             cpu::copy_blocks(self, source, std::move(sources), target, std::move(targets));
           })
      .def("layer_norm", &cpu::layer_norm)
      .def("gated_activation",
           [](cpu::Runtime& self, const Tensor& x, const std::string& name) {
             return cpu::gated_activation(self, x, vllmlite::activation_of(name, true));
           })
      .def("gated_linear",
           [](cpu::Runtime& self, const Tensor& x, const cpu::LinearWeight& weight, const std::string& name) {
             return cpu::gated_linear(self, x, weight, vllmlite::activation_of(name, true));
           })
      .def("gated_linear",
           [](cpu::Runtime& self, const Tensor& x, const cpu::QuantizedWeight& weight, const std::string& name) {
             return cpu::gated_linear(self, x, weight, vllmlite::activation_of(name, true));
           })
      .def("activation",
           [](cpu::Runtime& self, const Tensor& x, const std::string& name) {
             return cpu::activation(self, x, vllmlite::activation_of(name, false));
           })
      .def("add", &cpu::add)
      .def("scale", &cpu::scale)
      .def("soft_cap", &cpu::soft_cap)
      .def("sigmoid_gate", &cpu::sigmoid_gate)
      .def(
          "moe",
          [](cpu::Runtime& self, const Tensor& x, const Tensor& router_logits,
             const std::shared_ptr<cpu::Experts>& experts, int top_k, bool renormalise, const std::string& name,
             const std::shared_ptr<cpu::ExpertTables>& tables, const std::shared_ptr<cpu::AdapterRows>& tokens) {
            return cpu::moe(self, x, router_logits, experts, {top_k, renormalise, vllmlite::activation_of(name, true)},
                            tables, tokens);
          },
          py::arg("x"), py::arg("router_logits"), py::arg("experts"), py::arg("top_k"), py::arg("renormalise"),
          py::arg("activation"), py::arg("tables") = nullptr, py::arg("adapters") = nullptr)
      .def("sample",
           [](cpu::Runtime& self, const Tensor& logits, const std::shared_ptr<cpu::Batch>& batch) {
             return vllmlite::listed(cpu::sample(self, logits, batch));
           })
      .def("choose_beams",
           [](cpu::Runtime& self, const Tensor& logits, const std::shared_ptr<cpu::Batch>& batch,
              const vllmlite::Array<std::int32_t>& rows, const vllmlite::Array<std::int32_t>& groups,
              const vllmlite::Array<float>& scores, const vllmlite::Array<float>& temperatures, int k) {
             return vllmlite::listed(
                 cpu::choose_beams(self, logits, batch, vllmlite::beam_rows(rows, groups, scores, temperatures), k));
           })
      .def("probabilities", &cpu::probabilities)
      .def("accept", &cpu::accept)
      .def("logprobs", [](cpu::Runtime& self, const Tensor& logits, const Tensor& ids, int k) {
        return vllmlite::listed(cpu::logprobs(self, logits, ids, k));
      });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The CPU backend of vllmlite.";
  module.attr("API") = vllmlite::kInterfaceVersion;
  vllmlite::bind_tensor(module);
  vllmlite::bind_propose(module);
  bind_data(module);

  module.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const cpu::Kernels* kernels : cpu::available_kernels()) names.emplace_back(kernels->isa);
        return names;
      },
      "The instruction sets that this build has kernels for and this CPU can run, the best last.");
  module.def("over", &over, py::arg("bytes"), py::arg("dtype"), py::arg("shape"),
             "A tensor over an array's bytes, without a copy.");
  module.def(
      "empty",
      [](const std::vector<std::int64_t>& shape, const std::string& dtype) {
        return cpu::allocate(shape, vllmlite::dtype_from_name(dtype));
      },
      py::arg("shape"), py::arg("dtype"), "Uninitialised memory.");

  py::class_<cpu::Runtime> runtime(module, "Runtime", py::module_local(),
                                   "Kernels, threads, and the list of ops to run.");
  runtime
      .def(
          py::init([](const std::string& isa, std::vector<std::vector<int>> places, const std::string& dtype) {
            if (places.empty()) throw std::invalid_argument("there must be at least one thread");
            return std::make_unique<cpu::Runtime>(isa, std::move(places), vllmlite::dtype_from_name(dtype));
          }),
          py::arg("isa"), py::arg("places"), py::arg("dtype"),
          "A thread for each of `places`, bound to the CPUs listed there. The first is the caller, which is not bound.")
      .def_property_readonly("isa", [](const cpu::Runtime& self) { return std::string(self.kernels().isa); })
      .def_property_readonly("threads", &cpu::Runtime::threads)
      .def("upload", &upload)
      .def("to_host", &to_host)
      .def("convert",
           [](cpu::Runtime& self, const Tensor& tensor, const std::string& dtype) {
             Tensor result = cpu::allocate(tensor.shape, vllmlite::dtype_from_name(dtype));
             self.kernels().convert(tensor.data, cpu::float_of(tensor.dtype), result.data, cpu::float_of(result.dtype),
                                    tensor.size());
             return result;
           })
      .def("flush",
           [](cpu::Runtime& self) {
             const py::gil_scoped_release released;
             self.flush();
           })
      .def(
          "release",
          [](cpu::Runtime& self, const std::vector<std::shared_ptr<cpu::KVCache>>& caches) {
            {
              const py::gil_scoped_release released;
              self.flush();
            }
            for (const auto& cache : caches) cpu::discard(cache->memory);
            self.discard_free();
          },
          py::arg("caches"),
          "Give the memory of caches, whose contents are lost, and of free tensors back to the system.")
      .def("capture", &capture, py::arg("batch"), py::arg("step"),
           "Record and run `step`, whose ops read `batch` and which returns a list of tensors.")
      .def("replay", &replay, py::arg("graph"), py::arg("batch"), "Run a graph on another batch of the same shape.");
  bind_ops(runtime);
  cpu::bind_ranks(module, runtime);
}
