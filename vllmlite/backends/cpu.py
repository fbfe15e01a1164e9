"""The native CPU backend, which implements the interface of backends with ``vllmlite._cpu``, without torch.

Ops return at once: the extension appends them to a list, which its threads run when :meth:`CpuBackend.to_host` reads a
result, or when the next step begins. A graph is a recorded list. Activations are float32 whatever the dtype of the
weights, or bfloat16 if products with the model's weights take only that. Each output row depends only on its own input
row, bit for bit, whatever else is in the batch.
"""

# ruff: noqa: D102  (the methods are documented in base.py)

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import Expert, unusable
from vllmlite.backends.batch import ForwardBatch, GraphKey, SlotParams, SlotSpec, Step, Tensor
from vllmlite.backends.cores import thread_places, usable_cores
from vllmlite.backends.host_blocks import HostBlocks, Ids, SynchronousHostBlocks
from vllmlite.backends.kv_cache import KV_DTYPES, KVSpec
from vllmlite.backends.memory import Memory, host_memory
from vllmlite.backends.native import NativeBackend, load_extension, repacked, uploaded
from vllmlite.errors import BackendError, ModelError
from vllmlite.weights.adapter import ABILITIES
from vllmlite.weights.host import (
    FLOAT_DTYPES,
    ITEM_SIZE,
    HostTensor,
    HostWeight,
    PackedWeight,
    Scheme,
    float_parts,
)
from vllmlite.weights.schemes.codes import Bytes, StoredCodes
from vllmlite.weights.schemes.gguf_blocks import BLOCK_SCHEMES, BlockScheme, block_data
from vllmlite.weights.schemes.grouped import ORDER, ZEROS, GroupedScheme
from vllmlite.weights.schemes.tiles import QWEIGHT, SCALES, SUB_SCALES, TILES, packed_weight
from vllmlite.weights.schemes.w8a8 import Int8Operand, W8A8Scheme


class CpuBackend(NativeBackend):
    """The CPU backend. Raises BackendError, which says what is missing, if it cannot run here.

    ``dtype`` is that of float weights, one of ``FLOAT_DTYPES``. ``threads``: None for one for each CPU that the process
    may use. ``isa``: a name in ``_cpu.instruction_sets()``, or ``auto`` for the best. ``packed``: most products have
    quantised weights, so activations between ops are float32, which those products take, even if products with float
    weights take bfloat16."""

    name: ClassVar[str] = "cpu"
    device = "cpu"
    kv_dtypes: ClassVar[tuple[str, ...]] = KV_DTYPES
    adapter_abilities: ClassVar[frozenset[str]] = ABILITIES
    schemes: frozenset[str] = frozenset(
        (
            *TILES,
            "w8a8",
            "w4a8_grouped",
            "w8a8_grouped",
            "w4a16",
            "w8a16",
            "f4a16",
            "f8a16",
            *(name for name, scheme in BLOCK_SCHEMES.items() if scheme.tiles is not None),
        )
    )

    def __init__(
        self, dtype: str = "float32", threads: int | None = None, isa: str = "auto", packed: bool = False
    ) -> None:
        if dtype not in FLOAT_DTYPES:
            raise BackendError(f"dtype {dtype}: the cpu backend computes in {', '.join(FLOAT_DTYPES)}")
        self._native = load_extension("_cpu")
        self.dtype = dtype
        weights = "float32" if packed else dtype
        try:
            self._runtime = self._native.Runtime(isa, thread_places(threads or usable_cores()), weights)
        except ValueError as error:
            raise BackendError(str(error)) from error
        except RuntimeError as error:
            raise BackendError(f"{error}: lower threads, or raise the limit of processes") from error
        self.isa: str = self._runtime.isa
        self.threads: int = self._runtime.threads
        self.details = f"{self.isa}, {self.threads} thread{'s' * (self.threads != 1)}"

    @property
    def runtime(self) -> Any:
        """The extension's runtime object, for ops that are not part of the interface."""
        return self._runtime

    # Tensors

    def tensor(self, host: HostTensor | NDArray[Any], dtype: str | None = None) -> Tensor:
        if isinstance(host, HostTensor):
            made = self._native.over(_native_order(host), host.dtype, host.shape)
        else:
            array = np.ascontiguousarray(host)
            if dtype is not None and array.dtype.name not in FLOAT_DTYPES and dtype in FLOAT_DTYPES:
                array = array.astype(np.float32)
            elif dtype is not None and dtype not in FLOAT_DTYPES:
                array = array.astype(dtype)
            made = self._native.over(array, array.dtype.name, array.shape)
        return made if dtype in (None, made.dtype) else self._runtime.convert(made, dtype)

    def to_host(self, tensor: Tensor) -> NDArray[Any]:
        array: NDArray[Any] = self._runtime.to_host(tensor)
        return array

    def empty(self, shape: Sequence[int], dtype: str) -> Tensor:
        return self._native.empty(shape, dtype)

    def memory(self) -> Memory:
        return host_memory(self.comm.sharing)

    # Weights

    def linear_weight(self, parts: Sequence[HostWeight], biases: Sequence[HostTensor] = ()) -> Any:
        bias = None
        if biases:
            flat = [self.to_host(self.tensor(part, "float32")).reshape(-1) for part in biases]
            bias = self.tensor(np.concatenate(flat))
        floats = float_parts(parts)
        if floats is not None:
            return self._native.LinearWeight([self.tensor(part, self.dtype) for part in floats], bias)
        if isinstance(parts[0], PackedWeight) and _keeps_activations(parts[0].scheme):
            return self._native.LinearWeight(list(map(self._grouped, parts)), bias)
        return self._native.QuantizedWeight(list(map(self._quantized, parts)), parts[0].shape[1], bias)

    def experts(self, experts: Sequence[Expert]) -> Any:
        return self._native.Experts(
            [expert.gate_up for expert in experts], [expert.down for expert in experts]
        )

    def tied_weight(self, table: Tensor) -> Any:
        return self._native.LinearWeight([table])

    def repack(self, codes: StoredCodes, bits: int) -> Bytes:
        return repacked(self._native, self._runtime, codes, bits)

    def quantize(self, weight: HostTensor, scheme: str) -> PackedWeight:
        shape = weight.shape[0], weight.shape[1]
        with _refusing(shape):
            part = self._runtime.quantize(self.tensor(weight), scheme)
        return packed_weight(TILES[scheme], shape, self.to_host(part.qweight), self.to_host(part.scales))

    def dequantize(self, weight: PackedWeight, dtype: str) -> HostTensor:
        if not isinstance(weight.scheme, BlockScheme) or weight.scheme.tiles is None:
            return super().dequantize(weight, dtype)
        out = np.empty(math.prod(weight.shape) * ITEM_SIZE[dtype], np.uint8)
        floats = self._native.over(out, dtype, weight.shape)
        with _refusing(weight.shape):
            self._runtime.dequantize_blocks(weight.scheme.name, self.tensor(block_data(weight)), floats)
        return HostTensor(dtype, weight.shape, _native_order(HostTensor(dtype, weight.shape, out)))

    def _grouped(self, part: HostWeight) -> Any:
        """Return ``part`` as a part of the extension's ``LinearWeight``."""
        if isinstance(part, HostTensor) or not _keeps_activations(part.scheme):
            raise unusable(part, self)
        return self._of_groups(self._runtime.grouped_part, part, part.scheme.name in ("f4a16", "f8a16"))

    def _of_groups(self, make: Any, part: PackedWeight, *more: Any) -> Any:
        scheme, columns = part.scheme, part.shape[1]
        assert isinstance(scheme, GroupedScheme)
        stored = {suffix: self.tensor(tensor) for suffix, tensor in part.parts.items()}
        size = scheme.group_size or columns
        with _refusing(part.shape):
            return make(
                scheme.bits,
                columns,
                size,
                stored[QWEIGHT],
                stored[SCALES],
                stored.get(ZEROS),
                stored.get(ORDER),
                *more,
            )

    def _quantized(self, part: HostWeight) -> Any:
        """Return ``part`` as a part of the extension's ``QuantizedWeight``."""
        if (
            isinstance(part, HostTensor)
            or _keeps_activations(part.scheme)
            or part.scheme.name not in self.schemes
        ):
            raise unusable(part, self)
        if isinstance(part.scheme, GroupedScheme):
            return self._of_groups(self._runtime.grouped_tiles, part)
        rows, columns = part.shape
        if isinstance(part.scheme, W8A8Scheme):
            return self._w8a8(part.scheme.operand(part))
        if isinstance(part.scheme, BlockScheme):
            with _refusing(part.shape):
                return self._runtime.tiles_of_blocks(
                    part.scheme.name, self.tensor(block_data(part)), rows, columns
                )
        stored = {suffix: self.tensor(tensor) for suffix, tensor in part.parts.items()}
        return self._native.QuantizedPart(
            part.scheme.name, stored[QWEIGHT], stored[SCALES], stored.get(SUB_SCALES), rows
        )

    def _w8a8(self, weight: Int8Operand) -> Any:
        zeros = None if weight.zeros is None else self.tensor(weight.zeros)
        inputs, mode = weight.inputs, "symmetric" if weight.inputs.symmetric else "asymmetric"
        if inputs.scale is not None:
            mode = "constants"
        return self._runtime.w8a8_part(
            self.tensor(weight.values),
            self.tensor(weight.scales),
            zeros,
            mode,
            inputs.scale or 0.0,
            inputs.zero,
        )

    # Key/value cache

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> Any:
        self.check_kv(spec, num_blocks)
        return self._native.KVCache(spec, num_blocks)

    def host_blocks(self, kv: Any, spec: KVSpec, num_places: int) -> HostBlocks:
        def copy(blocks: Ids, places: Ids, memory: NDArray[np.uint8], to_host: bool) -> None:
            self._runtime.flush()
            kv.copy(blocks, places, memory, to_host)

        return SynchronousHostBlocks(copy, num_places, self.kv_bytes_per_block(spec), self.comm.sharing)

    def release(self, caches: Sequence[Any]) -> None:
        self._runtime.release(list(caches))

    # Slots

    def alloc_slots(self, spec: SlotSpec) -> Any:
        return self._native.Slots(spec)

    def set_slot(self, slots: Any, slot: int, params: SlotParams) -> None:
        self._runtime.flush()
        slots.set(slot, params)

    def append_blocks(
        self, slots: Any, slot_ids: NDArray[np.int32], columns: NDArray[np.int32], blocks: NDArray[np.int32]
    ) -> None:
        self._runtime.flush()
        slots.append_blocks(slot_ids, columns, blocks)

    def upload(
        self, batch: ForwardBatch, slots: Any, spec: KVSpec, key: GraphKey | None = None
    ) -> ForwardBatch:
        native = self._runtime.upload(batch, slots, spec.block_size)
        return uploaded(
            batch,
            native,
            token_adapters=native.token_adapters,
            sample_adapters=native.sample_adapters,
        )

    # Adapters

    def expert_tables(self, gate_up: Sequence[Any], down: Sequence[Any]) -> Any:
        return self._native.ExpertTables(gate_up, down)

    def adapter_rows(self, adapters: Ids) -> Any:
        return self._native.AdapterRows(adapters.tolist())

    def add_lora(self, y: Tensor, x: Tensor, table: Any, rows: Any) -> Tensor:
        return self._runtime.add_lora(y, x, table, rows)

    # Model ops

    def gated_linear(self, x: Tensor, weight: Any, activation: str, feeds: Any = None) -> Tensor:
        try:
            return self._runtime.gated_linear(x, weight, activation)
        except ValueError as error:
            raise BackendError(str(error)) from error

    def logits(self, hidden: Tensor, weight: Any) -> Tensor:
        return self._runtime.linear(hidden, weight)

    # Graphs

    def graph_rows(self, most: int) -> Sequence[int]:
        return range(1, most + 1)

    def capture(self, key: GraphKey, step: Step, slots: Any, spec: KVSpec) -> Step:
        """Return a step that is recorded at its first call and replayed at later ones."""
        graph: Any = None

        def run(batch: ForwardBatch) -> Sequence[Tensor]:
            nonlocal graph
            if graph is None:
                graph = self._runtime.capture(batch.backend, lambda: list(step(batch)))
            else:
                self._runtime.replay(graph, batch.backend)
            outputs: Sequence[Tensor] = graph.outputs
            return outputs

        return run


def _keeps_activations(scheme: Scheme) -> bool:
    """Return whether weights in ``scheme`` are multiplied by the kernels of float weights, which do not quantise
    activations."""
    return isinstance(scheme, GroupedScheme) and scheme.input_dtype is None


@contextmanager
def _refusing(shape: Sequence[int]) -> Iterator[None]:
    """Turn a ValueError with which the extension refuses a weight of ``shape`` into a ModelError."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"a weight of shape {list(shape)}: {error}") from error


def _native_order(host: HostTensor) -> NDArray[np.uint8]:
    """Return the bytes of ``host``, which are little-endian; on a big-endian machine, a copy with swapped bytes."""
    size = ITEM_SIZE[host.dtype]
    if sys.byteorder == "little" or size == 1:
        return host.data
    return np.ascontiguousarray(host.data.reshape(-1, size)[:, ::-1]).reshape(-1)
