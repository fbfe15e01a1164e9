"""Tensors in host memory as checkpoints store them: plain tensors, and weights packed by a quantisation scheme."""

from __future__ import annotations

import math
import mmap
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
"""Bytes per element, by dtype name in the backend contract."""

CHUNK = 1 << 18
"""Number of elements that :func:`dequantized` converts at a time."""

Floats: TypeAlias = NDArray[np.float32]
Shape: TypeAlias = tuple[int, ...]


def num_bytes(dtype: str, shape: Shape) -> int:
    """Return the number of bytes of a tensor."""
    return math.prod(shape) * ITEM_SIZE[dtype]


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A tensor in host memory, usually a view of a memory-mapped checkpoint file.

    ``data`` is a flat uint8 array of the little-endian, row-major elements, because numpy has no bfloat16. It may be
    read-only. A backend that makes a zero-copy view must keep ``data`` alive as long as the view.
    """

    dtype: str
    shape: Shape
    data: NDArray[np.uint8]


def release(tensor: HostTensor) -> None:
    """Return the memory of a mapped file's tensor to the system. If the tensor is used again, it is read again."""
    owner: object = tensor.data
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if not isinstance(owner, mmap.mmap) or tensor.data.flags.writeable or not hasattr(mmap, "MADV_DONTNEED"):
        return
    at = tensor.data.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
    first = at // mmap.PAGESIZE * mmap.PAGESIZE
    owner.madvise(mmap.MADV_DONTNEED, first, at + tensor.data.size - first)


@dataclass(frozen=True, slots=True)
class Part:
    """Shape and dtype of one tensor that a scheme stores for a weight."""

    shape: Shape
    dtype: str
    other_dtypes: tuple[str, ...] = ()
    """Further accepted dtypes."""
    other_shapes: tuple[Shape, ...] = ()
    """Further accepted shapes."""
    any_shape: bool = False
    """Whether any shape is accepted; ``shape`` then has no meaning."""
    optional: bool = False
    """Whether the tensor may be absent."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return num_bytes(self.dtype, self.shape)

    def accepts(self, tensor: HostTensor) -> bool:
        """Return whether ``tensor`` has an accepted shape and dtype."""
        fits = self.any_shape or tensor.shape in (self.shape, *self.other_shapes)
        return fits and tensor.dtype in self.dtypes

    @property
    def dtypes(self) -> tuple[str, ...]:
        """All dtypes that are accepted."""
        return (self.dtype, *self.other_dtypes)


class Scheme(ABC):
    """A quantisation scheme: how a checkpoint stores a weight ``[out, in]``, in which tensors, and what they mean."""

    name: str
    """Name of the scheme. :attr:`Backend.schemes` lists the names that a backend multiplies natively, so two schemes
    may share a name only if backends treat them alike."""

    @property
    def input_dtype(self) -> str | None:
        """The dtype to which products quantise activations; None: activations stay in the backend's dtype."""
        return None

    @property
    def row_unit(self) -> int:
        """Number of rows at whose multiples a weight can be sliced."""
        return 1

    @property
    def column_unit(self) -> int:
        """Number of columns at whose multiples a weight can be sliced."""
        return 1

    @abstractmethod
    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""

    @abstractmethod
    def dequantize(self, weight: PackedWeight) -> Floats:
        """Return the values of ``weight`` as float32. Raises ModelError for scales that are not finite."""

    @abstractmethod
    def take_rows(self, weight: PackedWeight, spans: Sequence[tuple[int, int]]) -> PackedWeight:
        """Return the rows of the spans ``(first, last)``, ``last`` excluded, one span after another.

        Every bound must be a multiple of :attr:`row_unit`, or the number of rows."""

    @abstractmethod
    def take_columns(self, weight: PackedWeight, first: int, last: int) -> PackedWeight:
        """Return columns ``first`` to ``last`` - 1; bounds are multiples of :attr:`column_unit`, or the number of
        columns."""

    def in_rows(self, weight: PackedWeight) -> PackedWeight:
        """Return the same values in a form whose rows can be sliced repeatedly at low cost."""
        return weight

    def num_bytes(self, shape: Shape) -> int:
        """Return the bytes of a weight of ``shape``."""
        return sum(part.num_bytes for part in self.parts(shape).values() if not part.optional)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantised weight ``[out, in]``: its scheme and the tensors that :meth:`Scheme.parts` names.

    GGUF files also stack the weights of several experts; their shape has leading dimensions before the row length."""

    scheme: Scheme
    shape: Shape
    parts: Mapping[str, HostTensor]


HostWeight: TypeAlias = HostTensor | PackedWeight
"""A weight matrix as a checkpoint stores it."""


def _float8_values(exponent_bits: int, mantissa_bits: int, bias: int, finite: bool) -> Floats:
    """Return the values of all 256 codes of an 8-bit float (Micikevicius et al. 2022).

    ``finite``: the format has no infinities; with the largest exponent, only the largest mantissa is NaN."""
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
    """Round to the nearest bfloat16, ties to even; NaN is not supported."""
    return (_bf16_bits(values) & np.uint32(0xFFFF0000)).view(np.float32)


def _bf16_bits(values: Floats) -> NDArray[np.uint32]:
    """Return words whose high half is the nearest bfloat16 of each value; the low half is undefined."""
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    return rounded


def float_values(tensor: HostTensor) -> Floats:
    """Return the elements of a float tensor, 8-bit floats included, as float32."""
    if tensor.dtype in _FLOAT8_VALUES:
        values: Floats = _FLOAT8_VALUES[tensor.dtype].take(tensor.data).reshape(tensor.shape)
        return values
    if tensor.dtype == "bfloat16":
        return (tensor.data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    elements = tensor.data.view({"float32": "<f4", "float16": "<f2"}[tensor.dtype])
    return elements.astype(np.float32, copy=False).reshape(tensor.shape)


def float_tensor(values: Floats, dtype: str) -> HostTensor:
    """Return ``values`` rounded to ``dtype``, one of :data:`FLOAT_DTYPES`."""
    if dtype == "bfloat16":
        elements: NDArray[np.generic] = (_bf16_bits(values) >> np.uint32(16)).astype("<u2")
    else:
        elements = values.astype({"float32": "<f4", "float16": "<f2"}[dtype])
    return HostTensor(dtype, values.shape, np.ascontiguousarray(elements).reshape(-1).view(np.uint8))


def dequantized(weight: PackedWeight, dtype: str) -> HostTensor:
    """Return ``weight`` dequantised to ``dtype``, one of :data:`FLOAT_DTYPES`, :data:`CHUNK` elements at a time.

    Raises ModelError for scales that are not finite."""
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


def as_floats(weight: HostWeight) -> HostTensor:
    """Return ``weight`` as it is if its elements are floats, else dequantised to float32."""
    return dequantized(weight, "float32") if isinstance(weight, PackedWeight) else weight


def float_parts(parts: Sequence[HostWeight]) -> list[HostTensor] | None:
    """Return ``parts`` if all of them are plain tensors, else None."""
    floats = [part for part in parts if isinstance(part, HostTensor)]
    return floats if len(floats) == len(parts) else None
