"""Calibration: runs text through a model, one layer at a time, and measures the inputs of the layer's products.

A layer runs as a decoder of its own, whose embedding table is the hidden states after the previous layer, one row for
each token. So only one layer's weights are in memory, for every family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import Backend, Expert, LinearWeight
from vllmlite.backends.batch import ForwardBatch, SlotParams, SlotSpec, Tensor
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.models.decoder import Decoder
from vllmlite.models.spec import DecoderSpec
from vllmlite.weights.checkpoint import Weights
from vllmlite.weights.host import Floats, HostTensor
from vllmlite.weights.packing import Packing
from vllmlite.weights.parts import TABLE, ModelWeights, Source

WINDOW = 512
"""Length of a calibration sequence in tokens."""
BLOCK = 64
"""Size of a block of the key/value cache in tokens."""


@dataclass(slots=True)
class Moments:
    """Sums over the inputs of a product."""

    gram: NDArray[np.float32]
    """``[in, in]``: the sum of the inputs' outer products."""
    magnitude: NDArray[np.float64]
    """``[in]``: the sum of the inputs' magnitudes."""
    rows: int = 0

    @classmethod
    def of_size(cls, size: int) -> Moments:
        """Return moments of zero inputs, for products with ``size`` input channels."""
        return cls(np.zeros((size, size), np.float32), np.zeros(size))

    def add(self, inputs: Floats) -> None:
        """Add inputs ``[rows, in]``."""
        self.gram += inputs.T @ inputs
        self.magnitude += np.abs(inputs).sum(0, dtype=np.float64)
        self.rows += len(inputs)


class Calibration:
    """Runs layers of the model ``spec`` over ``num_tokens`` tokens on ``backend``, in windows of :data:`WINDOW`."""

    def __init__(self, spec: DecoderSpec, backend: Backend, num_tokens: int) -> None:
        self.spec, self.backend = spec, backend
        self.window = window = min(WINDOW, spec.max_position_embeddings)
        self.kv_spec = KVSpec(1, spec.num_kv_heads, spec.head_dim, BLOCK, backend.dtype)
        blocks, vocab_size = -(-window // BLOCK), max(spec.vocab_size, num_tokens)
        self.kv = backend.alloc_kv(self.kv_spec, blocks)
        self.slots = backend.alloc_slots(SlotSpec(1, blocks, window, vocab_size, blocks))
        backend.set_slot(self.slots, 0, SlotParams())
        columns = np.arange(blocks, dtype=np.int32)
        backend.append_blocks(self.slots, np.zeros_like(columns), columns, columns)

    def embedded(self, tensors: Mapping[str, HostTensor], ids: NDArray[np.int32]) -> Floats:
        """Return the hidden states ``[T, hidden]`` before the first layer."""
        bare = replace(self.spec, layers=(), final_norm=False)
        return self._run(self._decoder(bare, tensors, self.backend), ids)

    def measure(self, layer: int, tensors: Mapping[str, HostTensor], hidden: Floats) -> dict[str, Moments]:
        """Return the moments of the inputs of each product of a layer, by the name of its weight. ``tensors`` are the
        layer's float32 tensors by the model's names, ``hidden`` the hidden states before it."""
        observer = _Observer(self.backend, {id(tensor): name for name, tensor in tensors.items()})
        self._through(layer, tensors, hidden, observer)
        return observer.moments

    def through(self, layer: int, tensors: Mapping[str, HostTensor], hidden: Floats) -> Floats:
        """Return the hidden states after a layer."""
        return self._through(layer, tensors, hidden, self.backend)

    def _through(self, layer: int, tensors: Mapping[str, HostTensor], hidden: Floats, backend: Any) -> Floats:
        alone = replace(
            self.spec,
            layers=(self.spec.layers[layer],),
            embedding_scale=1.0,
            learned_positions=0,
            embedding_norm=False,
            embedding_size=None,
            final_norm=False,
            vocab_size=len(hidden),
        )
        own = {f"0.{name.partition('.')[2]}": tensor for name, tensor in tensors.items()}
        data = np.ascontiguousarray(hidden, "<f4").reshape(-1).view(np.uint8)
        table = HostTensor("float32", hidden.shape, data)
        return self._run(
            self._decoder(alone, {**own, TABLE: table}, backend), np.arange(len(hidden), dtype=np.int32)
        )

    def _decoder(self, spec: DecoderSpec, tensors: Mapping[str, HostTensor], backend: Any) -> Decoder:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        sources = {name: Source(name, shape, shape) for name, shape in shapes.items()}
        weights = ModelWeights(sources, Weights(tensors.__getitem__, shapes, {}), Packing(backend))
        return Decoder(
            spec, backend, weights, max_model_len=self.window, num_positions=self.window, kv_spec=self.kv_spec
        )

    def _run(self, decoder: Decoder, ids: NDArray[np.int32]) -> Floats:
        found = np.empty((len(ids), self.spec.hidden_size), np.float32)
        for first in range(0, len(ids), self.window):
            own = ids[first : first + self.window]
            batch = self.backend.upload(_batch(own), self.slots, self.kv_spec)
            found[first : first + len(own)] = self.backend.to_host(decoder.forward(batch, self.kv))
        return found


def _batch(ids: NDArray[np.int32]) -> ForwardBatch:
    """Return a batch of a whole sequence in one step."""
    count = len(ids)
    one, zero = np.array([count], np.int32), np.zeros(1, np.int32)
    return ForwardBatch(
        num_tokens=count,
        num_rows=1,
        max_query_len=count,
        max_context=count,
        token_ids=ids,
        positions=np.arange(count, dtype=np.int32),
        query_start_loc=np.array([0, count], np.int32),
        slots=zero,
        context_lens=one,
        logits_rows=one - 1,
        sample_slots=zero,
        sample_positions=one.astype(np.int64),
    )


class _Observer:
    """Measures the inputs of products and passes all ops on to another backend."""

    def __init__(self, backend: Backend, names: Mapping[int, str]) -> None:
        """Measure the inputs of products on ``backend``. ``names`` maps the ``id()`` of each weight to its name."""
        self._backend, self._names = backend, names
        self._products: dict[int, tuple[LinearWeight, list[str]]] = {}
        self.moments: dict[str, Moments] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def linear_weight(self, parts: Sequence[HostTensor], biases: Sequence[HostTensor] = ()) -> LinearWeight:
        weight = self._backend.linear_weight(parts, biases)
        names = [self._names[id(part)] for part in parts]
        self._products[id(weight)] = weight, names
        shared = Moments.of_size(parts[0].shape[1])
        self.moments.update(dict.fromkeys(names, shared))
        return weight

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        self._measure(x, weight)
        return self._backend.linear(x, weight)

    def gated_linear(
        self, x: Tensor, weight: LinearWeight, activation: str, feeds: LinearWeight | None = None
    ) -> Tensor:
        self._measure(x, weight)
        return self._backend.gated_linear(x, weight, activation)

    def experts(self, experts: Sequence[Expert]) -> Any:
        return experts, self._backend.experts(experts)

    def moe(
        self, x: Tensor, router_logits: Tensor, experts: Any, top_k: int, renormalise: bool, activation: str
    ) -> Tensor:
        single, packed = experts
        inputs, logits = self._backend.to_host(x), self._backend.to_host(router_logits)
        chosen = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
        for number, expert in enumerate(single):
            rows = inputs[(chosen == number).any(1)]
            if len(rows):
                inner = self.gated_linear(self._backend.tensor(rows), expert.gate_up, activation)
                self._measure(inner, expert.down)
        return self._backend.moe(x, router_logits, packed, top_k, renormalise, activation)

    def _measure(self, x: Tensor, weight: LinearWeight) -> None:
        names = self._products[id(weight)][1]
        self.moments[names[0]].add(self._backend.to_host(x))
