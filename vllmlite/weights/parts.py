"""Tensors of a model as parts of a checkpoint's: fused projections taken apart, transposed ones put right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllmlite.errors import ModelError
from vllmlite.weights.checkpoint import Weights
from vllmlite.weights.host import ITEM_SIZE, HostTensor, HostWeight, PackedWeight, Scheme, float_parts
from vllmlite.weights.packing import Packing

TABLE, HEAD = "embedding.weight", "head.weight"


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
    """It is the weight of a matrix product, which quantisation applies to."""

    def take(self, tensor: HostWeight) -> HostWeight:
        """The model's tensor out of the stored one: the same memory where its rows are adjacent, else a copy."""
        if self.rows is None and not self.transposed:
            return tensor
        if isinstance(tensor, PackedWeight):
            return self._take_packed(tensor, self.rows)
        elements = tensor.data.view(f"u{ITEM_SIZE[tensor.dtype]}").reshape(self.stored)
        if self.transposed:
            elements = elements.T
        if self.rows is not None:
            blocked = elements.reshape(self.rows.blocks, -1, *elements.shape[1:])
            elements = blocked[:, self.rows.first : self.rows.last].reshape(-1, *elements.shape[1:])
        return replace(
            tensor, shape=self.shape, data=np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
        )

    def _take_packed(self, weight: PackedWeight, rows: Rows | None) -> PackedWeight:
        if rows is None or self.transposed:
            raise ModelError(f"tensor {self.key!r}: is stored transposed, and {weight.scheme.name} is not")
        height = self.stored[0] // rows.blocks
        spans = [(block * height + rows.first, block * height + rows.last) for block in range(rows.blocks)]
        scheme = weight.scheme
        if not scheme.can_slice(self.stored[0], scheme.row_unit, spans):
            raise ModelError(
                f"tensor {self.key!r}: {scheme.name} can be sliced at multiples of {scheme.row_unit} rows; "
                f"the model needs {spans[0]}"
            )
        return replace(scheme.take_rows(weight, spans), shape=self.shape)


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The weights of a model by the model's own names, in the form in which its backend takes them."""

    sources: Mapping[str, Source]
    stored: Weights
    packing: Packing

    def floats(self, name: str) -> HostTensor:
        """A tensor of floats; a quantised one is dequantised."""
        return self.packing.floats(self._taken(name))

    def optional(self, name: str) -> HostTensor | None:
        """A tensor of floats, None if the model has no tensor of that name."""
        return self.floats(name) if name in self.sources else None

    def products(self, names: Sequence[str]) -> list[HostWeight]:
        """The weights of products that are computed as one: all of them packed, or all of them floats."""
        parts = [self.packing(self._taken(name)) for name in names]
        if float_parts(parts) is None and any(isinstance(part, HostTensor) for part in parts):
            return [self.packing.floats(part, "float32") for part in parts]
        return parts

    def packed_scheme(self, name: str) -> Scheme | None:
        """The scheme in which the backend gets the weight of a product; None if as floats."""
        return self.packing.scheme(self.stored.schemes.get(self.sources[name].key))

    def num_bytes(self) -> int:
        """Bytes that the weights take on the backend."""
        total = 0
        for name, source in self.sources.items():
            scheme = self.packed_scheme(name) if source.product else None
            if scheme is None:
                total += math.prod(source.shape) * ITEM_SIZE[self.packing.backend.dtype]
            else:
                total += scheme.num_bytes(source.shape)
        if self.packed_head is not None:
            total += self.packed_head.num_bytes(self.sources[TABLE].shape)
        return total

    @property
    def packed_head(self) -> Scheme | None:
        """The scheme of an output layer that is made of the embedding table but packed; None if there is none."""
        return None if HEAD in self.sources else self.packed_scheme(TABLE)

    def _taken(self, name: str) -> HostWeight:
        source = self.sources[name]
        return source.take(self.stored.tensor(source.key))
