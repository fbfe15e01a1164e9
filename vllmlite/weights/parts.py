"""Mapping of a model's tensors to a checkpoint's: splitting fused projections, transposing, sharding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from vllmlite.errors import ModelError
from vllmlite.weights.checkpoint import Weights
from vllmlite.weights.host import (
    ITEM_SIZE,
    HostTensor,
    HostWeight,
    PackedWeight,
    Scheme,
    float_parts,
    release,
)
from vllmlite.weights.packing import Packing

TABLE, HEAD = "embedding.weight", "head.weight"
FUSED = (("q", "k", "v"), ("gate", "up"))
"""Weight matrices that are multiplied as one: a backend takes either all packed, or all as floats."""

Span: TypeAlias = tuple[int, int]
"""A half-open range ``(first, last + 1)`` of rows, columns or heads."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint stores one tensor of the model."""

    key: str
    """Name of the stored tensor."""
    stored: tuple[int, ...]
    """Shape of the stored tensor."""
    shape: tuple[int, ...]
    """Shape of the model's tensor, ``[out, in]`` for a weight matrix."""
    rows: tuple[Span, ...] | None = None
    """Rows of the stored tensor that make up the model's tensor, in order; None: all rows."""
    columns: Span | None = None
    """Columns of the stored tensor that make up the model's tensor; None: all columns."""
    transposed: bool = False
    """The weight is stored as ``[in, out]``; ``rows`` and ``columns`` refer to the transposed tensor."""
    product: bool = False
    """Whether the tensor is a weight matrix, to which quantisation applies."""
    stacked: bool = False
    """Whether the stored tensor holds this tensor for each of several experts; ``rows`` and ``columns`` refer to the
    stored tensor with its first two dimensions merged."""
    step: int = 1
    """Take only every ``step``-th row of each span, from its first one on."""

    def take(self, tensor: HostWeight) -> HostWeight:
        """Return the model's tensor, taken from the stored one: a view if its elements are contiguous, else a copy."""
        if self.rows is None and self.columns is None and not self.transposed:
            return tensor
        if isinstance(tensor, PackedWeight):
            return self._take_packed(tensor)
        elements = tensor.data.view(f"u{ITEM_SIZE[tensor.dtype]}").reshape(self._matrix)
        if self.transposed:
            elements = elements.T
        if self.rows is not None:
            taken = [elements[first : last : self.step] for first, last in self.rows]
            elements = taken[0] if len(taken) == 1 else np.concatenate(taken)
        if self.columns is not None:
            elements = elements[:, slice(*self.columns)]
        return replace(
            tensor, shape=self.shape, data=np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
        )

    @property
    def _matrix(self) -> tuple[int, ...]:
        """The shape of the stored tensor to which ``rows`` and ``columns`` refer, before it is transposed."""
        return (self.stored[0] * self.stored[1], *self.stored[2:]) if self.stacked else self.stored

    def _take_packed(self, weight: PackedWeight) -> PackedWeight:
        scheme = weight.scheme
        if self.transposed:
            raise ModelError(
                f"tensor {self.key!r}: is stored transposed, which {scheme.name} does not support"
            )
        if self.rows is not None:
            spans = self.rows
            if self.step > 1:
                spans = tuple((row, row + 1) for span in spans for row in range(*span, self.step))
            self._check_slices(scheme, "rows", self._matrix[0], scheme.row_unit, spans)
            weight = scheme.take_rows(weight, spans)
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
    """The weights of a model under the model's own names, in the form in which the backend takes them."""

    sources: Mapping[str, Source]
    stored: Weights
    packing: Packing

    def floats(self, name: str) -> HostTensor:
        """Return a tensor as floats, dequantised if necessary."""
        with self._naming(name):
            return self.packing.floats(self._taken(name))

    def optional(self, name: str) -> HostTensor | None:
        """Return a tensor as floats, or None if the model has no tensor of that name."""
        return self.floats(name) if name in self.sources else None

    def products(self, names: Sequence[str]) -> list[HostWeight]:
        """Return the weight matrices that are multiplied as one fused matrix: either all packed, or all floats."""
        parts = []
        for name in names:
            with self._naming(name):
                parts.append(self.packing(self._taken(name), name in (HEAD, TABLE)))
        if float_parts(parts) is None and any(isinstance(part, HostTensor) for part in parts):
            return [self.packing.floats(part, "float32") for part in parts]
        return parts

    def release(self, names: Sequence[str]) -> None:
        """Return the memory of stored tensors to the system, once they are on the backend. A tensor that the backend
        uses in the mapped file is read again when it is needed."""
        if self.stored.generated:
            return
        for key in {self.sources[name].key for name in names}:
            stored = self.stored.tensor(key)
            for part in stored.parts.values() if isinstance(stored, PackedWeight) else [stored]:
                release(part)

    def packed_scheme(self, name: str) -> Scheme | None:
        """Return the scheme in which the backend gets a weight matrix. None if it gets floats, which it also does if a
        matrix that is fused with this one comes as floats."""
        own, *others = (
            self.packing.scheme(self.stored.schemes.get(self.sources[each].key), name in (HEAD, TABLE))
            for each in self._fused(name)
        )
        return None if None in others else own

    def packed_keys(self) -> set[str]:
        """Return the names of the stored tensors that the backend gets as packed weight matrices."""
        names = [name for name, source in self.sources.items() if source.product]
        names += [TABLE] if self.packed_head is not None else []
        return {self.sources[name].key for name in names if self.packed_scheme(name) is not None}

    def _fused(self, name: str) -> list[str]:
        """Return ``name`` and the names of the weight matrices that are fused with it."""
        *before, part, suffix = name.split(".")
        group = next((parts for parts in FUSED if part in parts), ())
        others = (".".join([*before, other, suffix]) for other in group if other != part)
        return [name, *(other for other in others if other in self.sources)]

    def num_bytes(self) -> int:
        """Return the bytes that the weights take on the backend."""
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
        """Scheme in which the output layer is packed if it is made from the embedding table; None if it is not."""
        return None if HEAD in self.sources or TABLE not in self.sources else self.packed_scheme(TABLE)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Add the stored tensor's name to a ModelError about its values."""
        key = self.sources[name].key
        try:
            yield
        except ModelError as error:
            text = str(error)
            raise error if repr(key) in text else ModelError(f"tensor {key!r}: {text}") from error

    def _taken(self, name: str) -> HostWeight:
        source = self.sources[name]
        return source.take(self.stored.tensor(source.key))
