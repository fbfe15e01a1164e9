"""Tensors in host memory as checkpoints store them: plain ones, and weights that are packed by a scheme."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
ITEM_SIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3": 1, "float8_e5m2": 1, "float8_e8m0": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes per element, by dtype name as the backend contract spells it."""

CHUNK = 1 << 18
"""Elements that :func:`dequantized` makes at a time."""

Floats: TypeAlias = NDArray[np.float32]
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A tensor in host memory, usually a view of a mapped checkpoint file.

    ``data`` is a flat uint8 array over the little-endian, row-major elements (numpy has no bfloat16 of its own).
    It may be read-only. A backend that makes a zero-copy view must hold ``data`` for as long as the view lives.
    """

    dtype: str
    shape: Shape
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Part:
    """Shape and dtype of one tensor that a scheme stores for a weight."""

    shape: Shape
    dtype: str
    other_dtypes: tuple[str, ...] = ()
    """Dtypes that some programs write instead."""
    other_shapes: tuple[Shape, ...] = ()
    """Shapes of as many elements that some programs write instead."""
    any_shape: bool = False
    """The size of the tensor says nothing, and ``shape`` has no meaning."""
    optional: bool = False
    """Some checkpoints do without this tensor."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def accepts(self, tensor: HostTensor) -> bool:
        """Whether ``tensor`` has an accepted shape and dtype."""
        fits = self.any_shape or tensor.shape in (self.shape, *self.other_shapes)
        return fits and tensor.dtype in self.dtypes

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The accepted dtypes."""
        return (self.dtype, *self.other_dtypes)


class Scheme(ABC):
    """How a checkpoint stores a quantised weight ``[out, in]``: which tensors, and what they mean."""

    name: str
    """What the scheme is called. :attr:`Backend.schemes` holds the names of those that a backend multiplies natively,
    so two schemes share a name only if a backend treats them alike."""

    @property
    def row_unit(self) -> int:
        """Rows can be sliced at multiples of this number."""
        return 1

    @property
    def column_unit(self) -> int:
        """Columns can be sliced at multiples of this number."""
        return 1

    @abstractmethod
    def parts(self, shape: Shape) -> dict[str, Part]:
        """The tensors stored for a weight of ``shape``, by their suffix, which takes the place of ``weight`` in the
        weight's name."""

    @abstractmethod
    def dequantize(self, weight: PackedWeight) -> Floats:
        """The values of ``weight``, float32 of its shape. ModelError for scales that are not finite."""

    @abstractmethod
    def take_rows(self, weight: PackedWeight, spans: Sequence[tuple[int, int]]) -> PackedWeight:
        """The rows ``first`` up to ``last`` of each span, one span after the other. Every bound is a multiple of
        :attr:`row_unit`, or the number of rows."""

    @abstractmethod
    def take_columns(self, weight: PackedWeight, first: int, last: int) -> PackedWeight:
        """The columns ``first`` up to ``last``, both multiples of :attr:`column_unit`, or the number of columns."""

    def in_rows(self, weight: PackedWeight) -> PackedWeight:
        """The same values in a form whose rows can be sliced cheaply, again and again."""
        return weight

    def num_bytes(self, shape: Shape) -> int:
        """Bytes that a weight of ``shape`` takes."""
        return sum(part.num_bytes for part in self.parts(shape).values() if not part.optional)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantised weight ``[out, in]``: its scheme and the tensors that :meth:`Scheme.parts` names.

    GGUF files also stack the weights of several experts: their shape has more than two dimensions, of which the last
    is the row's length."""

    scheme: Scheme
    shape: Shape
    parts: Mapping[str, HostTensor]


HostWeight: TypeAlias = HostTensor | PackedWeight
"""The weight of a matrix product, as a checkpoint stores it."""


def _float8_values(exponent_bits: int, mantissa_bits: int, bias: int, finite: bool) -> Floats:
    """The values of all 256 codes of an 8-bit float (Micikevicius et al. 2022). ``finite``: the largest exponent has no
    infinities, and its last mantissa alone is NaN."""
    codes = np.arange(256)
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    scale = 2.0 ** (np.maximum(exponent, 1) - bias - mantissa_bits)
    values = (mantissa + np.where(exponent > 0, 1 << mantissa_bits, 0)) * scale
    largest = exponent == (1 << exponent_bits) - 1
    if finite:
        values[largest & (mantissa == (1 << mantissa_bits) - 1)] = np.nan
    else:
        values[largest] = np.where(mantissa[largest] == 0, np.inf, np.nan)
    signed: Floats = np.where(codes < 128, values, -values).astype(np.float32)
    return signed


_FLOAT8_VALUES = {
    "float8_e4m3": _float8_values(4, 3, 7, finite=True),
    "float8_e5m2": _float8_values(5, 2, 15, finite=False),
    "float8_e8m0": np.append(2.0 ** (np.arange(255) - 127.0), np.nan).astype(np.float32),
}


def rounded_to_bf16(values: Floats) -> Floats:
    """Round finite or infinite numbers to the nearest bfloat16, ties to even."""
    return (_bf16_bits(values) & np.uint32(0xFFFF0000)).view(np.float32)


def _bf16_bits(values: Floats) -> NDArray[np.uint32]:
    """The nearest bfloat16 of each value, in the high half of a word; the low half has no meaning."""
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    return rounded


def float_values(tensor: HostTensor) -> Floats:
    """The elements of a float tensor, of 8 bits too, as float32."""
    if tensor.dtype in _FLOAT8_VALUES:
        values: Floats = _FLOAT8_VALUES[tensor.dtype].take(tensor.data).reshape(tensor.shape)
        return values
    if tensor.dtype == "bfloat16":
        return (tensor.data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    elements = tensor.data.view({"float32": "<f4", "float16": "<f2"}[tensor.dtype])
    return elements.astype(np.float32, copy=False).reshape(tensor.shape)


def float_tensor(values: Floats, dtype: str) -> HostTensor:
    """``values`` rounded to ``dtype``, one of :data:`FLOAT_DTYPES`."""
    if dtype == "bfloat16":
        elements: NDArray[np.generic] = (_bf16_bits(values) >> np.uint32(16)).astype("<u2")
    else:
        elements = values.astype({"float32": "<f4", "float16": "<f2"}[dtype])
    return HostTensor(dtype, values.shape, np.ascontiguousarray(elements).reshape(-1).view(np.uint8))


def dequantized(weight: PackedWeight, dtype: str) -> HostTensor:
    """The values of ``weight`` as ``dtype``, one of :data:`FLOAT_DTYPES`, made :data:`CHUNK` elements at a time.
    ModelError for scales that are not finite."""
    weight = weight.scheme.in_rows(weight)
    scheme, columns, rows = weight.scheme, weight.shape[-1], math.prod(weight.shape[:-1])
    step = max(CHUNK // columns // scheme.row_unit, 1) * scheme.row_unit
    row_bytes = columns * ITEM_SIZE[dtype]
    data = np.empty(rows * row_bytes, np.uint8)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        values = scheme.dequantize(scheme.take_rows(weight, [(first, last)]))
        data[first * row_bytes : last * row_bytes] = float_tensor(values, dtype).data
    return HostTensor(dtype, weight.shape, data)


def float_parts(parts: Sequence[HostWeight]) -> list[HostTensor] | None:
    """``parts`` if all of them are floats, else None."""
    floats = [part for part in parts if isinstance(part, HostTensor)]
    return floats if len(floats) == len(parts) else None
