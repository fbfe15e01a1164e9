#include "cuda/bind_backend.hpp"

#include <algorithm>
#include <cstring>

#include "contract/bind.hpp"
#include "cuda/host_blocks.hpp"
#include "cuda/ops.hpp"
#include "tensor/bind_tensor.hpp"

namespace py = pybind11;
namespace cuda = vllmlite::cuda;
using vllmlite::DType;
using vllmlite::Tensor;

namespace {

// The activation of a gated MLP. Throws std::invalid_argument for one that this backend does not have.
vllmlite::Activation activation_of(const std::string& name) {
  const vllmlite::Activation activation = vllmlite::activation_of(name, true);
  if (activation == vllmlite::Activation::clamped_swiglu)
    throw std::invalid_argument("activation " + name + ": the cuda backend does not have it");
  return activation;
}

// Returns `count` rows of `whole`, from row `first` on, as a tensor that shares its memory.
Tensor part(const Tensor& whole, std::int64_t first, std::int64_t count) {
  Tensor rows = whole;
  rows.shape[0] = count;
  rows.data =
      static_cast<char*>(whole.data) +
      static_cast<std::size_t>(first) * (rows.bytes() / std::max<std::size_t>(static_cast<std::size_t>(count), 1));
  return rows;
}

// Copies an array's bytes, which are of `dtype`, to a device tensor, and converts them if that has another dtype.
void fill(cuda::Runtime& runtime, const Tensor& target, const py::array& bytes, DType dtype) {
  Tensor source = target;
  source.dtype = dtype;
  const void* data = vllmlite::bytes_for(source, bytes);
  const py::gil_scoped_release released;
  if (dtype == target.dtype) {
    runtime.upload(target.data, data, target.bytes());
    return;
  }
  source = runtime.make(target.shape, dtype);
  runtime.upload(source.data, data, source.bytes());
  convert(runtime, source, target);
}

Tensor tensor(cuda::Runtime& runtime, const py::array& bytes, const std::string& dtype,
              const std::vector<std::int64_t>& shape, const std::string& wanted) {
  const Tensor made = runtime.make(shape, vllmlite::dtype_from_name(wanted));
  fill(runtime, made, bytes, vllmlite::dtype_from_name(dtype));
  return made;
}

// Allocates a weight [out, in] in the runtime's dtype, to be filled part by part.
cuda::LinearWeight make_weight(cuda::Runtime& runtime, std::int64_t out, std::int64_t in, bool bias) {
  cuda::LinearWeight weight{runtime.make({out, in}, runtime.dtype()), std::nullopt};
  if (bias) weight.bias = runtime.make({out}, runtime.dtype());
  return weight;
}

void fill_rows(cuda::Runtime& runtime, const Tensor& target, std::int64_t first, std::int64_t count,
               const py::array& bytes, const std::string& dtype) {
  if (first < 0 || count < 0 || first + count > target.shape[0])
    throw std::out_of_range("rows " + std::to_string(first) + " to " + std::to_string(first + count) + " of " +
                            describe(target));
  fill(runtime, part(target, first, count), bytes, vllmlite::dtype_from_name(dtype));
}

// Copies arrays' bytes, one array after the other, to device memory, and converts them if the dtypes differ.
void fill_all(cuda::Runtime& runtime, const Tensor& target, const std::vector<py::array>& pieces,
              const std::string& dtype) {
  const DType stored = vllmlite::dtype_from_name(dtype);
  std::int64_t first = 0;
  for (const py::array& piece : pieces) {
    const std::int64_t row_bytes = target.size() / target.shape[0] * static_cast<std::int64_t>(item_size(stored));
    const std::int64_t rows = piece.nbytes() / std::max<std::int64_t>(row_bytes, 1);
    fill_rows(runtime, target, first, rows, piece, dtype);
    first += rows;
  }
  if (first != target.shape[0])
    throw std::invalid_argument(std::to_string(first) + " rows of " + describe(target) + " were given");
}

// Makes rows of a packed weight from pieces with the same scheme and order. Without `zeros`, every zero is the middle
// integer. `order` is None if column i is multiplied with column i of x.
cuda::GroupedRows grouped_rows(cuda::Runtime& runtime, int bits, std::int64_t rows, int columns, int group,
                               const std::vector<py::array>& integers, const std::vector<py::array>& scales,
                               const std::string& scales_dtype, const std::vector<py::array>& zeros,
                               const std::optional<py::array>& order) {
  if (group < 1 || columns < 1 || rows < 1 || (bits != 4 && bits != 8))
    throw std::invalid_argument("a packed weight has rows, columns, and groups of at least a column; 4 or 8 bits");
  const std::int64_t groups = (columns + group - 1) / group;
  cuda::StoredGroups stored{runtime.make({rows, (static_cast<std::int64_t>(columns) * bits + 7) / 8}, DType::uint8),
                            runtime.make({rows, groups}, DType::float32),
                            std::nullopt,
                            bits,
                            columns,
                            group};
  fill_all(runtime, stored.integers, integers, "uint8");
  fill_all(runtime, stored.scales, scales, scales_dtype);
  if (!zeros.empty()) {
    stored.zeros = runtime.make({rows, groups}, DType::uint8);
    fill_all(runtime, *stored.zeros, zeros, "uint8");
  }
  std::optional<Tensor> placed;
  if (order) placed = tensor(runtime, *order, "int32", {columns}, "int32");
  return lay_out(runtime, stored, std::move(placed));
}

// Rows of 8-bit floats with float32 scales: one for each row, or for each block. `constant`: the scale of activations,
// or 0.
cuda::ByteRows fp8_rows(cuda::Runtime& runtime, std::int64_t rows, int columns, bool blocks,
                        const std::vector<py::array>& values, const std::vector<py::array>& scales, float constant) {
  if (rows < 1 || columns < 1 || columns % 16 != 0)
    throw std::invalid_argument("a weight of 8-bit floats has rows, and columns in multiples of 16");
  const auto blocks_of = [](std::int64_t count) { return (count + cuda::kFp8Block - 1) / cuda::kFp8Block; };
  cuda::ByteRows made{runtime.make({rows, columns}, DType::uint8),
                      blocks ? runtime.make({blocks_of(rows), blocks_of(columns)}, DType::float32)
                             : runtime.make({rows}, DType::float32),
                      std::nullopt,
                      {.blocks = blocks, .constant = constant},
                      static_cast<int>(rows),
                      columns};
  fill_all(runtime, made.weight, values, "uint8");
  fill_all(runtime, made.scales, scales, "float32");
  return made;
}

// Rows of 8-bit integers, padded to multiples of 16 columns, with a float32 scale each, and int32 zeros and sums of
// their elements in pairs; `with_zeros`: zeros other than 0. Activations have a zero unless `symmetric`; `constant` is
// their scale, or 0, and `zero` belongs to it.
cuda::ByteRows int8_rows(cuda::Runtime& runtime, std::int64_t rows, int columns, const std::vector<py::array>& values,
                         const std::vector<py::array>& scales, const std::vector<py::array>& zeros, bool with_zeros,
                         bool symmetric, float constant, int zero) {
  if (rows < 1 || columns < 1) throw std::invalid_argument("a weight of 8-bit integers has rows and columns");
  cuda::ByteRows made{
      runtime.make({rows, (columns + 15) / 16 * 16}, DType::uint8),
      runtime.make({rows}, DType::float32),
      runtime.make({rows, 2}, DType::int32),
      {.integers = true, .symmetric = symmetric, .with_sums = with_zeros, .constant = constant, .zero = zero},
      static_cast<int>(rows),
      columns};
  fill_all(runtime, made.weight, values, "uint8");
  fill_all(runtime, made.scales, scales, "float32");
  fill_all(runtime, *made.zeros, zeros, "int32");
  return made;
}

template <typename Rows>
cuda::LinearWeight packed_weight(cuda::Runtime& runtime, std::vector<Rows> parts, bool bias) {
  cuda::LinearWeight weight{std::move(parts), std::nullopt};
  if (bias) weight.bias = runtime.make({weight.out()}, runtime.dtype());
  return weight;
}

// Copies a tensor to a new array; bfloat16, which numpy lacks, as unsigned integers with the same bits.
py::array to_host(cuda::Runtime& runtime, const Tensor& tensor) {
  const std::string format(tensor.dtype == DType::bfloat16 ? "uint16" : name(tensor.dtype));
  py::array array(py::dtype::from_args(py::str(format)), tensor.shape);
  void* target = array.mutable_data();
  const py::gil_scoped_release released;
  if (const void* early = runtime.host_copy(tensor); early != nullptr)
    std::memcpy(target, early, tensor.bytes());
  else
    runtime.download(target, tensor.data, tensor.bytes());
  return array;
}

// A recorded step, the batch that it reads and the tensors that it writes, in memory that all recordings share.
struct Graph {
  std::shared_ptr<cuda::Runtime::Graph> recorded;
  std::shared_ptr<cuda::Batch> batch;
  std::vector<Tensor> outputs;
};

Graph capture(cuda::Runtime& runtime, const std::shared_ptr<cuda::Batch>& batch, const py::function& step) {
  Graph graph;
  graph.batch = batch;
  runtime.begin_recording();
  try {
    graph.outputs = step().cast<std::vector<Tensor>>();
  } catch (...) {
    runtime.abandon_recording();
    throw;
  }
  graph.recorded = runtime.end_recording();
  for (Tensor& output : graph.outputs) output.owner = graph.recorded;
  return graph;
}

std::vector<Tensor> replay(cuda::Runtime& runtime, const Graph& graph, const cuda::Batch& batch) {
  cuda::take_over(runtime, *graph.batch, batch);
  runtime.replay(*graph.recorded);
  std::vector<Tensor> results;
  for (const Tensor& output : graph.outputs) results.push_back(part(output, 0, batch.num_samples));
  return results;
}

void bind_data(py::module_& module) {
  py::class_<cuda::LinearWeight>(module, "LinearWeight", py::module_local(), "A weight [out, in], and a bias.")
      .def(py::init([](const Tensor& weight) { return cuda::LinearWeight{weight, std::nullopt}; }), py::arg("weight"))
      .def_property_readonly(
          "weight", [](const cuda::LinearWeight& self) { return std::get<Tensor>(self.weight); },
          "The matrix of a weight that is no packed one.")
      .def_property_readonly(
          "packed", [](const cuda::LinearWeight& self) { return !std::holds_alternative<Tensor>(self.weight); })
      .def_readonly("bias", &cuda::LinearWeight::bias);
  py::class_<cuda::GroupedRows>(module, "GroupedRows", py::module_local(), "Rows of a packed weight.");
  py::class_<cuda::ByteActivations>(module, "ByteActivations", py::module_local(),
                                    "A matrix of codes of 8 bits with scales.")
      .def_readonly("values", &cuda::ByteActivations::values)
      .def_readonly("scales", &cuda::ByteActivations::scales);
  py::class_<cuda::ByteRows>(module, "ByteRows", py::module_local(), "Rows of a weight of 8-bit elements.");
  py::class_<cuda::Experts, std::shared_ptr<cuda::Experts>>(module, "Experts", py::module_local(),
                                                            "Weights of a mixture's experts.")
      .def_property_readonly("packed", &cuda::Experts::packed,
                             "Whether the weights are multiplied as they are packed.");
  py::class_<cuda::LowRankTable, std::shared_ptr<cuda::LowRankTable>>(module, "LowRankTable", py::module_local(),
                                                                      "Changes of a weight by resident adapters.");
  py::class_<cuda::KVCache, std::shared_ptr<cuda::KVCache>>(module, "KVCache", py::module_local(), "A pool of blocks.");
  py::class_<cuda::HostBlocks, std::shared_ptr<cuda::HostBlocks>>(module, "HostBlocks", py::module_local(),
                                                                  "Pinned host memory for blocks of a pool.")
      .def_property_readonly(
          "memory",
          [](const std::shared_ptr<cuda::HostBlocks>& self) {
            const std::vector<std::size_t> shape{static_cast<std::size_t>(self->places()), self->block_bytes()};
            return py::array_t<std::uint8_t>(shape, static_cast<std::uint8_t*>(self->data()), py::cast(self));
          })
      .def("copy", [](cuda::HostBlocks& self, const vllmlite::Array<std::int32_t>& blocks,
                      const vllmlite::Array<std::int32_t>& places,
                      bool to_host) { self.copy(vllmlite::view(blocks), vllmlite::view(places), to_host); })
      .def("join", &cuda::HostBlocks::join)
      .def("wait", &cuda::HostBlocks::wait, py::call_guard<py::gil_scoped_release>());
  vllmlite::bind_slots<cuda::Slots>(module);
  py::class_<cuda::Batch, std::shared_ptr<cuda::Batch>>(module, "Batch", py::module_local(), "A step's input.")
      .def(
          "tensors",
          [](const cuda::Batch& self) {
            return py::make_tuple(self.part(self.view.token_ids, self.num_tokens),
                                  self.part(self.view.positions, self.num_tokens),
                                  self.part(self.view.logits_rows, self.num_samples));
          },
          "The tensors of token ids, positions and sampled tokens, which ops are given by themselves.");
  py::class_<Graph>(module, "Graph", py::module_local(), "A recorded step.");
}

using RuntimeClass = py::class_<cuda::Runtime, std::shared_ptr<cuda::Runtime>>;

void bind_ops(RuntimeClass& runtime) {
  runtime.def("embedding", &cuda::embedding)
      .def("rows", &cuda::gather_rows)
      .def("rms_norm", &cuda::rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("residual"),
           py::arg("feeds") = py::none())
      .def("copy_blocks",
           [](cuda::Runtime& self, const cuda::KVCache& source, const vllmlite::Array<std::int32_t>& sources,
              const cuda::KVCache& target, const vllmlite::Array<std::int32_t>& targets) {
             cuda::copy_blocks(self, source, vllmlite::view(sources), target, vllmlite::view(targets));
           })
      .def("layer_norm", &cuda::layer_norm)
      .def("add", &cuda::add)
      .def("scale", &cuda::scale)
      .def("soft_cap", &cuda::soft_cap)
      .def("sigmoid_gate", &cuda::sigmoid_gate)
      .def("linear", [](cuda::Runtime& self, const cuda::Activations& x,
                        const cuda::LinearWeight& weight) { return cuda::linear(self, x, weight, self.dtype()); })
      .def("lora_linear", &cuda::lora_linear)
      .def("logits", [](cuda::Runtime& self, const Tensor& x,
                        const cuda::LinearWeight& weight) { return cuda::linear(self, x, weight, DType::float32); })
      .def("attn_prep",
           [](cuda::Runtime& self, const Tensor& qkv, int num_heads, const std::optional<Tensor>& cos_sin,
              int rotary_dim, bool interleaved, const cuda::KVCache& kv, int layer, const cuda::Batch& batch,
              const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, float eps) {
             return cuda::attn_prep(self, qkv, num_heads, vllmlite::rotation(cos_sin, rotary_dim, interleaved), kv,
                                    layer, batch, {q_norm, k_norm, eps});
           })
      .def("paged_attention",
           [](cuda::Runtime& self, const Tensor& q, const cuda::KVCache& kv, int layer, const cuda::Batch& batch,
              float scale, int window, float soft_cap, const std::optional<Tensor>& alibi,
              const std::optional<Tensor>& sinks) {
             if (sinks) throw std::invalid_argument("paged_attention: the cuda backend has no attention sinks");
             return cuda::paged_attention(self, q, kv, layer, batch, scale, window, {soft_cap, alibi});
           })
      .def(
          "gated_activation",
          [](cuda::Runtime& self, const Tensor& x, const std::string& name, const cuda::LinearWeight* feeds) {
            return cuda::gated_activation(self, x, activation_of(name), feeds);
          },
          py::arg("x"), py::arg("activation"), py::arg("feeds") = py::none())
      .def("activation",
           [](cuda::Runtime& self, const Tensor& x, const std::string& name) {
             return cuda::activation(self, x, vllmlite::activation_of(name, false));
           })
      .def("moe",
           [](cuda::Runtime& self, const Tensor& x, const Tensor& router_logits, const cuda::Experts& experts,
              int top_k, bool renormalise, const std::string& name) {
             return cuda::moe(self, x, router_logits, experts, top_k, renormalise, activation_of(name));
           })
      .def("sample", [](cuda::Runtime& self, const Tensor& logits,
                        const cuda::Batch& batch) { return vllmlite::listed(cuda::sample(self, logits, batch)); })
      .def("choose_beams",
           [](cuda::Runtime& self, const Tensor& logits, const cuda::Batch& batch,
              const vllmlite::Array<std::int32_t>& rows, const vllmlite::Array<std::int32_t>& groups,
              const vllmlite::Array<float>& scores, const vllmlite::Array<float>& temperatures, int k) {
             return vllmlite::listed(
                 cuda::choose_beams(self, logits, batch, vllmlite::beam_rows(rows, groups, scores, temperatures), k));
           })
      .def("accept", &cuda::accept)
      .def("logprobs", [](cuda::Runtime& self, const Tensor& logits, const Tensor& ids, int k) {
        return vllmlite::listed(cuda::logprobs(self, logits, ids, k));
      });
}

void bind_runtime(py::module_& module) {
  RuntimeClass runtime(module, "Runtime", py::module_local(), "A device's stream and memory, and the ops.");
  runtime
      .def(py::init([](int device, const std::string& dtype, bool batch_invariant, bool movable) {
             return std::make_shared<cuda::Runtime>(device, vllmlite::dtype_from_name(dtype), batch_invariant, movable);
           }),
           py::arg("device"), py::arg("dtype"), py::arg("batch_invariant"), py::arg("movable"))
      .def(
          "empty",
          [](cuda::Runtime& self, const std::vector<std::int64_t>& shape, const std::string& dtype) {
            return self.make(shape, vllmlite::dtype_from_name(dtype));
          },
          py::arg("shape"), py::arg("dtype"), "Uninitialised memory of the pool.")
      .def("tensor", &tensor, py::arg("bytes"), py::arg("dtype"), py::arg("shape"), py::arg("wanted"),
           "A tensor of dtype `wanted` of an array's bytes.")
      .def("linear_weight", &make_weight, py::arg("out"), py::arg("in"), py::arg("bias"))
      .def("takes_groups", &cuda::takes_groups, py::arg("bits"), py::arg("columns"), py::arg("group"),
           "Whether packed weights of such a form are multiplied.")
      .def("grouped_rows", &grouped_rows, py::arg("bits"), py::arg("rows"), py::arg("columns"), py::arg("group"),
           py::arg("integers"), py::arg("scales"), py::arg("scales_dtype"), py::arg("zeros"), py::arg("order"))
      .def("takes_fp8", &cuda::takes_fp8, py::arg("columns"), "Whether 8-bit floats of so many columns are multiplied.")
      .def(
          "quantise_fp8", [](cuda::Runtime& self, const Tensor& x) { return quantise_bytes(self, x, {}); },
          py::arg("x"), "The rows of a matrix as e4m3, each by its largest magnitude.")
      .def("fp8_rows", &fp8_rows, py::arg("rows"), py::arg("columns"), py::arg("blocks"), py::arg("values"),
           py::arg("scales"), py::arg("constant"))
      .def("int8_rows", &int8_rows, py::arg("rows"), py::arg("columns"), py::arg("values"), py::arg("scales"),
           py::arg("zeros"), py::arg("with_zeros"), py::arg("symmetric"), py::arg("constant"), py::arg("zero"))
      .def("packed_weight", &packed_weight<cuda::GroupedRows>, py::arg("parts"), py::arg("bias"))
      .def("packed_weight", &packed_weight<cuda::ByteRows>, py::arg("parts"), py::arg("bias"))
      .def(
          "low_rank_table",
          [](cuda::Runtime& self, std::vector<std::int64_t> rows, std::int64_t columns, int adapters, int max_rank) {
            return std::make_shared<cuda::LowRankTable>(self, std::move(rows), columns, adapters, max_rank);
          },
          py::keep_alive<0, 1>(), "Room for the changes of a weight by adapters.")
      .def(
          "set_low_rank",
          [](cuda::Runtime&, cuda::LowRankTable& table, int index, const std::vector<Tensor>& inputs,
             const std::vector<std::tuple<std::size_t, std::size_t, Tensor, float>>& outputs) {
            std::vector<cuda::LowRankOutput> each;
            for (const auto& [part, input, b, scale] : outputs) each.push_back({part, input, b, scale});
            table.set(index, inputs, each);
          },
          "Replace the change of a weight by adapter `index`.")
      .def("experts", &cuda::make_experts, py::arg("gate_up"), py::arg("down"))
      .def("fill_rows", &fill_rows, py::arg("target"), py::arg("first"), py::arg("count"), py::arg("bytes"),
           py::arg("dtype"), "Write host bytes to rows of a tensor, converted to its dtype.")
      .def("to_host", &to_host)
      .def(
          "kv_cache",
          [](cuda::Runtime& self, const py::object& spec, std::int64_t num_blocks) {
            return std::make_shared<cuda::KVCache>(self, vllmlite::cache_spec(spec), num_blocks);
          },
          py::arg("spec"), py::arg("num_blocks"))
      .def(
          "host_blocks",
          [](cuda::Runtime& self, const std::shared_ptr<cuda::KVCache>& kv, std::int64_t num_places) {
            return std::make_shared<cuda::HostBlocks>(self, kv, num_places);
          },
          py::arg("kv"), py::arg("num_places"), py::keep_alive<0, 1>())
      .def(
          "slots",
          [](cuda::Runtime& self, const py::object& spec) {
            return std::make_shared<cuda::Slots>(self, vllmlite::slot_spec(spec));
          },
          py::arg("spec"), py::keep_alive<0, 1>())
      .def(
          "upload",
          [](cuda::Runtime& self, const py::object& host, const std::shared_ptr<cuda::Slots>& slots, int rows,
             int query_len, int block_size, int kv_heads, bool adapted) {
            return cuda::upload(self, vllmlite::host_batch(host), slots,
                                {rows, query_len, block_size, kv_heads, adapted});
          },
          py::arg("batch"), py::arg("slots"), py::arg("rows"), py::arg("query_len"), py::arg("block_size"),
          py::arg("kv_heads"), py::arg("adapted"))
      .def(
          "padding",
          [](cuda::Runtime& self, const std::shared_ptr<cuda::Slots>& slots, int rows, int query_len, int block_size,
             int kv_heads,
             bool adapted) { return cuda::padding(self, slots, {rows, query_len, block_size, kv_heads, adapted}); },
          "A batch of `rows` padding rows of `query_len` tokens, for a graph to be recorded with.")
      .def("synchronize", &cuda::Runtime::synchronize, py::call_guard<py::gil_scoped_release>())
      .def("release", &cuda::Runtime::release, py::call_guard<py::gil_scoped_release>(),
           "Free device memory; all but the contents of caches is kept in host memory.")
      .def("bytes_to_keep", &cuda::Runtime::bytes_to_keep, "Bytes that release would keep in host memory.")
      .def("restore", &cuda::Runtime::restore, py::call_guard<py::gil_scoped_release>(),
           "Take device memory back, at the same addresses.")
      .def("capture", &capture, py::arg("batch"), py::arg("step"),
           "Record `step`, whose ops read `batch` and which returns a list of tensors, without running it.")
      .def("replay", &replay, py::arg("graph"), py::arg("batch"), "Run a graph on a batch of at most as many rows.");
  bind_ops(runtime);
}

}  // namespace

void vllmlite::cuda::bind_backend(py::module_& module) {
  bind_data(module);
  bind_runtime(module);
}
