"""AWQ (Lin et al. 2023), as AutoAWQ's ``gemm`` version stores it: 4-bit codes, packed along the rows of a weight.

For a weight ``[N, K]`` in groups of g: ``qweight`` int32 ``[K, N / 8]``, ``qzeros`` int32 ``[K / g, N / 8]`` and
``scales`` float16 ``[K / g, N]``. A word holds eight rows' codes, in nibbles from the low end those of rows 0, 2, 4,
6, 1, 3, 5, 7. An element is (code - zero) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.host import HostTensor, PackedWeight, Part, Shape
from vllmlite.weights.schemes.bits import pack_rows, words
from vllmlite.weights.schemes.grouped import Bytes, IntegerScheme, transposed
from vllmlite.weights.schemes.groups import Axes, check_shape, group_count

NIBBLE_OF_ROW = (0, 4, 1, 5, 2, 6, 3, 7)
"""For each of the eight rows of a word, the nibble that holds its code."""
PER_WORD = 8


@dataclass(frozen=True, slots=True)
class AwqScheme(IntegerScheme):
    """``group_size`` is None if a row is one group."""

    group_size: int | None
    name: str = "awq"
    row_unit: int = PER_WORD
    bits: int = 4
    symmetric: bool = False

    @property
    def column_unit(self) -> int:
        """A group."""
        return self.group_size or 1

    def parts(self, shape: Shape) -> dict[str, Part]:
        """See :class:`Scheme`."""
        check_shape(shape, "AWQ", PER_WORD, self.group_size or 1)
        rows, columns = shape
        groups = group_count(columns, self.group_size)
        return {
            "qweight": Part((columns, rows // PER_WORD), "int32"),
            "qzeros": Part((groups, rows // PER_WORD), "int32"),
            "scales": Part((groups, rows), "float16", ("bfloat16", "float32")),
        }

    def axes(self) -> dict[str, Axes]:
        """See :class:`SlicedScheme`."""
        grouped, group = (0, self.group_size) if self.group_size else (None, 1)
        return {
            "qweight": Axes(1, 0, per_row=Fraction(PER_WORD)),
            "qzeros": Axes(1, grouped, per_row=Fraction(PER_WORD), per_column=Fraction(group)),
            "scales": Axes(1, grouped, per_column=Fraction(group)),
        }

    def codes(self, weight: PackedWeight) -> Bytes:
        """See :class:`IntegerScheme`."""
        return pack_rows(_codes(words(weight.parts["qweight"]), weight.shape[0]), 4)

    def zeros(self, weight: PackedWeight) -> Bytes:
        """See :class:`IntegerScheme`."""
        return _codes(words(weight.parts["qzeros"]), weight.shape[0])

    def scales(self, weight: PackedWeight) -> HostTensor:
        """See :class:`IntegerScheme`."""
        return transposed(weight.parts["scales"])


def _codes(packed: NDArray[np.uint32], rows: int) -> Bytes:
    """Unpack the codes ``[rows, n]`` of words ``[n, rows / 8]``."""
    by_row = np.ascontiguousarray(packed.T)
    codes = np.empty((len(by_row), PER_WORD, len(packed)), np.uint8)
    for row, nibble in enumerate(NIBBLE_OF_ROW):
        codes[:, row] = by_row >> np.uint32(4 * nibble) & np.uint32(15)
    return codes.reshape(rows, len(packed))
