"""compressed-tensors' integers: ``pack-quantized`` (several codes in a word) and ``int-quantized`` (an int8 each).

For a weight ``[N, K]`` with G groups in a row (one, if scales are per channel), ``pack-quantized`` stores

- ``weight_packed`` int32 ``[N, ceil(K * bits / 32)]``: signed codes plus 2 ** (bits - 1), low bits first;
- ``weight_scale`` ``[N, G]``;
- ``weight_zero_point`` int32 ``[ceil(N * bits / 32), G]``, packed like the codes, if the weight is asymmetric;
- ``weight_g_idx`` int32 ``[K]``, the group of each column, if groups are in no order (``actorder``);
- ``weight_shape`` int64 ``[2]``.

``int-quantized`` stores ``weight`` int8 ``[N, K]``, the same scales, and ``weight_zero_point`` int8 ``[N, G]``. An
element is (code - zero) * scale. What is stored for activations has no effect here: :mod:`.w8a8` reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.weights.host import HostTensor, PackedWeight, Part, Shape
from vllmlite.weights.schemes.codes import Bytes, StoredCodes
from vllmlite.weights.schemes.grouped import IntegerScheme
from vllmlite.weights.schemes.groups import Axes, check_shape, group_count, group_indices

SCALE_DTYPES = ("float16", "float32")
"""Dtypes of scales that are accepted besides bfloat16."""
ACTIVATIONS = {
    "input_scale": Part((1,), "bfloat16", SCALE_DTYPES, ((),), optional=True),
    "input_zero_point": Part((1,), "int8", (), ((),), optional=True),
}
"""Constants by which static schemes quantise activations."""


def scale_part(shape: Shape, group_size: int | None, per_tensor: bool) -> Part:
    """Return the scales of a weight of ``shape``: a number, one for each row, or one for each group of a row."""
    if per_tensor:
        return Part((1,), "bfloat16", SCALE_DTYPES, ((), (1, 1)))
    groups = group_count(shape[1], group_size)
    return Part((shape[0], groups), "bfloat16", SCALE_DTYPES, ((shape[0],),) if groups == 1 else ())


def scales_of(weight: PackedWeight) -> HostTensor:
    """Return the scales ``[N, G]`` of a weight ``[N, K]``."""
    stored, rows = weight.parts["weight_scale"], weight.shape[0]
    elements = stored.data.reshape(math.prod(stored.shape), -1)
    if len(elements) == 1:
        elements = np.repeat(elements, rows, axis=0)
    return HostTensor(stored.dtype, (rows, len(elements) // rows), elements.reshape(-1))


@dataclass(frozen=True, slots=True)
class PackedIntScheme(IntegerScheme):
    """``pack-quantized``. ``group_size`` None: scales are per channel."""

    bits: int
    group_size: int | None
    symmetric: bool
    ordered: bool = True
    name: str = "pack-quantized"

    @property
    def row_unit(self) -> int:
        """Number of rows whose zeros fill whole words."""
        return 1 if self.symmetric else 32 // self.bits

    @property
    def column_unit(self) -> int:
        """Number of columns whose codes fill whole words; if groups are runs of columns, also whole groups."""
        per_word = 32 // self.bits
        return int(np.lcm(per_word, self.group_size or 1)) if self.ordered else per_word

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        rows, columns = shape
        if self.group_size is not None:
            check_shape(shape, f"groups of {self.group_size}", columns=self.group_size)
        groups = group_count(columns, self.group_size)
        parts = {
            "weight_packed": Part((rows, -(-columns * self.bits // 32)), "int32"),
            "weight_scale": scale_part(shape, self.group_size, False),
            "weight_shape": Part((2,), "int64", ("int32",)),
            **ACTIVATIONS,
        }
        if not self.symmetric:
            parts["weight_zero_point"] = Part((-(-rows * self.bits // 32), groups), "int32")
        if not self.ordered:
            parts["weight_g_idx"] = Part((columns,), "int32")
        return parts

    def axes(self) -> dict[str, Axes]:
        """Return how each part is sliced with its weight, by the part's suffix."""
        cut = self.ordered and self.group_size is not None
        grouped, group = (1, Fraction(self.group_size or 1)) if cut else (None, Fraction(1))
        per_word = Fraction(32, self.bits)
        return {
            "weight_packed": Axes(0, 1, per_column=per_word),
            "weight_scale": Axes(0, grouped, per_column=group),
            "weight_zero_point": Axes(0, grouped, per_row=per_word, per_column=group),
            "weight_g_idx": Axes(None, 0),
            "weight_shape": Axes(),
            **{suffix: Axes() for suffix in ACTIVATIONS},
        }

    def codes(self, weight: PackedWeight) -> StoredCodes:
        """Return the integer codes of the weight as they are stored."""
        return StoredCodes("rows", self.bits, weight.shape, weight.parts["weight_packed"])

    def zeros(self, weight: PackedWeight) -> Bytes | None:
        """Return the zeros ``[N, G]``; None if all are the middle code. ModelError for zeros that the scheme does not
        have."""
        if self.symmetric:
            return None
        stored = weight.parts["weight_zero_point"]
        return StoredCodes("words", self.bits, (stored.shape[1], weight.shape[0]), stored).unpacked().T

    def scales(self, weight: PackedWeight) -> HostTensor:
        """Return the scales ``[N, G]``."""
        return scales_of(weight)

    def groups(self, weight: PackedWeight) -> NDArray[np.int64] | None:
        """Return the group of each column; None if groups are runs of equally many columns."""
        return group_indices(weight, self.group_size, scales_of(weight).shape[1], "weight_g_idx")


@dataclass(frozen=True, slots=True)
class IntScheme(IntegerScheme):
    """``int-quantized``. ``group_size`` None: scales are per channel, or one number with ``per_tensor``."""

    group_size: int | None
    symmetric: bool
    per_tensor: bool = False
    name: str = "int-quantized"
    bits: int = 8

    @property
    def column_unit(self) -> int:
        """Number of columns of a group."""
        return self.group_size or 1

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        scales = scale_part(shape, self.group_size, self.per_tensor)
        zeros = Part(scales.shape, "int8", ("int32", "int64"), scales.other_shapes, optional=self.symmetric)
        return {
            "weight": Part(shape, "int8"), "weight_scale": scales, "weight_zero_point": zeros, **ACTIVATIONS
        }  # fmt: skip

    def axes(self) -> dict[str, Axes]:
        """Return how each part is sliced with its weight, by the part's suffix."""
        grouped, group = (1, Fraction(self.group_size)) if self.group_size else (None, Fraction(1))
        scales = Axes() if self.per_tensor else Axes(0, grouped, per_column=group)
        return {
            "weight": Axes(0, 1), "weight_scale": scales, "weight_zero_point": scales,
            **{suffix: Axes() for suffix in ACTIVATIONS},
        }  # fmt: skip

    def codes(self, weight: PackedWeight) -> StoredCodes:
        """Return the integer codes of the weight as they are stored."""
        return StoredCodes("rows", self.bits, weight.shape, weight.parts["weight"], added=128)

    def zeros(self, weight: PackedWeight) -> Bytes | None:
        """Return the zeros ``[N, G]``; None if all are the middle code. ModelError for zeros that the scheme does not
        have."""
        stored = weight.parts.get("weight_zero_point")
        if stored is None:
            return None
        zeros = stored.data.view({"int8": "i1", "int32": "<i4", "int64": "<i8"}[stored.dtype])
        if self.symmetric and zeros.any():
            raise ModelError("weight_zero_point of a symmetric weight is not 0")
        if zeros.min() < -128 or zeros.max() > 127:
            raise ModelError(f"weight_zero_point holds {zeros.min()} to {zeros.max()}; accepted: -128 to 127")
        unsigned = zeros.astype(np.int8).view(np.uint8) ^ np.uint8(128)
        groups = scales_of(weight).shape
        return None if self.symmetric else np.broadcast_to(unsigned.reshape(-1, groups[1]), groups)

    def scales(self, weight: PackedWeight) -> HostTensor:
        """Return the scales ``[N, G]``."""
        return scales_of(weight)
