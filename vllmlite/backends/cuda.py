"""The native CUDA backend, which implements the interface of backends with ``vllmlite._cuda``, without torch.

Ops launch kernels on one stream and return at once. :meth:`CudaBackend.to_host` waits for the result; for sampled ids,
only until their own copy to the host has finished. In float32, each output row depends only on its own input row, bit
for bit. 16-bit products and attention use the tensor cores, and the order of their additions depends on the number of
rows unless the backend is batch-invariant.
"""

# ruff: noqa: D102  (the methods are documented in base.py)

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import Expert, not_finite, unusable
from vllmlite.backends.batch import ForwardBatch, GraphKey, SlotParams, SlotSpec, Step, Tensor
from vllmlite.backends.host_blocks import HostBlocks, Ids
from vllmlite.backends.kv_cache import KV_DTYPES, KVSpec
from vllmlite.backends.memory import Memory, host_memory
from vllmlite.backends.native import NativeBackend, host_extension, load_extension, repacked, uploaded
from vllmlite.errors import BackendError
from vllmlite.weights.host import FLOAT_DTYPES, HostTensor, HostWeight, PackedWeight
from vllmlite.weights.schemes import float8
from vllmlite.weights.schemes.codes import Bytes, StoredCodes
from vllmlite.weights.schemes.float8 import Float8Scheme
from vllmlite.weights.schemes.grouped import ORDER, QWEIGHT, SCALES, ZEROS, GroupedScheme
from vllmlite.weights.schemes.w8a8 import Int8Operand, W8A8Scheme

logger = logging.getLogger(__name__)

NATIVE_FLOAT16, NATIVE_BFLOAT16, NATIVE_FLOAT8 = (7, 5), (8, 0), (8, 9)
"""The first compute capabilities whose tensor cores multiply these dtypes."""


class CudaBackend(NativeBackend):
    """The CUDA backend. Raises BackendError, which says what is missing, if it cannot run here.

    ``device`` is ``cuda`` or ``cuda:N``. ``dtype`` is that of activations and float weights, one of ``FLOAT_DTYPES``,
    or ``auto``: ``checkpoint_dtype``, but float16 instead of bfloat16 on a GPU without bfloat16. ``batch_invariant``:
    each output row depends only on its own input row in 16 bits as well. ``movable``: :meth:`release` is possible."""

    name: ClassVar[str] = "cuda"
    kv_dtypes: ClassVar[tuple[str, ...]] = KV_DTYPES
    asynchronous = True
    gives_probabilities: ClassVar[bool] = False

    def __init__(
        self,
        device: str = "cuda",
        dtype: str = "auto",
        checkpoint_dtype: str = "bfloat16",
        batch_invariant: bool = False,
        movable: bool = False,
    ) -> None:
        if dtype not in ("auto", *FLOAT_DTYPES):
            raise BackendError(f"dtype {dtype}: the cuda backend computes in {', '.join(FLOAT_DTYPES)}")
        self._native = load_extension("_cuda")
        found = self._native.probe()
        if not found["devices"]:
            raise BackendError(f"vllmlite._cuda finds no GPU: {found['reason']}")
        index = int(device.partition(":")[2] or 0)
        if index >= len(found["devices"]):
            raise BackendError(
                f"device {device}: vllmlite._cuda finds {len(found['devices'])} GPUs, numbered from 0"
            )
        gpu = found["devices"][index]
        if dtype == "auto":
            dtype = checkpoint_dtype
            if dtype == "bfloat16" and gpu["compute_capability"] < NATIVE_BFLOAT16:
                dtype = "float16"
        self.device, self.dtype, self._index = device, dtype, index
        self.details = gpu["name"]
        least = {"float16": NATIVE_FLOAT16, "bfloat16": NATIVE_BFLOAT16}.get(dtype)
        if least is not None and gpu["compute_capability"] >= least:
            self.schemes = frozenset(("w4a16", "w8a16", "w8a8"))
            if gpu["compute_capability"] >= NATIVE_FLOAT8:
                self.schemes |= {"fp8_w8a8"}
        with _out_of_memory("the device has not enough free memory for a CUDA context"):
            self._runtime = self._native.Runtime(index, dtype, batch_invariant, movable)

    # Tensors

    def tensor(self, host: HostTensor | NDArray[Any], dtype: str | None = None) -> Tensor:
        if isinstance(host, HostTensor):
            data, source, shape = host.data, host.dtype, host.shape
        else:
            array = np.ascontiguousarray(host)
            if dtype is not None and array.dtype.name not in FLOAT_DTYPES:
                array = array.astype(np.float32 if dtype in FLOAT_DTYPES else dtype)
            data, source, shape = array.reshape(-1).view(np.uint8), array.dtype.name, array.shape
        with _out_of_memory("a tensor does not fit: choose a smaller model or dtype"):
            return self._runtime.tensor(data, source, shape, dtype or source)

    def to_host(self, tensor: Tensor) -> NDArray[Any]:
        array: NDArray[Any] = self._runtime.to_host(tensor)
        if tensor.dtype == "bfloat16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array

    def empty(self, shape: Sequence[int], dtype: str) -> Tensor:
        return self._runtime.empty(shape, dtype)

    def memory(self) -> Memory:
        free, total = self._native.memory(self._index)
        return Memory(total, free)

    # Weights

    def linear_weight(self, parts: Sequence[HostWeight], biases: Sequence[HostTensor] = ()) -> Any:
        packed = [part for part in parts if isinstance(part, PackedWeight)]
        if any(part.scheme.name not in self.schemes for part in packed) or len(packed) not in (0, len(parts)):
            raise unusable(next(part for part in parts if part not in packed[1:]), self)
        kinds = {type(part.scheme) for part in packed}
        with _out_of_memory("the weights do not fit: choose a smaller model or dtype"):
            if packed and all(self._multiplies(part) for part in packed) and len(kinds) == 1:
                rows = [self._packed_rows(list(alike)) for _, alike in groupby(packed, _form)]
                made = self._runtime.packed_weight(rows, bool(biases))
            else:
                floats = [
                    self.dequantize(part, self.dtype) if isinstance(part, PackedWeight) else part
                    for part in parts
                ]
                out = sum(part.shape[0] for part in floats)
                made = self._runtime.linear_weight(out, parts[0].shape[1], bool(biases))
                self._fill(made.weight, floats)
            if biases:
                self._fill(made.bias, biases)
        return made

    def repack(self, codes: StoredCodes, bits: int) -> Bytes:
        """Return ``codes`` as rows of ``bits``, 4 or 8, bits a code, low bits first. The CPU backend's extension, if it
        is installed, does this in a tenth of the time."""
        host = host_extension()
        return codes.repacked(bits) if host is None else repacked(*host, codes, bits)

    def quantize(self, weight: HostTensor, scheme: str) -> PackedWeight:
        """Return ``weight [out, in]`` in the scheme ``int8``, ``int4`` or ``fp8_w8a8``; the last one is computed on the
        device."""
        rows, columns = weight.shape
        if scheme != "fp8_w8a8" or not self._runtime.takes_fp8(columns):
            return super().quantize(weight, scheme)
        made = self._runtime.quantise_fp8(self.tensor(weight, self.dtype))
        codes, scales = self.to_host(made.values), self.to_host(made.scales).reshape(-1, 1)[:rows]
        if not np.isfinite(scales).all() or ((codes & 0x7F) == 0x7F).any():
            raise not_finite(weight.shape)
        return float8.of_rows(codes, scales)

    def _fill(self, target: Tensor, pieces: Sequence[HostTensor]) -> None:
        """Write ``pieces``, one after another, to the rows of ``target``."""
        first = 0
        for piece in pieces:
            self._runtime.fill_rows(target, first, piece.shape[0], piece.data, piece.dtype)
            first += piece.shape[0]

    def _multiplies(self, weight: PackedWeight) -> bool:
        """Return whether kernels multiply weights of this shape and group size; others are dequantised when loaded."""
        scheme, columns = weight.scheme, weight.shape[1]
        taken: bool
        if isinstance(scheme, W8A8Scheme):
            taken = True
        elif isinstance(scheme, Float8Scheme):
            taken = self._runtime.takes_fp8(columns)
        else:
            assert isinstance(scheme, GroupedScheme)
            taken = self._runtime.takes_groups(scheme.bits, columns, scheme.group_size or columns)
        return taken

    def _packed_rows(self, parts: Sequence[PackedWeight]) -> Any:
        """Copy the rows of ``parts``, which all have one :func:`_form`, to the device."""
        first = parts[0]
        scheme, rows, columns = first.scheme, sum(part.shape[0] for part in parts), first.shape[1]
        if isinstance(scheme, Float8Scheme):
            operands = [scheme.operand(part) for part in parts]
            return self._runtime.fp8_rows(
                rows, columns, operands[0].blocks, [operand.values for operand in operands],
                [operand.scales for operand in operands], operands[0].input_scale or 0,
            )  # fmt: skip
        if isinstance(scheme, W8A8Scheme):
            return self._int8_rows([scheme.operand(part) for part in parts])
        assert isinstance(scheme, GroupedScheme)
        order = first.parts.get(ORDER)

        def pieces(suffix: str) -> list[NDArray[np.uint8]]:
            return [part.parts[suffix].data for part in parts if suffix in part.parts]

        return self._runtime.grouped_rows(
            scheme.bits, rows, columns, scheme.group_size or columns,
            pieces(QWEIGHT), pieces(SCALES), first.parts[SCALES].dtype, pieces(ZEROS),
            None if order is None else order.data,
        )  # fmt: skip

    def _int8_rows(self, operands: Sequence[Int8Operand]) -> Any:
        """Copy int8 rows with their zeros to the device, and the row sums that are needed if activations have zeros."""
        columns, inputs = operands[0].values.shape[1], operands[0].inputs
        zeros = []
        for operand in operands:
            own = np.zeros((len(operand.values), 2), np.int32)
            own[:, 0] = 0 if operand.zeros is None else operand.zeros
            if not inputs.symmetric or inputs.zero:
                own[:, 1] = operand.values.sum(axis=1, dtype=np.int32)
            zeros.append(own)
        return self._runtime.int8_rows(
            sum(len(operand.values) for operand in operands), columns,
            [np.pad(operand.values, ((0, 0), (0, -columns % 16))).view(np.uint8) for operand in operands],
            [operand.scales for operand in operands], zeros, operands[0].zeros is not None,
            inputs.symmetric, inputs.scale or 0, inputs.zero,
        )  # fmt: skip

    def experts(self, experts: Sequence[Expert]) -> Any:
        """Pack the experts of a mixture, all of one shape. Quantised weights are multiplied as they are if all gate and
        up projections have one form, and so have all down projections; others are dequantised, with a warning."""
        gate_up, down = ([getattr(expert, name) for expert in experts] for name in ("gate_up", "down"))
        with _out_of_memory("the experts do not fit: choose a smaller model or dtype"):
            made = self._runtime.experts(gate_up, down)
        if not made.packed and any(weight.packed for weight in (*gate_up, *down)):
            logger.warning("packed experts of a layer are dequantised: their projections differ in form")
        return made

    def tied_weight(self, table: Tensor) -> Any:
        return self._native.LinearWeight(table)

    # Key/value cache

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> Any:
        self.check_kv(spec, num_blocks)
        with _out_of_memory(
            f"{num_blocks} blocks of key/value cache do not fit: lower gpu_memory_utilization, "
            "kv_cache_memory_bytes or num_gpu_blocks_override"
        ):
            try:
                return self._runtime.kv_cache(spec, num_blocks)
            except ValueError as error:
                raise BackendError(str(error)) from error

    def host_blocks(self, kv: Any, spec: KVSpec, num_places: int) -> HostBlocks:
        with _out_of_memory(f"{num_places} blocks in host memory do not fit: lower swap_space"):
            return _PinnedBlocks(self._runtime.host_blocks(kv, num_places))

    def release(self, caches: Sequence[Any]) -> None:
        needed, free = self._runtime.bytes_to_keep(), host_memory().free
        if needed > free:
            raise BackendError(
                f"{needed} bytes of weights do not fit into the {free} that are free in host memory: sleep at level 2"
            )
        with _out_of_memory("the weights do not fit into host memory: sleep at level 2"):
            self._runtime.release()

    def restore(self, caches: Sequence[Any]) -> None:
        with _out_of_memory("the device's memory is in use by other programs"):
            self._runtime.restore()

    # Slots

    def alloc_slots(self, spec: SlotSpec) -> Any:
        with _out_of_memory("the slots do not fit: lower max_num_seqs or max_model_len"):
            return self._runtime.slots(spec)

    def set_slot(self, slots: Any, slot: int, params: SlotParams) -> None:
        slots.set(slot, params)

    def append_blocks(
        self, slots: Any, slot_ids: NDArray[np.int32], columns: NDArray[np.int32], blocks: NDArray[np.int32]
    ) -> None:
        slots.append_blocks(slot_ids, columns, blocks)

    def upload(
        self, batch: ForwardBatch, slots: Any, spec: KVSpec, key: GraphKey | None = None
    ) -> ForwardBatch:
        rows, query_len, adapted = key or GraphKey(0, 0)
        native = self._runtime.upload(
            batch, slots, rows, query_len, spec.block_size, spec.num_kv_heads, adapted
        )
        return uploaded(batch, native)

    # Model ops

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, feeds: Any = None
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._runtime.rms_norm(x, weight, eps, residual, feeds)
        return found

    def gated_linear(self, x: Tensor, weight: Any, activation: str, feeds: Any = None) -> Tensor:
        product = self.linear(x, weight)
        try:
            return self._runtime.gated_activation(product, activation, feeds)
        except ValueError as error:
            raise BackendError(str(error)) from error

    def logits(self, hidden: Tensor, weight: Any) -> Tensor:
        return self._runtime.logits(hidden, weight)

    # Graphs

    def graph_rows(self, most: int) -> Sequence[int]:
        sizes = {1, 2, 4, *range(8, min(most, 256), 8), *range(256, min(most, 1024), 32), most}
        return sorted(size for size in sizes if size <= most)

    def capture(self, key: GraphKey, step: Step, slots: Any, spec: KVSpec) -> Step:
        """Record the step at once, on a batch of padding, and return its replay."""
        rows, query_len, adapted = key
        native = self._runtime.padding(slots, rows, query_len, spec.block_size, spec.num_kv_heads, adapted)
        none = np.zeros(0, np.int32)
        padding = ForwardBatch(
            num_tokens=rows * query_len, num_rows=rows, max_query_len=query_len, max_context=1, token_ids=none,
            positions=none, query_start_loc=none, slots=none, context_lens=none, logits_rows=none,
            sample_slots=none, sample_positions=none, adapters=none if adapted else None,
        )  # fmt: skip
        batch = uploaded(padding, native)
        graph = self._runtime.capture(native, lambda: list(step(batch)))

        def run(batch: ForwardBatch) -> Sequence[Tensor]:
            outputs: Sequence[Tensor] = self._runtime.replay(graph, batch.backend)
            return outputs

        return run


class _PinnedBlocks(HostBlocks):
    """Pinned host memory for blocks, which the device reads and writes while kernels of a step run."""

    def __init__(self, native: Any) -> None:
        """Wrap the extension's object ``native``."""
        self.memory: NDArray[np.uint8] = native.memory
        self._native = native

    def save(self, blocks: Ids, places: Ids) -> None:
        self._native.copy(blocks, places, True)

    def load(self, places: Ids, blocks: Ids) -> None:
        self._native.copy(blocks, places, False)

    def join(self) -> None:
        self._native.join()

    def wait(self) -> None:
        self._native.wait()


def _form(weight: PackedWeight) -> tuple[Any, ...]:
    """Return the properties that parts must have in common so that one kernel launch multiplies them."""
    scheme = weight.scheme
    if isinstance(scheme, Float8Scheme):
        inputs = weight.parts["input_scale"].data.tobytes() if scheme.inputs == "static" else None
        # Rows after a part of a block would begin within a block.
        own = id(weight) if weight.shape[0] % scheme.row_unit else None
        return scheme.granularity == "block", inputs, own
    if isinstance(scheme, W8A8Scheme):
        return scheme, scheme.operand(weight).inputs
    order = weight.parts.get(ORDER)
    return scheme, weight.parts[SCALES].dtype, None if order is None else order.data.tobytes()


@contextmanager
def _out_of_memory(advice: str) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise BackendError(f"{advice} ({error})") from error
