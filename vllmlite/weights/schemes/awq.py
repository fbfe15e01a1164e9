"""AWQ (Lin et al. 2023), as AutoAWQ's ``gemm`` version stores it: 4-bit codes, packed along the rows of a weight.

For a weight ``[N, K]`` in groups of g: ``qweight`` int32 ``[K, N / 8]``, ``qzeros`` int32 ``[K / g, N / 8]`` and
``scales`` float16 ``[K / g, N]``. A word holds eight rows' codes, in nibbles from the low end those of rows 0, 2, 4,
6, 1, 3, 5, 7. An element is (code - zero) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from vllmlite.weights.host import HostTensor, PackedWeight, Part, Shape
from vllmlite.weights.schemes.codes import AWQ_ROWS, Bytes, StoredCodes
from vllmlite.weights.schemes.grouped import IntegerScheme, transposed
from vllmlite.weights.schemes.groups import Axes, check_shape, group_count


@dataclass(frozen=True, slots=True)
class AwqScheme(IntegerScheme):
    """The scheme of AWQ weights. ``group_size`` None: a row is one group."""

    group_size: int | None
    name: str = "awq"
    row_unit: int = AWQ_ROWS
    bits: int = 4
    symmetric: bool = False

    @property
    def column_unit(self) -> int:
        """Number of columns of a group."""
        return self.group_size or 1

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        check_shape(shape, "AWQ", AWQ_ROWS, self.group_size or 1)
        rows, columns = shape
        groups = group_count(columns, self.group_size)
        return {
            "qweight": Part((columns, rows // AWQ_ROWS), "int32"),
            "qzeros": Part((groups, rows // AWQ_ROWS), "int32"),
            "scales": Part((groups, rows), "float16", ("bfloat16", "float32")),
        }

    def axes(self) -> dict[str, Axes]:
        """Return how each part is sliced with its weight, by the part's suffix."""
        grouped, group = (0, self.group_size) if self.group_size else (None, 1)
        return {
            "qweight": Axes(1, 0, per_row=Fraction(AWQ_ROWS)),
            "qzeros": Axes(1, grouped, per_row=Fraction(AWQ_ROWS), per_column=Fraction(group)),
            "scales": Axes(1, grouped, per_column=Fraction(group)),
        }

    def codes(self, weight: PackedWeight) -> StoredCodes:
        """Return the integer codes of the weight as they are stored."""
        return StoredCodes("awq", self.bits, weight.shape, weight.parts["qweight"])

    def zeros(self, weight: PackedWeight) -> Bytes:
        """Return the zeros ``[N, G]``; None if all are the middle code. ModelError for zeros that the scheme does not
        have."""
        stored = weight.parts["qzeros"]
        return StoredCodes("awq", self.bits, (weight.shape[0], stored.shape[0]), stored).unpacked()

    def scales(self, weight: PackedWeight) -> HostTensor:
        """Return the scales ``[N, G]``."""
        return transposed(weight.parts["scales"])
