"""GPTQ (Frantar et al. 2023), as AutoGPTQ and GPTQModel store it: codes of 2, 3, 4 or 8 bits, packed along the
columns.

For a weight ``[N, K]`` in groups of g: ``qweight`` int32 ``[K * bits / 32, N]``, ``qzeros`` int32 ``[groups, N * bits
/ 32]``, ``scales`` float16 ``[groups, N]`` and ``g_idx`` int32 ``[K]``, the group of each column, which is in no
order with ``desc_act``. Low bits come first. An element is (code - zero) * scale; version 1 of the format stores each
zero minus one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np
from numpy.typing import NDArray

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

logger = logging.getLogger(__name__)

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class GptqScheme(SlicedScheme):
    """``group_size`` None: a row is one group. ``version``: of the format, 1 or 2. ``symmetric``: all zeros are the
    middle code, which tells the version whatever the configuration says. ``ordered``: groups are runs of columns."""

    bits: int
    group_size: int | None
    symmetric: bool
    version: int
    ordered: bool = True
    name: str = "gptq"

    @property
    def row_unit(self) -> int:
        """Rows whose zeros fill words."""
        return WORD_BITS if self.bits == 3 else WORD_BITS // self.bits

    @property
    def column_unit(self) -> int:
        """Columns whose codes fill words, and a group where groups are runs of columns."""
        return int(np.lcm(self.row_unit, self.group_size or 1)) if self.ordered else self.row_unit

    def parts(self, shape: Shape) -> dict[str, Part]:
        """See :class:`Scheme`."""
        check_shape(shape, f"GPTQ with {self.bits} bits", self.row_unit, self.row_unit)
        rows, columns = shape
        groups = group_count(columns, self.group_size)
        return {
            "qweight": Part((columns * self.bits // WORD_BITS, rows), "int32"),
            "qzeros": Part((groups, rows * self.bits // WORD_BITS), "int32"),
            "scales": Part((groups, rows), "float16", ("bfloat16", "float32")),
            "g_idx": Part((columns,), "int32", optional=self.ordered),
        }

    def axes(self) -> dict[str, Axes]:
        """See :class:`SlicedScheme`."""
        cut = self.ordered and self.group_size is not None
        grouped, group = (0, Fraction(self.group_size or 1)) if cut else (None, Fraction(1))
        per_word = Fraction(WORD_BITS, self.bits)
        return {
            "qweight": Axes(1, 0, per_column=per_word),
            "qzeros": Axes(1, grouped, per_row=per_word, per_column=group),
            "scales": Axes(1, grouped, per_column=group),
            "g_idx": Axes(None, 0),
        }

    def take_columns(self, weight: PackedWeight, first: int, last: int) -> PackedWeight:
        """See :class:`Scheme`."""
        if self.ordered:  # what is left of g_idx would number the groups of the whole weight
            groups = group_count(weight.shape[1], self.group_size)
            if group_indices(weight, self.group_size, groups, "g_idx") is not None:
                raise ModelError("g_idx is in no order; accepted: runs of columns, as desc_act=false means")
            parts = {suffix: part for suffix, part in weight.parts.items() if suffix != "g_idx"}
            weight = PackedWeight(self, weight.shape, parts)
        return SlicedScheme.take_columns(self, weight, first, last)

    def dequantize(self, weight: PackedWeight) -> Floats:
        """See :class:`Scheme`."""
        rows, columns = weight.shape
        scales = float_values(weight.parts["scales"]).T
        groups = scales.shape[1]
        index = group_indices(weight, self.group_size, groups, "g_idx")
        codes = unpack_rows(words(weight.parts["qweight"]).T, self.bits, columns)
        stored = unpack_rows(words(weight.parts["qzeros"]), self.bits, rows).T
        return scaled(codes, self._zeros(stored), scales, index)

    def _zeros(self, stored: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The zeros ``[N, groups]`` that ``stored`` ones mean."""
        version = self.version
        if self.symmetric:
            middle = 1 << (self.bits - 1)
            shown = set(np.unique(stored).tolist())
            if shown not in ({middle - 1}, {middle}):
                raise ModelError(
                    f"qzeros of a symmetric weight hold {sorted(shown)[:4]}; accepted: {middle - 1} (version 1 of the "
                    f"format) or {middle} (version 2) alone"
                )
            version = 2 if shown == {middle} else 1
            if version != self.version:
                _tell_of_version(version, self.version)
        # A version 1 zero of -1 is stored as the largest code.
        return (
            stored.astype(np.int32)
            if version == 2
            else (stored.astype(np.int32) + 1) & ((1 << self.bits) - 1)
        )


@cache
def _tell_of_version(found: int, said: int) -> None:
    logger.warning(
        "zeros are those of version %d of the GPTQ format, though the configuration says %d", found, said
    )
