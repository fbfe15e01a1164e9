"""Tensors of a model as parts of a checkpoint's: fused projections taken apart, transposed ones put right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from vllmlite.backends.base import ITEM_SIZE, BlockTensor, HostTensor, HostWeight, QuantizedTensor
from vllmlite.errors import ModelError
from vllmlite.weights.checkpoint import Weights


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a stored tensor are meant: of each of ``blocks`` equal runs of rows, those from ``first`` up to
    ``last``. One block is a plain slice; more are a projection whose parts alternate by head."""

    blocks: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor of the model is in its checkpoint."""

    key: str
    """The stored tensor's name."""
    stored: tuple[int, ...]
    """Its shape, as stored."""
    shape: tuple[int, ...]
    """The model's tensor, ``[out, in]`` if it is the weight of a product."""
    rows: Rows | None = None
    """None: all rows."""
    transposed: bool = False
    """Whether a weight is stored ``[in, out]``; ``rows`` are then its columns."""
    product: bool = False
    """Whether it is the weight of a product, which is what quantisation applies to."""

    def take(self, tensor: HostWeight) -> HostWeight:
        """The model's tensor out of the stored one: the same memory where its rows lie together, else a copy."""
        if self.rows is None and not self.transposed:
            return tensor
        if isinstance(tensor, QuantizedTensor) or (self.transposed and isinstance(tensor, BlockTensor)):
            raise ModelError(f"tensor {self.key!r}: its rows cannot be taken apart where they are quantised")
        if isinstance(tensor, BlockTensor):
            elements = tensor.data.reshape(self.stored[0], -1)
        else:
            elements = tensor.data.view(f"u{ITEM_SIZE[tensor.dtype]}").reshape(self.stored)
        if self.transposed:
            elements = elements.T
        if self.rows is not None:
            blocked = elements.reshape(self.rows.blocks, -1, *elements.shape[1:])
            elements = blocked[:, self.rows.first : self.rows.last].reshape(-1, *elements.shape[1:])
        return replace(
            tensor, shape=self.shape, data=np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
        )


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The weights of a model by the model's own names."""

    sources: Mapping[str, Source]
    stored: Weights

    def __call__(self, name: str) -> HostTensor:
        """A tensor of floats. One that is quantised as a product has none unless it is of blocks."""
        source = self.sources[name]
        return self.stored.floats(source.take(self.stored.tensor(source.key)))

    def product(self, name: str) -> HostWeight:
        """The weight of a product, which may be quantised."""
        source = self.sources[name]
        return source.take(self.stored.tensor(source.key)) if self.is_quantized(name) else self(name)

    def is_quantized(self, name: str) -> bool:
        """Whether the checkpoint has it quantised, as a product at least."""
        return self.sources[name].key in self.stored.kinds

    def optional(self, name: str) -> HostTensor | None:
        """A tensor of floats, None where the model has no such."""
        return self(name) if name in self.sources else None
