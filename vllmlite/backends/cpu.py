"""The native CPU backend: the contract on ``vllmlite._cpu``, without torch.

Ops return at once: the extension appends them to a list, which its threads go through when a result is read, in
:meth:`CpuBackend.to_host`, or the next step begins. A graph is such a list, kept. Activations are float32 whatever the
weights are, or bfloat16 where a product of the model's weights takes nothing else; an output row is a function of its
own input row, bit for bit, whatever else is in the batch.
"""

# ruff: noqa: D102  (the methods are documented in base.py)

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import (
    FLOAT_DTYPES,
    ITEM_SIZE,
    KV_DTYPES,
    BlockTensor,
    Expert,
    Feature,
    ForwardBatch,
    HostTensor,
    HostWeight,
    KVSpec,
    Memory,
    QuantizedTensor,
    Sampled,
    SlotParams,
    SlotSpec,
    Step,
    Tensor,
    float_parts,
)
from vllmlite.backends.cores import thread_places, usable_cores
from vllmlite.backends.memory import host_memory
from vllmlite.backends.native import NativeBackend, load_extension, pack, unpack
from vllmlite.errors import BackendError, ModelError
from vllmlite.weights.gguf_blocks import KINDS, to_floats
from vllmlite.weights.quantized import dequantize, quantized_tensor

_Part: TypeAlias = tuple[str, Tensor, Tensor, Tensor | None, int]
"""Of a quantised weight: its kind, codes, scales, factors and rows."""


class CpuBackend(NativeBackend):
    """``dtype``: of dense weights, one of ``FLOAT_DTYPES``. ``threads``: as many as the process may use where None.
    ``isa``: a name in ``_cpu.instruction_sets()``, or ``auto`` for the best. ``quantization`` and ``keeps_blocks``: of
    products' weights, as the contract has it. BackendError says what is missing."""

    name: ClassVar[str] = "cpu"
    device = "cpu"
    kv_dtypes: ClassVar[tuple[str, ...]] = KV_DTYPES

    def __init__(
        self,
        dtype: str = "float32",
        threads: int | None = None,
        isa: str = "auto",
        quantization: str | None = None,
        keeps_blocks: bool = False,
    ) -> None:
        if dtype not in FLOAT_DTYPES:
            raise BackendError(f"dtype {dtype}: the cpu backend computes in {', '.join(FLOAT_DTYPES)}")
        self._native = load_extension("_cpu")
        self.dtype, self.quantization, self.keeps_blocks = dtype, quantization, keeps_blocks
        # What is quantised next need not be rounded before.
        weights = dtype if quantization is None and not keeps_blocks else "float32"
        try:
            self._runtime = self._native.Runtime(isa, thread_places(threads or usable_cores()), weights)
        except ValueError as error:
            raise BackendError(str(error)) from error
        self.isa: str = self._runtime.isa
        self.threads: int = self._runtime.threads
        self.details = f"{self.isa}, {self.threads} thread{'s' * (self.threads != 1)}"

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
        return host_memory()

    # Weights

    def linear_weight(self, parts: Sequence[HostWeight], biases: Sequence[HostTensor] = ()) -> Any:
        bias = None
        if biases:
            flat = [self.to_host(self.tensor(part, "float32")).reshape(-1) for part in biases]
            bias = self.tensor(np.concatenate(flat))
        strips = None
        if self.quantization is not None:
            strips = [self._packed(part, self.quantization) for part in parts]
        elif self.keeps_blocks and not any(isinstance(part, HostTensor) for part in parts):
            strips = [self._strips(part) for part in parts]
        if strips is not None:
            return self._native.QuantizedWeight(strips, parts[0].shape[1], bias)
        dense = list(map(self._decoded, parts)) if self.keeps_blocks else float_parts(parts)
        return self._native.LinearWeight([self.tensor(part, self.dtype) for part in dense], bias)

    def float_weight(self, weight: HostTensor) -> Any:
        return self._native.LinearWeight([self.tensor(weight, self.dtype)])

    def experts(self, experts: Sequence[Expert]) -> Any:
        return self._native.Experts(
            [expert.gate_up for expert in experts], [expert.down for expert in experts]
        )

    def tied_weight(self, table: Tensor) -> Any:
        if self.quantization is not None:
            part = self._quantize(table, self.quantization)
            return self._native.QuantizedWeight([part], table.shape[1])
        return self._native.LinearWeight([table])

    def quantize(self, weight: HostTensor, kind: str) -> QuantizedTensor:
        """A weight ``[out, in]`` in ``int8`` or ``int4``. ModelError if a value is not finite."""
        shape = weight.shape[0], weight.shape[1]
        _, codes, scales, _, _ = self._quantize(self.tensor(weight), kind)
        return quantized_tensor(kind, shape, self.to_host(codes), self.to_host(scales))

    def decode_blocks(self, part: BlockTensor, dtype: str) -> HostTensor:
        if part.type not in KINDS:
            return to_floats(part, dtype)
        out = np.empty(math.prod(part.shape) * ITEM_SIZE[dtype], np.uint8)
        floats = self._native.over(out, dtype, part.shape)
        with _refusing(part.shape):
            self._runtime.floats_of_blocks(part.type, self.tensor(part.data), floats)
        return HostTensor(dtype, part.shape, _native_order(HostTensor(dtype, part.shape, out)))

    def _packed(self, part: HostWeight, kind: str) -> _Part:
        if isinstance(part, HostTensor):
            return self._quantize(self.tensor(part), kind)
        return self._strips(part)

    def _strips(self, part: HostWeight) -> _Part:
        """A part that is quantised already."""
        if isinstance(part, BlockTensor):
            rows, size = part.shape
            with _refusing(part.shape):
                found: _Part = self._runtime.strips_of_blocks(part.type, self.tensor(part.data), rows, size)
            return found
        assert isinstance(part, QuantizedTensor)
        factors = None if part.factors is None else self.tensor(part.factors)
        return part.kind, self.tensor(part.codes), self.tensor(part.scales), factors, part.shape[0]

    def _decoded(self, part: HostWeight) -> HostTensor:
        """The floats of a part beside others that are floats."""
        if isinstance(part, HostTensor):
            return part
        if isinstance(part, BlockTensor):
            return self.decode_blocks(part, "float32")
        return HostTensor("float32", part.shape, dequantize(part).astype("<f4").reshape(-1).view(np.uint8))

    def _quantize(self, weight: Tensor, kind: str) -> _Part:
        with _refusing(weight.shape):
            found: _Part = self._runtime.quantize(weight, kind)
        return found

    # Key/value cache

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> Any:
        self.check_kv(spec, num_blocks)
        return self._native.KVCache(
            spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.dtype, num_blocks
        )

    def copy_blocks(self, src: Any, dst: Any, pairs: NDArray[np.int64]) -> None:
        self._runtime.flush()
        src.copy_blocks(dst, np.asarray(pairs, np.int64))

    # Slots

    def alloc_slots(self, spec: SlotSpec) -> Any:
        return self._native.Slots(spec.max_slots, spec.max_blocks, spec.vocab_size, spec.num_blocks)

    def set_slot(self, slots: Any, slot: int, params: SlotParams) -> None:
        self._runtime.flush()
        slots.set(slot, params)

    def append_blocks(
        self, slots: Any, slot_ids: NDArray[np.int32], columns: NDArray[np.int32], blocks: NDArray[np.int32]
    ) -> None:
        self._runtime.flush()
        slots.append_blocks(slot_ids, columns, blocks)

    def upload(self, batch: ForwardBatch, slots: Any) -> ForwardBatch:
        native = self._runtime.upload(batch, slots)
        token_ids, positions, logits_rows = native.tensors()
        return replace(
            batch, token_ids=token_ids, positions=positions, logits_rows=logits_rows, backend=native
        )

    # Model ops

    def gated_linear(self, x: Tensor, weight: Any, activation: str) -> Tensor:
        try:
            return self._runtime.gated_linear(x, weight, activation)
        except ValueError as error:
            raise BackendError(str(error)) from error

    def logits(self, hidden: Tensor, weight: Any) -> Tensor:
        return self._runtime.linear(hidden, weight)

    # Graphs

    def capture(self, key: tuple[int, int, Feature, int], step: Step) -> Step:
        """Records at the first call; later ones replay."""
        graph: Any = None

        def run(batch: ForwardBatch) -> Sampled:
            nonlocal graph
            if graph is not None:
                return unpack(self._runtime.replay(graph, batch.backend))
            graph, found = self._runtime.capture(batch.backend, lambda: pack(step(batch)))
            return unpack(found)

        return run


@contextmanager
def _refusing(shape: Sequence[int]) -> Iterator[None]:
    """What the extension cannot take of a weight is the model's fault."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"a weight of shape {list(shape)}: {error}") from error


def _native_order(host: HostTensor) -> NDArray[np.uint8]:
    """The bytes; a swapped copy where the machine's order is not the little-endian one."""
    size = ITEM_SIZE[host.dtype]
    if sys.byteorder == "little" or size == 1:
        return host.data
    return np.ascontiguousarray(host.data.reshape(-1, size)[:, ::-1]).reshape(-1)
