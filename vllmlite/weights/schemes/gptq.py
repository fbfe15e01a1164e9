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
from vllmlite.weights.host import HostTensor, PackedWeight, Part, Shape
from vllmlite.weights.schemes.codes import Bytes, StoredCodes
from vllmlite.weights.schemes.grouped import IntegerScheme, transposed
from vllmlite.weights.schemes.groups import Axes, SlicedScheme, check_shape, group_count, group_indices

logger = logging.getLogger(__name__)

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class GptqScheme(IntegerScheme):
    """The scheme of GPTQ weights. ``group_size`` None: a row is one group. ``version``: of the format, 1 or 2.
    ``symmetric``: all zeros are the middle code, from which the version follows whatever the configuration says.
    ``ordered``: groups are runs of columns."""

    bits: int
    group_size: int | None
    symmetric: bool
    version: int
    ordered: bool = True
    name: str = "gptq"

    @property
    def row_unit(self) -> int:
        """Number of rows whose zeros fill whole words."""
        return WORD_BITS if self.bits == 3 else WORD_BITS // self.bits

    @property
    def column_unit(self) -> int:
        """Number of columns whose codes fill whole words; if groups are runs of columns, also whole groups."""
        return int(np.lcm(self.row_unit, self.group_size or 1)) if self.ordered else self.row_unit

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
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
        """Return how each part is sliced with its weight, by the part's suffix."""
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
        """Return columns ``first`` to ``last`` - 1. Bounds are multiples of :attr:`column_unit`, or the number of
        columns."""
        if self.ordered:  # what is left of g_idx would number the groups of the whole weight
            if self.groups(weight) is not None:
                raise ModelError(
                    "g_idx has groups that are not runs of columns, which desc_act=false requires"
                )
            parts = {suffix: part for suffix, part in weight.parts.items() if suffix != "g_idx"}
            weight = PackedWeight(self, weight.shape, parts)
        return SlicedScheme.take_columns(self, weight, first, last)

    def codes(self, weight: PackedWeight) -> StoredCodes:
        """Return the integer codes of the weight as they are stored."""
        return StoredCodes("words", self.bits, weight.shape, weight.parts["qweight"])

    def scales(self, weight: PackedWeight) -> HostTensor:
        """Return the scales ``[N, G]``."""
        return transposed(weight.parts["scales"])

    def groups(self, weight: PackedWeight) -> NDArray[np.int64] | None:
        """Return the group of each column; None if groups are runs of equally many columns."""
        return group_indices(weight, self.group_size, weight.parts["scales"].shape[0], "g_idx")

    def zeros(self, weight: PackedWeight) -> Bytes | None:
        """Return the zeros ``[N, G]``; None if all are the middle code. ModelError for zeros that the scheme does not
        have."""
        qzeros = weight.parts["qzeros"]
        stored = StoredCodes("rows", self.bits, (qzeros.shape[0], weight.shape[0]), qzeros).unpacked().T
        if not self.symmetric:
            # A version 1 zero of -1 is stored as the largest code.
            return stored if self.version == 2 else (stored + np.uint8(1)) & np.uint8((1 << self.bits) - 1)
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
        return None


@cache
def _tell_of_version(found: int, said: int) -> None:
    logger.warning(
        "zeros are those of version %d of the GPTQ format, though the configuration says %d", found, said
    )
