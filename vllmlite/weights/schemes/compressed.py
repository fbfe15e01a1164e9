"""compressed-tensors' integers: ``pack-quantized`` (several codes in a word) and ``int-quantized`` (an int8 each).

For a weight ``[N, K]`` with G groups in a row (one, if scales are per channel), ``pack-quantized`` stores

- ``weight_packed`` int32 ``[N, ceil(K * bits / 32)]``: signed codes plus 2 ** (bits - 1), low bits first;
- ``weight_scale`` ``[N, G]``;
- ``weight_zero_point`` int32 ``[ceil(N * bits / 32), G]``, packed like the codes, if the weight is asymmetric;
- ``weight_g_idx`` int32 ``[K]``, the group of each column, if groups are in no order (``actorder``);
- ``weight_shape`` int64 ``[2]``.

``int-quantized`` stores ``weight`` int8 ``[N, K]``, the same scales, and ``weight_zero_point`` int8 ``[N, G]``. An
element is (code - zero) * scale. What is stored for activations has no effect: they stay floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vllmlite.errors import ModelError
from vllmlite.weights.host import Floats, PackedWeight, Part, Shape, float_values
from vllmlite.weights.schemes.bits import unpack_rows, words
from vllmlite.weights.schemes.groups import (
    Axes,
    SlicedScheme,
    check_shape,
    group_count,
    group_indices,
    scaled,
)

SCALE_DTYPES = ("float16", "float32")
"""Beside bfloat16."""
ACTIVATIONS = {
    "input_scale": Part((1,), "bfloat16", SCALE_DTYPES, ((),), optional=True),
    "input_zero_point": Part((1,), "int8", (), ((),), optional=True),
}
"""Constants by which static schemes quantise activations."""


def scale_part(shape: Shape, group_size: int | None, per_tensor: bool) -> Part:
    """The scales of a weight of ``shape``: a number, one for each row, or one for each group of a row."""
    if per_tensor:
        return Part((1,), "bfloat16", SCALE_DTYPES, ((), (1, 1)))
    groups = group_count(shape[1], group_size)
    return Part((shape[0], groups), "bfloat16", SCALE_DTYPES, ((shape[0],),) if groups == 1 else ())


def scales_of(weight: PackedWeight) -> Floats:
    """Scales ``[N, G]`` of a weight ``[N, K]``."""
    scales = float_values(weight.parts["weight_scale"])
    if scales.size == 1:
        return np.broadcast_to(scales.reshape(1, 1), (weight.shape[0], 1))
    return scales.reshape(weight.shape[0], -1)


@dataclass(frozen=True, slots=True)
class PackedIntScheme(SlicedScheme):
    """``pack-quantized``. ``group_size`` None: scales are per channel."""

    bits: int
    group_size: int | None
    symmetric: bool
    ordered: bool = True
    name: str = "pack-quantized"

    @property
    def row_unit(self) -> int:
        """Rows whose zeros fill words."""
        return 1 if self.symmetric else 32 // self.bits

    @property
    def column_unit(self) -> int:
        """Columns whose codes fill words, and a group where groups are runs of columns."""
        per_word = 32 // self.bits
        return int(np.lcm(per_word, self.group_size or 1)) if self.ordered else per_word

    def parts(self, shape: Shape) -> dict[str, Part]:
        """See :class:`Scheme`."""
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
        """See :class:`SlicedScheme`."""
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

    def dequantize(self, weight: PackedWeight) -> Floats:
        """See :class:`Scheme`."""
        rows, columns = weight.shape
        scales = scales_of(weight)
        index = group_indices(weight, self.group_size, scales.shape[1], "weight_g_idx")
        codes = unpack_rows(words(weight.parts["weight_packed"]), self.bits, columns)
        if self.symmetric:
            return scaled(codes, 1 << (self.bits - 1), scales, index)
        stored = words(weight.parts["weight_zero_point"])
        return scaled(codes, unpack_rows(stored.T, self.bits, rows).T, scales, index)


@dataclass(frozen=True, slots=True)
class IntScheme(SlicedScheme):
    """``int-quantized``. ``group_size`` None: scales are per channel, or one number with ``per_tensor``."""

    group_size: int | None
    symmetric: bool
    per_tensor: bool = False
    name: str = "int-quantized"

    @property
    def column_unit(self) -> int:
        """A group."""
        return self.group_size or 1

    def parts(self, shape: Shape) -> dict[str, Part]:
        """See :class:`Scheme`."""
        scales = scale_part(shape, self.group_size, self.per_tensor)
        zeros = Part(scales.shape, "int8", ("int32", "int64"), scales.other_shapes, optional=self.symmetric)
        return {
            "weight": Part(shape, "int8"), "weight_scale": scales, "weight_zero_point": zeros, **ACTIVATIONS
        }  # fmt: skip

    def axes(self) -> dict[str, Axes]:
        """See :class:`SlicedScheme`."""
        grouped, group = (1, Fraction(self.group_size)) if self.group_size else (None, Fraction(1))
        scales = Axes() if self.per_tensor else Axes(0, grouped, per_column=group)
        return {
            "weight": Axes(0, 1), "weight_scale": scales, "weight_zero_point": scales,
            **{suffix: Axes() for suffix in ACTIVATIONS},
        }  # fmt: skip

    def dequantize(self, weight: PackedWeight) -> Floats:
        """See :class:`Scheme`."""
        scales = scales_of(weight)
        codes = weight.parts["weight"].data.view(np.int8).reshape(weight.shape)
        index = group_indices(weight, self.group_size, scales.shape[1])
        stored = weight.parts.get("weight_zero_point")
        if stored is None:
            return scaled(codes, 0, scales, index)
        zeros = stored.data.view({"int8": "i1", "int32": "<i4", "int64": "<i8"}[stored.dtype]).reshape(
            stored.shape
        )
        if self.symmetric and zeros.any():
            raise ModelError("weight_zero_point of a symmetric weight is not 0")
        return scaled(codes, np.broadcast_to(zeros.reshape(-1, scales.shape[1]), scales.shape), scales, index)
