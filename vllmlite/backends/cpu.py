"""The native CPU backend: the contract on ``vllmlite._cpu``, without torch.

Ops return at once: the extension appends them to a list, which its threads go through when a result is read, in
:meth:`CpuBackend.to_host`, or the next step begins. A graph is such a list, kept. Activations are float32 whatever the
weights are, or bfloat16 where a product of the model's weights takes nothing else; an output row is a function of its
own input row, bit for bit, whatever else is in the batch.
"""

# ruff: noqa: D102  (the methods are documented in base.py)

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import (
    API,
    FLOAT_DTYPES,
    ITEM_SIZE,
    KV_DTYPES,
    SCALE_SIZE,
    Backend,
    BlockTensor,
    Expert,
    Feature,
    ForwardBatch,
    HostTensor,
    HostWeight,
    KVSpec,
    Logprobs,
    Memory,
    Op,
    QuantizedTensor,
    Rope,
    Sampled,
    SlotParams,
    SlotSpec,
    Step,
    Tensor,
    float_parts,
    rope_arguments,
)
from vllmlite.backends.cores import thread_places, usable_cores
from vllmlite.backends.memory import host_memory
from vllmlite.errors import BackendError, ModelError
from vllmlite.weights.gguf_blocks import FLOATS, to_floats
from vllmlite.weights.quantized import dequantize, quantized_tensor

HEAD_UNIT = 16
"""The cache pads heads to a multiple of this."""
NO_WINDOW = 2**31 - 1

_Part: TypeAlias = tuple[str, Tensor, Tensor, Tensor | None, int]
"""Of a quantised weight: its kind, codes, scales, factors and rows."""


class CpuBackend(Backend):
    """``dtype``: of dense weights, one of ``FLOAT_DTYPES``. ``threads``: as many as the process may use where None.
    ``isa``: a name in ``_cpu.instruction_sets()``, or ``auto`` for the best. ``quantization`` and ``keeps_blocks``: of
    products' weights, as the contract has it. BackendError says what is missing."""

    name: ClassVar[str] = "cpu"
    device = "cpu"
    kv_dtypes: ClassVar[tuple[str, ...]] = KV_DTYPES
    ops: ClassVar[frozenset[Op]] = frozenset(Op)

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
        self._native = load_native()
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

    def rows(self, tensor: Tensor, index: Tensor) -> Tensor:
        return self._runtime.rows(tensor, index)

    def memory(self) -> Memory:
        return host_memory()

    # Weights

    def linear_weight(self, parts: Sequence[HostWeight], biases: Sequence[HostTensor] = ()) -> Any:
        bias = None
        if biases:
            flat = [self.to_host(self.tensor(part, "float32")).reshape(-1) for part in biases]
            bias = self.tensor(np.concatenate(flat))
        if self.quantization is not None:
            return self._quantized_weight(
                [self._packed(part, self.quantization) for part in parts], parts[0], bias
            )
        if self.keeps_blocks and not any(isinstance(part, HostTensor) for part in parts):
            return self._quantized_weight([self._strips(part) for part in parts], parts[0], bias)
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
        if part.type in FLOATS:
            return to_floats(part, dtype)
        out = np.empty(math.prod(part.shape) * ITEM_SIZE[dtype], np.uint8)
        self._runtime.floats_of_blocks(
            part.type, self.tensor(part.data), self._native.over(out, dtype, part.shape)
        )
        return HostTensor(dtype, part.shape, _native_order(HostTensor(dtype, part.shape, out)))

    def _quantized_weight(self, parts: Sequence[_Part], like: HostWeight, bias: Tensor | None) -> Any:
        return self._native.QuantizedWeight(parts, like.shape[1], bias)

    def _packed(self, part: HostWeight, kind: str) -> _Part:
        if isinstance(part, HostTensor):
            return self._quantize(self.tensor(part), kind)
        return self._strips(part)

    def _strips(self, part: HostWeight) -> _Part:
        """A part that is quantised already."""
        if isinstance(part, BlockTensor):
            rows, size = part.shape
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
        try:
            found: _Part = self._runtime.quantize(weight, kind)
        except ValueError as error:
            raise ModelError(f"a weight of shape {list(weight.shape)}: {error}") from error
        return found

    # Key/value cache

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        head = -(-spec.head_dim // HEAD_UNIT) * HEAD_UNIT * ITEM_SIZE[spec.dtype]
        if spec.dtype == "int8":
            head += SCALE_SIZE
        return 2 * spec.num_layers * spec.num_kv_heads * head * spec.block_size

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

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return self._runtime.embedding(token_ids, weight)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._runtime.rms_norm(x, weight, eps, residual)
        return found

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._runtime.layer_norm(x, weight, bias, eps, residual)
        return found

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        return self._runtime.add(x, other)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return self._runtime.scale(x, factor)

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        return self._runtime.soft_cap(x, cap)

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        return self._runtime.linear(x, weight)

    def attn_prep(
        self,
        qkv: Tensor,
        num_heads: int,
        rope: Rope | None,
        kv: Any,
        layer: int,
        batch: ForwardBatch,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        return self._runtime.attn_prep(
            qkv, num_heads, *rope_arguments(rope), kv, layer, batch.backend, q_norm, k_norm, eps
        )

    def paged_attention(
        self,
        q: Tensor,
        kv: Any,
        layer: int,
        batch: ForwardBatch,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        alibi: Tensor | None = None,
    ) -> Tensor:
        sees = NO_WINDOW if window is None else min(window, NO_WINDOW)
        return self._runtime.paged_attention(q, kv, layer, batch.backend, scale, sees, soft_cap or 0.0, alibi)

    def gated_activation(self, x: Tensor, activation: str) -> Tensor:
        try:
            return self._runtime.gated_activation(x, activation)
        except ValueError as error:
            raise BackendError(str(error)) from error

    def gated_linear(self, x: Tensor, weight: Any, activation: str) -> Tensor:
        try:
            return self._runtime.gated_linear(x, weight, activation)
        except ValueError as error:
            raise BackendError(str(error)) from error

    def activation(self, x: Tensor, activation: str) -> Tensor:
        try:
            return self._runtime.activation(x, activation)
        except ValueError as error:
            raise BackendError(str(error)) from error

    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        experts: Any,
        top_k: int,
        renormalise: bool,
        activation: str,
    ) -> Tensor:
        return self._runtime.moe(x, router_logits, experts, top_k, renormalise, activation)

    def sigmoid_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return self._runtime.sigmoid_gate(x, gate)

    def logits(self, hidden: Tensor, weight: Any) -> Tensor:
        return self._runtime.linear(hidden, weight)

    # Sampling

    def sample(self, logits: Tensor, slots: Any, batch: ForwardBatch) -> Sampled:
        return _unpack(self._runtime.sample(logits, batch.backend))

    def logprobs(self, logits: Tensor, ids: Tensor, k: int) -> Logprobs:
        return Logprobs(*self._runtime.logprobs(logits, ids, k))

    # Graphs

    def capture(self, key: tuple[int, int, Feature, int], step: Step) -> Step:
        """Records at the first call; later ones replay."""
        graph: Any = None

        def run(batch: ForwardBatch) -> Sampled:
            nonlocal graph
            if graph is not None:
                return _unpack(self._runtime.replay(graph, batch.backend))
            graph, found = self._runtime.capture(batch.backend, lambda: _pack(step(batch)))
            return _unpack(found)

        return run


def _pack(sampled: Sampled) -> list[Tensor]:
    found = sampled.logprobs
    return (
        [sampled.ids] if found is None else [sampled.ids, found.chosen, found.rank, found.top_ids, found.top]
    )


def _unpack(tensors: list[Tensor]) -> Sampled:
    ids, *logprobs = tensors
    return Sampled(ids, Logprobs(*logprobs) if logprobs else None)


def _native_order(host: HostTensor) -> NDArray[np.uint8]:
    """The bytes; a swapped copy where the machine's order is not the little-endian one."""
    size = ITEM_SIZE[host.dtype]
    if sys.byteorder == "little" or size == 1:
        return host.data
    return np.ascontiguousarray(host.data.reshape(-1, size)[:, ::-1]).reshape(-1)


def load_native() -> Any:
    """``vllmlite._cpu``. BackendError if it is not installed or speaks another version of the contract."""
    try:
        native = importlib.import_module("vllmlite._cpu")
    except ImportError as error:
        raise BackendError(f"vllmlite._cpu is not installed ({error})") from error
    if native.API != API:
        raise BackendError(f"vllmlite._cpu is built for interface {native.API}, and this is {API}")
    return native
