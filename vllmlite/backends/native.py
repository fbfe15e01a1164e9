"""The ops that all native backends implement the same way: calls of the runtime of their extension module."""

# ruff: noqa: D102  (the methods are documented in base.py)

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import API, Backend, ExpertTables, Rope
from vllmlite.backends.batch import AdapterRows, ForwardBatch, Tensor
from vllmlite.backends.cores import thread_places, usable_cores
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.backends.sampling import BeamRows, Continuations, Logprobs, Sampled
from vllmlite.errors import BackendError
from vllmlite.weights.adapter import AdapterLimits, LowRank
from vllmlite.weights.schemes.codes import Bytes, StoredCodes

HEAD_UNIT = 16
"""The cache pads heads to a multiple of this number of elements."""
NO_WINDOW = 2**31 - 1


class NativeBackend(Backend):
    """Base of native backends. Their ops are methods of ``_runtime``, an object of the extension module ``_native``."""

    _native: Any
    _runtime: Any

    @property
    def extension(self) -> ModuleType:
        module: ModuleType = self._native
        return module

    # Tensors and the key/value cache

    def rows(self, tensor: Tensor, index: Tensor) -> Tensor:
        return self._runtime.rows(tensor, index)

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        padded = replace(spec, head_dim=-(-spec.head_dim // HEAD_UNIT) * HEAD_UNIT)
        return 2 * spec.num_layers * spec.num_kv_heads * padded.head_bytes * spec.block_size

    def copy_blocks(
        self, source: Any, sources: NDArray[np.int32], target: Any, targets: NDArray[np.int32]
    ) -> None:
        self._runtime.copy_blocks(source, sources, target, targets)

    # Adapters

    def alloc_low_rank(self, rows: Sequence[int], columns: int, limits: AdapterLimits) -> Any:
        return self._runtime.low_rank_table(rows, columns, limits.max_adapters, limits.max_rank)

    def set_low_rank(self, table: Any, index: int, parts: Sequence[LowRank | None]) -> None:
        inputs: list[Tensor] = []
        places: dict[int, int] = {}
        """Address of an ``a``, which parts may share → its index in ``inputs``."""
        outputs: list[tuple[int, int, Tensor, float]] = []
        gains: list[Tensor | None] = []
        for number, part in enumerate(parts):
            if part is None:
                continue
            place = places.setdefault(part.a.data.ctypes.data, len(inputs))
            if place == len(inputs):
                inputs.append(self.tensor(part.a, self.dtype))
            outputs.append((number, place, self.tensor(part.b, self.dtype), part.scale))
            gains.append(None if part.gain is None else self.tensor(part.gain))
        given = [gains] if any(gain is not None for gain in gains) else []
        try:
            self._runtime.set_low_rank(table, index, inputs, outputs, *given)
        except MemoryError as error:
            raise BackendError(f"an adapter does not fit into memory: lower max_loras ({error})") from error

    def lora_linear(self, x: Tensor, weight: Any, table: Any, batch: ForwardBatch) -> Tensor:
        return self._runtime.lora_linear(x, weight, table, batch.backend)

    # Model ops

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return self._runtime.embedding(token_ids, weight)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, feeds: Any = None
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
            qkv, num_heads, *_rope_arguments(rope), kv, layer, batch.backend, q_norm, k_norm, eps
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
        sinks: Tensor | None = None,
    ) -> Tensor:
        tokens = NO_WINDOW if window is None else min(window, NO_WINDOW)
        return self._runtime.paged_attention(
            q, kv, layer, batch.backend, scale, tokens, soft_cap or 0.0, alibi, sinks
        )

    def gated_activation(self, x: Tensor, activation: str) -> Tensor:
        try:
            return self._runtime.gated_activation(x, activation)
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
        tables: ExpertTables = None,
        adapters: AdapterRows = None,
    ) -> Tensor:
        adapted = () if adapters is None else (tables, adapters)
        return self._runtime.moe(x, router_logits, experts, top_k, renormalise, activation, *adapted)

    def sigmoid_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return self._runtime.sigmoid_gate(x, gate)

    # Sampling

    def sample(self, logits: Tensor, slots: Any, batch: ForwardBatch) -> Sampled:
        ids, *logprobs = self._runtime.sample(logits, batch.backend)
        return Sampled(ids, Logprobs(*logprobs) if logprobs else None)

    def probabilities(self, logits: Tensor, slots: Any, batch: ForwardBatch) -> Tensor:
        return self._runtime.probabilities(logits, batch.backend)

    def choose_beams(
        self, logits: Tensor, slots: Any, batch: ForwardBatch, beams: BeamRows, k: int
    ) -> Continuations:
        given = (beams.rows, beams.groups, beams.scores, beams.temperatures)
        return Continuations(*self._runtime.choose_beams(logits, batch.backend, *given, k))

    def accept(self, ids: Tensor, slots: Any, batch: ForwardBatch) -> Tensor:
        return self._runtime.accept(ids, batch.backend)

    def logprobs(self, logits: Tensor, ids: Tensor, k: int) -> Logprobs:
        return Logprobs(*self._runtime.logprobs(logits, ids, k))


def _rope_arguments(rope: Rope | None) -> tuple[Tensor | None, int, bool]:
    """Return ``rope`` as the extensions take it: table or None, number of rotated elements, whether interleaved."""
    return (None, 0, False) if rope is None else (rope.cos_sin, rope.rotary_dim, rope.interleaved)


def uploaded(batch: ForwardBatch, native: Any, **tensors: Any) -> ForwardBatch:
    """Return ``batch`` with the tensors of ``native``, the extension's copy of it, and further ones by field."""
    token_ids, positions, logits_rows = native.tensors()
    return replace(
        batch,
        token_ids=token_ids,
        positions=positions,
        logits_rows=logits_rows,
        backend=native,
        **tensors,
    )


def load_extension(name: str) -> Any:
    """Import ``vllmlite.NAME``. BackendError if it is not installed or has another version of the interface."""
    try:
        native = importlib.import_module(f"vllmlite.{name}")
    except ModuleNotFoundError:
        raise BackendError(
            f"vllmlite.{name} is not installed (Debian: python3-vllmlite{name.replace('_', '-')}; "
            f"pip: VLLMLITE{name.upper()}=1)"
        ) from None
    except ImportError as error:
        raise BackendError(f"vllmlite.{name} cannot be imported: {error}") from error
    if native.API != API:
        raise BackendError(f"vllmlite.{name} is built for interface {native.API}, and this is {API}")
    return native


def repacked(native: Any, runtime: Any, codes: StoredCodes, bits: int) -> Bytes:
    """Return ``codes`` as rows of ``bits`` bits a code (:meth:`StoredCodes.repacked`), computed by a runtime of
    ``vllmlite._cpu``."""
    data, order = codes.data.data, codes.order
    tensor = runtime.repack(
        codes.packing,
        codes.bits,
        *codes.shape,
        native.over(data, "uint8", data.shape),
        None if order is None else native.over(np.ascontiguousarray(order, np.int32), "int32", order.shape),
        codes.added,
        bits,
    )
    return np.from_dlpack(tensor).view(np.uint8)


@cache
def host_extension() -> tuple[Any, Any] | None:
    """Return ``vllmlite._cpu`` and a runtime of it, with which another backend computes on the host; None if it is not
    installed."""
    try:
        native = load_extension("_cpu")
    except BackendError:
        return None
    return native, native.Runtime("auto", thread_places(usable_cores()), "float32")
