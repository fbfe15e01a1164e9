"""Tensors of a model as parts of a checkpoint's: fused projections taken apart, transposed ones put right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from vllmlite.errors import ModelError
from vllmlite.weights.checkpoint import Weights
from vllmlite.weights.host import ITEM_SIZE, HostTensor, HostWeight, PackedWeight, Scheme, float_parts
from vllmlite.weights.packing import Packing

TABLE, HEAD = "embedding.weight", "head.weight"

Span: TypeAlias = tuple[int, int]
"""The first of some rows, columns or heads, and the one after the last."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor of the model is in its checkpoint."""

    key: str
    """The stored tensor's name."""
    stored: tuple[int, ...]
    """Its shape, as stored."""
    shape: tuple[int, ...]
    """The model's tensor, ``[out, in]`` if it is the weight of a product."""
    rows: tuple[Span, ...] | None = None
    """The rows of the stored tensor that the model's consists of, one span after the other; None: all rows."""
    columns: Span | None = None
    """The columns of the stored tensor that the model's consists of; None: all columns."""
    transposed: bool = False
    """The weight is stored ``[in, out]``; ``rows`` and ``columns`` are those of the transposed tensor."""
    product: bool = False
    """It is the weight of a matrix product, which quantisation applies to."""

    def take(self, tensor: HostWeight) -> HostWeight:
        """The model's tensor out of the stored one: the same memory where its elements are adjacent, else a copy."""
        if self.rows is None and self.columns is None and not self.transposed:
            return tensor
        if isinstance(tensor, PackedWeight):
            return self._take_packed(tensor)
        elements = tensor.data.view(f"u{ITEM_SIZE[tensor.dtype]}").reshape(self.stored)
        if self.transposed:
            elements = elements.T
        if self.rows is not None:
            taken = [elements[first:last] for first, last in self.rows]
            elements = taken[0] if len(taken) == 1 else np.concatenate(taken)
        if self.columns is not None:
            elements = elements[:, slice(*self.columns)]
        return replace(
            tensor, shape=self.shape, data=np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
        )

    def _take_packed(self, weight: PackedWeight) -> PackedWeight:
        scheme = weight.scheme
        if self.transposed:
            raise ModelError(f"tensor {self.key!r}: is stored transposed, and {scheme.name} is not")
        if self.rows is not None:
            self._check_slices(scheme, "rows", self.stored[0], scheme.row_unit, self.rows)
            weight = scheme.take_rows(weight, self.rows)
        if self.columns is not None:
            self._check_slices(scheme, "columns", self.stored[-1], scheme.column_unit, [self.columns])
            weight = scheme.take_columns(weight, *self.columns)
        return replace(weight, shape=self.shape)

    def _check_slices(self, scheme: Scheme, what: str, size: int, unit: int, spans: Sequence[Span]) -> None:
        bounds = [bound for span in spans for bound in span]
        if any(bound % unit and bound != size for bound in bounds):
            raise ModelError(
                f"tensor {self.key!r}: {what} {spans[0][0]} to {spans[0][1]} of {size} cannot be taken from a weight "
                f"in {scheme.name}, which is sliced at multiples of {unit}"
            )


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The weights of a model by the model's own names, in the form in which its backend takes them."""

    sources: Mapping[str, Source]
    stored: Weights
    packing: Packing

    def floats(self, name: str) -> HostTensor:
        """A tensor of floats; a quantised one is dequantised."""
        with self._naming(name):
            return self.packing.floats(self._taken(name))

    def optional(self, name: str) -> HostTensor | None:
        """A tensor of floats, None if the model has no tensor of that name."""
        return self.floats(name) if name in self.sources else None

    def products(self, names: Sequence[str]) -> list[HostWeight]:
        """The weights of products that are computed as one: all of them packed, or all of them floats."""
        parts = []
        for name in names:
            with self._naming(name):
                parts.append(self.packing(self._taken(name)))
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

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Name the stored tensor in a ModelError about its values."""
        key = self.sources[name].key
        try:
            yield
        except ModelError as error:
            text = str(error)
            raise error if repr(key) in text else ModelError(f"tensor {key!r}: {text}") from error

    def _taken(self, name: str) -> HostWeight:
        source = self.sources[name]
        return source.take(self.stored.tensor(source.key))
