"""Weights with a scale for each group of a row: one form for AWQ, GPTQ and compressed-tensors, and for e4m3
and MXFP4.

A weight ``[N, K]`` with G groups in a row (one, if ``group_size`` is None; the last one may be short) has

- ``qweight``, unsigned codes: uint8 ``[N, ceil(K / 2)]`` for 4 bits, the code of column 2i in the low nibble of byte i;
  uint8 ``[N, K]`` for 8 bits;
- ``scales`` float16 ``[N, G]``, or the dtype that the checkpoint stores;
- ``zeros`` uint8 ``[N, G]`` if the weight is asymmetric; otherwise all zeros are 2 ** (bits - 1);
- ``order`` int32 ``[K]`` if groups are not runs of columns in the checkpoint: the codes in column j of ``qweight`` are
  those of the weight's column ``order[j]``, so that groups are runs of packed columns.

An element is (code - zero) * scale. No conversion to this form rounds. With ``floats``, codes are
floats, e2m1 of 4 bits or e4m3 of 8 bits, and an element is the code's value times the scale.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.weights.host import ITEM_SIZE, Floats, HostTensor, PackedWeight, Part, Shape, float_values
from vllmlite.weights.schemes.bits import E2M1, unpack_rows
from vllmlite.weights.schemes.codes import Bytes, StoredCodes
from vllmlite.weights.schemes.groups import (
    Axes,
    SlicedScheme,
    check_scales,
    group_count,
    group_indices,
    scaled,
)

QWEIGHT, SCALES, ZEROS, ORDER = "qweight", "scales", "zeros", "order"

GROUP_UNIT = 32
"""The sizes of groups are multiples of this number of columns."""


@dataclass(frozen=True, slots=True)
class GroupedScheme(SlicedScheme):
    """``bits``: 4 or 8. ``group_size`` None: a row is one group. ``int8_input``: products quantise activations as those
    of :mod:`.tiles` do. ``floats``: codes are floats."""

    bits: int
    group_size: int | None
    symmetric: bool
    int8_input: bool = False
    floats: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """``w4a16``, ``w8a16``, ``f4a16`` or ``f8a16``, whose products leave activations in the backend's dtype;
        ``w4a8_grouped`` or ``w8a8_grouped``."""
        if self.int8_input:
            return f"w{self.bits}a8_grouped"
        return f"{'f' if self.floats else 'w'}{self.bits}a16"

    @property
    def input_dtype(self) -> str | None:
        """The dtype to which products quantise activations; None: activations stay in the backend's dtype."""
        return "int8" if self.int8_input else None

    @property
    def column_unit(self) -> int:
        """Number of columns whose codes fill whole bytes and whole groups."""
        return int(np.lcm(8 // self.bits, self.group_size or 1))

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        rows, columns = shape
        groups = rows, group_count(columns, self.group_size)
        parts = {
            QWEIGHT: Part((rows, -(-columns * self.bits // 8)), "uint8"),
            SCALES: Part(groups, "float16", ("bfloat16", "float32")),
            ORDER: Part((columns,), "int32", optional=True),
        }
        return parts if self.symmetric else parts | {ZEROS: Part(groups, "uint8")}

    def axes(self) -> dict[str, Axes]:
        """Return how each part is sliced with its weight, by the part's suffix."""
        groups = Axes(0) if self.group_size is None else Axes(0, 1, per_column=Fraction(self.group_size))
        codes = Axes(0, 1, per_column=Fraction(8, self.bits))
        return {QWEIGHT: codes, SCALES: groups, ZEROS: groups, ORDER: Axes()}

    def take_columns(self, weight: PackedWeight, first: int, last: int) -> PackedWeight:
        """Return columns ``first`` to ``last`` - 1. Bounds are multiples of :attr:`column_unit`, or the number of
        columns. Raises ModelError for a weight with an order, whose columns are not stored in their own order."""
        if ORDER in weight.parts:
            raise ModelError("columns cannot be taken from a weight whose columns are permuted")
        return SlicedScheme.take_columns(self, weight, first, last)

    def dequantize(self, weight: PackedWeight) -> Floats:
        """Return the values of ``weight`` as float32. Raises ModelError for scales that are not finite."""
        rows, columns = weight.shape
        scales, zeros, qweight = weight.parts[SCALES], weight.parts.get(ZEROS), weight.parts[QWEIGHT]
        codes = unpack_rows(qweight.data.reshape(rows, -1), self.bits, columns)
        middle = 0 if self.floats else 1 << (self.bits - 1)
        if self.floats:
            values = (
                E2M1.take(codes) if self.bits == 4 else float_values(replace(qweight, dtype="float8_e4m3"))
            )
        packed = scaled(
            values if self.floats else codes,
            middle if zeros is None else zeros.data.reshape(zeros.shape),
            float_values(scales),
            group_indices(weight, self.group_size, scales.shape[1]),
        )
        if ORDER not in weight.parts:
            return packed
        values = np.empty_like(packed)
        values[:, weight.parts[ORDER].data.view("<i4")] = packed
        return values


Repack: TypeAlias = Callable[[StoredCodes, int], Bytes]
"""Function that does the work of :meth:`StoredCodes.repacked`."""


class GroupableScheme(SlicedScheme):
    """A scheme of a checkpoint whose weights can be converted to :class:`GroupedScheme`."""

    @property
    @abstractmethod
    def grouped(self) -> GroupedScheme | None:
        """The scheme of :meth:`to_grouped`; None if the size of groups is no multiple of :data:`GROUP_UNIT`."""

    @abstractmethod
    def to_grouped(self, weight: PackedWeight, repack: Repack = StoredCodes.repacked) -> PackedWeight | None:
        """Convert ``weight`` to the scheme :attr:`grouped`, without rounding; None if it has no such form. ModelError
        for scales that are not finite."""


class IntegerScheme(GroupableScheme):
    """A scheme of a checkpoint whose elements are (code - zero) * scale, with unsigned codes of 2 to 8 bits, and a zero
    and a scale for each group of a row."""

    bits: int
    group_size: int | None
    symmetric: bool

    @abstractmethod
    def codes(self, weight: PackedWeight) -> StoredCodes:
        """Return the integer codes of the weight as they are stored."""

    @abstractmethod
    def zeros(self, weight: PackedWeight) -> Bytes | None:
        """Return the zeros ``[N, G]``; None if all are the middle code. ModelError for zeros that the scheme does not
        have."""

    @abstractmethod
    def scales(self, weight: PackedWeight) -> HostTensor:
        """Return the scales ``[N, G]``."""

    def groups(self, weight: PackedWeight) -> NDArray[np.int64] | None:
        """Return the group of each column; None if groups are runs of equally many columns."""
        return group_indices(weight, self.group_size, group_count(weight.shape[1], self.group_size))

    def dequantize(self, weight: PackedWeight) -> Floats:
        """Return the values of ``weight`` as float32. Raises ModelError for scales that are not finite."""
        zeros = self.zeros(weight)
        return scaled(
            self.codes(weight).unpacked(),
            1 << (self.bits - 1) if zeros is None else zeros,
            float_values(self.scales(weight)),
            self.groups(weight),
        )

    @property
    def grouped(self) -> GroupedScheme | None:
        """The scheme of :meth:`to_grouped`; None if the size of groups is no multiple of :data:`GROUP_UNIT`."""
        if self.group_size is not None and self.group_size % GROUP_UNIT:
            return None
        return GroupedScheme(8 if self.bits == 8 else 4, self.group_size, self.symmetric)

    def to_grouped(self, weight: PackedWeight, repack: Repack = StoredCodes.repacked) -> PackedWeight | None:
        """Convert ``weight`` to the scheme :attr:`grouped`, without rounding. ModelError for scales that are not
        finite. None if the groups differ in their number of columns, as in a slice of a weight with ``desc_act``."""
        scheme, columns = self.grouped, weight.shape[1]
        if scheme is None:
            return None
        groups, zeros, scales = self.groups(weight), self.zeros(weight), self.scales(weight)
        check_scales(float_values(scales))
        order = None if groups is None else np.argsort(groups, kind="stable").astype("<i4")
        if groups is not None and order is not None:
            runs = np.arange(columns) // (self.group_size or columns)
            if not np.array_equal(groups[order], runs):
                return None
            order = None if np.array_equal(groups, runs) else order
        codes = replace(self.codes(weight), order=order)
        if zeros is None:  # the middle of more bits is another code
            codes = replace(codes, added=codes.added + (1 << (scheme.bits - 1)) - (1 << (self.bits - 1)))
        stored = codes.in_rows(scheme.bits)
        parts = {
            QWEIGHT: _tensor(repack(codes, scheme.bits) if stored is None else stored),
            SCALES: scales,
        }
        if zeros is not None:
            parts[ZEROS] = _tensor(zeros)
        if order is not None:
            parts[ORDER] = HostTensor("int32", order.shape, order.view(np.uint8))
        return PackedWeight(scheme, weight.shape, parts)


def _tensor(values: Bytes) -> HostTensor:
    return HostTensor("uint8", values.shape, np.ascontiguousarray(values).reshape(-1))


def transposed(tensor: HostTensor) -> HostTensor:
    """Return a matrix with its axes exchanged."""
    elements = tensor.data.view(f"u{ITEM_SIZE[tensor.dtype]}").reshape(tensor.shape).T
    return HostTensor(tensor.dtype, elements.shape, np.ascontiguousarray(elements).reshape(-1).view(np.uint8))
